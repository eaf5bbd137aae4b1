"""Logits that are computed when they are read: whatever is done with them gives what the model's own logits give."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastft
from fastft.rewriter.runtime.lazy_logits import LazyLogits

V, H = 67, 16
OPTIONS = {"lower": "eager", "strict": True, "logits_memory": 4 * 80 * 4}  # bytes of four rows
IDS, LABELS = (torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
LABELS[0, :2] = -100
TEACHER = torch.randn(3, 6, V, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
VALID = LABELS.clamp_min(0)


class Model(nn.Module):
    """An embedding, something to learn, and a head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(ids))))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model: nn.Module, **more: Any) -> Callable:
    return torch.compile(model, backend="fastft", options={**OPTIONS, **more})


class Square(torch.autograd.Function):
    """Gets the tensor itself: no __torch_function__ asks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Tripled(torch.autograd.Function):
    """Returns a copy, as DistributedDataParallel does, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def rows(logits: Tensor) -> Tensor:
    return logits.reshape(-1, V)


def summands(logits: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), TEACHER, reduction="none", log_target=True)


FUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda x: F.cross_entropy(rows(x[:, :-1]).float(), LABELS[:, 1:].reshape(-1)),
    "ellipsis": lambda x: F.cross_entropy(rows(x[..., :-1, :].contiguous()), LABELS[..., 1:].reshape(-1)),
    "sum": lambda x: F.cross_entropy(x.view(-1, V), LABELS.view(-1), reduction="sum") / torch.tensor(7),
    "none": lambda x: (F.cross_entropy(rows(x), LABELS.view(-1), reduction="none") * torch.arange(18)).sum(),
    "smoothed": lambda x: F.cross_entropy(rows(x), LABELS.view(-1), label_smoothing=0.1),
    "another_ignored": lambda x: F.cross_entropy(rows(x), VALID.view(-1), ignore_index=int(VALID[1, 1])),
    "module": lambda x: nn.CrossEntropyLoss()(x.flatten(0, 1), LABELS.flatten()),
    "classes_second": lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    "permuted": lambda x: F.cross_entropy(x.permute(0, 2, 1), LABELS),
    "temperature": lambda x: F.cross_entropy(rows(x / 0.7), LABELS.view(-1)),
    "scaled": lambda x: F.cross_entropy(rows(0.3 * x), LABELS.view(-1)),
    "capped": lambda x: F.cross_entropy(rows(3.0 * torch.tanh(x / 3.0)), LABELS.view(-1)),
    "double": lambda x: F.cross_entropy(rows(x.double()), LABELS.view(-1)).float(),
    "nll": lambda x: F.nll_loss(rows(x).log_softmax(-1), LABELS.view(-1)),
    "log_probabilities": lambda x: (x.log_softmax(-1).gather(-1, VALID[..., None]).squeeze(-1) * VALID).sum(),
    "function": lambda x: torch.gather(F.log_softmax(x.float(), dim=-1), 2, VALID.unsqueeze(2)).pow(2).sum(),
    "distilled": lambda x: F.kl_div((x / 2).log_softmax(-1), TEACHER, log_target=True, reduction="sum"),
    "distilled_by_token": lambda x: (
        F.kl_div(x.log_softmax(-1), TEACHER, reduction="none", log_target=True).sum(-1)[0].sum()
    ),
    "last": lambda x: F.cross_entropy(x[:, -1], VALID[:, -1]),
    "one": lambda x: F.cross_entropy(x[0, 0], VALID[0, 0]),
    "selected": lambda x: F.cross_entropy(x.select(0, 1).narrow(0, 1, 3), VALID[1, 1:4]),
    "indexed": lambda x: F.cross_entropy(x[torch.tensor([0, 1]), torch.tensor([2, 3])], VALID[0, :2]),
    "masked": lambda x: F.cross_entropy(x[LABELS > 30], LABELS[LABELS > 30]),
    "dissolved": lambda x: F.cross_entropy(x.reshape(18, -1), LABELS.reshape(-1)),
    "axes": lambda x: F.cross_entropy(rows(x[None].squeeze(0).unsqueeze(1).squeeze(1)), LABELS.view(-1)),
    "moved": lambda x: F.cross_entropy(rows(x.to(x.device).to(torch.float64)), LABELS.view(-1)).float(),
}


def accumulated(logits: Tensor) -> Tensor:
    loss = F.cross_entropy(rows(logits), LABELS.view(-1))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    return F.cross_entropy(rows(logits), LABELS.view(-1)) * 3 + logits.pow(2).mean()


def hooked(logits: Tensor) -> Tensor:
    logits.register_hook(lambda grad: grad * 2)
    return F.cross_entropy(rows(logits), LABELS.view(-1))


def retained(logits: Tensor) -> Tensor:
    logits.retain_grad()
    F.cross_entropy(rows(logits), LABELS.view(-1)).backward(retain_graph=True)
    return (logits.grad * torch.arange(V)).sum() + logits.sum()


def written(logits: Tensor) -> Tensor:
    part, flat = logits[:, :-1], logits.view(-1, V)
    logits[0, 1] = 0.5
    return logits.pow(2).sum() + part.exp().sum() + flat.pow(3).sum()


def written_through_a_view(logits: Tensor) -> Tensor:
    part = logits[:, :-1]
    part.mul_(2.0)
    return logits.pow(2).sum() + part.exp().sum()


def written_after(logits: Tensor) -> Tensor:
    copied = logits.double()
    logits.mul_(2.0)
    return logits.pow(2).sum() + F.cross_entropy(rows(copied), LABELS.view(-1)).float()


def out_of(logits: Tensor) -> Tensor:
    twice = torch.empty_like(logits)
    torch.mul(logits.detach(), 2, out=twice)
    return (twice * logits).sum()


def differentiated(logits: Tensor) -> Tensor:
    logits.retain_grad()
    (grad,) = torch.autograd.grad(logits.pow(2).sum(), logits, retain_graph=True)
    return (grad * logits).sum()


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(),
    "softmax": lambda x: x.softmax(-1).pow(2).sum(),
    "arithmetic": lambda x: (torch.ones(V) - x).pow(2).sum() + torch.where(x > 0, x, 0).sum(),
    "product": lambda x: (x @ torch.ones(V, 3)).pow(2).sum() + torch.einsum("bsv->bs", x).pow(2).sum(),
    "classes": lambda x: x[..., :10].pow(2).sum() + x[0, 0, 0],
    "entropy": lambda x: (x.logsumexp(-1) - x.gather(-1, VALID[..., None]).squeeze(-1)).sum(),
    "several_classes": lambda x: x.log_softmax(-1).gather(-1, torch.stack([VALID, VALID], -1)).pow(2).sum(),
    "weighted": lambda x: F.cross_entropy(rows(x), LABELS.view(-1), weight=torch.arange(float(V))),
    "probabilities": lambda x: F.cross_entropy(rows(x), torch.full((18, V), 1 / V)),
    "classes_as_axis_1": lambda x: F.cross_entropy(x, torch.zeros(3, V, dtype=torch.long)),
    "iterated": lambda x: sum((one.logsumexp(-1).sum() for one in x), torch.zeros(())),
    "joined": lambda x: torch.cat([x, x * 2]).pow(2).sum() + torch.stack([x, x]).sum(),
    "predicted": lambda x: (x.argmax(-1) == LABELS).float().mean() + x.topk(3).values.sum(),
    "data": lambda x: (x.data * x).sum() + (x.detach() * x).sum(),
    "leaf": lambda x: x.detach().requires_grad_().sum() + x.sum(),
    "a_function": lambda x: Square.apply(x).sum(),
    "a_function_that_copies": lambda x: F.cross_entropy(rows(Tripled.apply(x)), LABELS.view(-1)),
    "accumulated": accumulated,
    "hooked": hooked,
    "retained": retained,
    "summands": lambda x: summands(x).pow(2).sum(),
    "shares": lambda x: F.kl_div(x.log_softmax(-1), TEACHER.exp(), reduction="batchmean"),
    "written": written,
    "written_through_a_view": written_through_a_view,
    "written_after": written_after,
    "out_of": out_of,
    "differentiated": differentiated,
    "compiled": torch.compile(lambda x: (x * 2).softmax(-1).pow(2).sum(), backend="eager"),
}


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(result) if type(one) is Tensor and one.dim() > 1]
        self.elements = max([self.elements, *sizes])
        return result


def results(model: nn.Module, run: Callable, use: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss = use(run(IDS))
    loss.backward()
    return [loss.detach(), *(one.grad.clone() for one in model.parameters())]


def assert_same(use: Callable[[Tensor], Tensor], bias: bool) -> None:
    model = Model(bias)
    for mine, other in zip(results(model, compiled(model), use), results(model, model, use), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", FUSED)
def test_losses_outside_the_model(name: str, bias: bool) -> None:
    assert_same(FUSED[name], bias)


@pytest.mark.parametrize("name", FUSED)
def test_these_need_no_logits(name: str) -> None:
    logits = compiled(Model())(IDS)
    with Largest() as largest:
        FUSED[name](logits).backward()
    rows_held = 4 if name not in ("double", "moved") else 2
    assert largest.elements <= max(V * H, rows_held * 2 * V)
    assert not any(graph.reads for graph in fastft.compilations().graphs[-1:])


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", READ)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_whatever_reads_them(name: str, bias: bool) -> None:
    assert_same(READ[name], bias)


def test_they_are_computed_once_and_reported() -> None:
    model = Model()
    logits = compiled(model)(IDS)
    first = logits.cumprod(-1)
    assert torch.equal(first, logits.cumprod(-1))
    (graph,) = [graph for graph in fastft.compilations().graphs if graph.deferred][-1:]
    assert graph.deferred == ["head"]
    assert list(graph.reads.values()) == [1]
    assert "test_lazy_logits.py" in next(iter(graph.reads))
    assert "test_lazy_logits.py" in str(fastft.compilations())


def test_they_are_tensors() -> None:
    model = Model()
    logits, own = compiled(model)(IDS), model(IDS)
    assert isinstance(logits, Tensor)
    assert torch.is_tensor(logits)
    assert isinstance(logits, torch.FloatTensor)
    for tell in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "itemsize"):
        assert getattr(logits, tell) == getattr(own, tell), tell
    for tell in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__", "element_size"):
        assert getattr(logits, tell)() == getattr(own, tell)(), tell
    assert logits.source.read is None
    assert repr(logits).startswith("tensor(")


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, logits: torch.autograd.grad(loss, logits, allow_unused=True),
        lambda loss, logits: logits.retain_grad(),
        lambda loss, logits: logits.register_hook(lambda grad: 2 * grad),
    ],
    ids=["grad", "retain_grad", "hook"],
)
@pytest.mark.parametrize("use", [FUSED["sum"], READ["sum"]], ids=["fused", "rows"])
def test_a_gradient_that_passed_them_by_is_an_error(use: Callable, ask: Callable) -> None:
    logits = compiled(Model())(IDS)
    loss = use(logits)
    with pytest.raises(RuntimeError, match="ask for it before that"):
        ask(loss, logits)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :-1]], ids=["itself", "a_part"])
def test_a_function_that_takes_what_was_written_to_is_an_error(view: Callable) -> None:
    """Before the write or after it, as eager PyTorch refuses the former."""
    model = Model()
    logits = compiled(model)(IDS)
    part = view(logits)
    before = Square.apply(part)
    logits.exp_()
    after = Square.apply(part)
    torch.testing.assert_close(after.detach(), view(model(IDS).detach()).exp() ** 2)
    with pytest.raises(RuntimeError, match="and its gradient would not know of that"):
        after.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()


def test_copies_are_ordinary_tensors() -> None:
    model = Model()
    run, own = compiled(model), model(IDS).detach()
    file = io.BytesIO()
    torch.save(run(IDS), file)
    file.seek(0)
    copies = (
        torch.load(file), pickle.loads(pickle.dumps(run(IDS).detach())), copy.deepcopy(run(IDS).detach()),
        run(IDS).cpu().clone() + 0, torch.from_numpy(np.asarray(run(IDS).detach())),
        torch.tensor(run(IDS).tolist()), torch.from_numpy(run(IDS).detach().numpy()),
    )  # fmt: skip
    for one in copies:
        assert type(one) is Tensor
        torch.testing.assert_close(one.detach(), own)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable) -> None:
    model = Model()
    run = compiled(model)
    with mode():
        logits = run(IDS)
        assert type(logits) is LazyLogits
        assert not logits.requires_grad
        torch.testing.assert_close(
            F.cross_entropy(rows(logits), LABELS.view(-1)), F.cross_entropy(rows(model(IDS)), LABELS.view(-1))
        )
        assert torch.equal(logits.argmax(-1), model(IDS).argmax(-1))


def test_gradients_only_where_they_were_on() -> None:
    """Logits of a forward without gradients have none afterwards; those of one with them have some, read or not."""
    model = Model()
    run = compiled(model)
    with torch.no_grad():
        frozen = run(IDS)
    assert not F.cross_entropy(rows(frozen), LABELS.view(-1)).requires_grad
    trained = run(IDS)
    with torch.no_grad():
        assert not F.cross_entropy(rows(trained), LABELS.view(-1)).requires_grad
        assert not trained.sum().requires_grad
    assert trained.sum().requires_grad


def test_under_autocast() -> None:
    """Read later, outside of autocast: what was computed under it."""
    model = Model(bias=True)
    run = compiled(model)
    for use in (FUSED["sum"], FUSED["log_probabilities"], READ["softmax"]):
        found = []
        for one in (run, model):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = one(IDS)
                loss = use(logits)
            loss.backward()
            assert logits.dtype == torch.bfloat16
            outside = logits.float().sum()
            found.append([loss.detach(), outside.detach(), *(p.grad.clone() for p in model.parameters())])
        for mine, other in zip(*found, strict=True):
            assert mine.dtype == other.dtype
            assert (mine - other).norm() <= 2**-6 * other.norm()


@pytest.mark.parametrize("change", ["in_place", "optimizer", "bitsandbytes"])
def test_weights_that_changed_are_an_error(change: str) -> None:
    model = Model()
    logits = compiled(model)(IDS)
    F.cross_entropy(rows(logits), LABELS.view(-1)).backward()
    if change == "bitsandbytes":  # writes to weights without telling torch
        bitsandbytes.optim.AdamW8bit(model.parameters(), min_8bit_size=1).step()
    elif change == "optimizer":
        torch.optim.AdamW(model.parameters()).step()
    else:
        with torch.no_grad():
            model.head.weight.add_(1.0)
    for use in (lambda: logits.sum(), lambda: F.cross_entropy(rows(logits), LABELS.view(-1))):
        with pytest.raises(RuntimeError, match="read them before the optimizer's step, or compile with"):
            use()


def test_a_frozen_head_can_be_read_after_the_step() -> None:
    model = Model()
    model.head.requires_grad_(False)
    logits, own = compiled(model)(IDS), model(IDS).detach()
    F.cross_entropy(rows(logits), LABELS.view(-1)).backward()
    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 1.0).step()
    torch.testing.assert_close(logits.detach() + 0, own)


def test_a_write_to_what_was_read_apart_is_an_error() -> None:
    logits = compiled(Model())(IDS)
    part = logits[:, :-1]
    part.sort()
    with pytest.raises(RuntimeError, match="written to in place"):
        logits.mul_(2.0)


def test_the_option_gives_ordinary_logits() -> None:
    model = Model()
    logits = compiled(model, lazy_logits=False)(IDS)
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, model(IDS))


def test_hidden_states_that_change_before_a_gradient_arrives_are_an_error() -> None:
    """Where nothing was read, logits are computed in backward: from what they were made of, or not at all."""

    class WithHidden(Model):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            hidden = self.inner(self.embedding(ids))  # which no backward but the head's reads
            return hidden, self.head(hidden)

    class Unread(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.zeros(())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.ones(3, 6, V)

    hidden, logits = compiled(WithHidden())(IDS)
    loss = Unread.apply(logits)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="has changed since"):
        loss.backward()


def test_what_is_saved_for_backward() -> None:
    """A loss of lazy logits keeps no more than the hidden states' gradient, where the head is frozen."""
    model = Model()
    model.head.requires_grad_(False)
    run = compiled(model)
    run(IDS)
    kept: list[int] = []
    logits = run(IDS)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        F.cross_entropy(rows(logits[:, :-1]), LABELS[:, 1:].reshape(-1))
    assert max(kept) <= IDS[:, 1:].numel() * H


@pytest.mark.slow
def test_through_inductor() -> None:
    model = Model(bias=True)
    run = torch.compile(model, backend="fastft", options={"strict": True})
    for use in (FUSED["shifted"], READ["softmax"], READ["a_function"]):
        for mine, other in zip(results(model, run, use), results(model, model, use), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
