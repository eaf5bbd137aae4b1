"""Logits that are read row by row: what is computed of them equals what the model's own logits give, chunk by chunk."""

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import LabelSmoother
from trl.experimental.gkd import GKDTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

from fastft.rewriter.runtime.lazy_logits import LazyLogits
from fastft.rewriter.runtime.row_call import Call, reduced

V, H, SHAPE = 67, 8, (3, 14)
ROW = V * 8  # bytes
IDS, LABELS, OTHERS = (torch.randint(V, SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2))
PADDED = LABELS.masked_fill(OTHERS < 20, -100)
PADDED[1] = -100
MASK = PADDED != -100
SHARE = torch.rand(*SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
TEACHER = torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TEACHER_LOGS, TEACHER_SHARES = TEACHER.log_softmax(-1), TEACHER.softmax(-1)
MATRIX = torch.randn(V, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
Use = Callable[[Tensor], Any]


class Model(nn.Module):
    """An embedding, something to learn, and a head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(ids))))


def lazily(model: nn.Module, rows: int = 4) -> Callable[[Tensor], LazyLogits]:
    """A compiled model, whose chunks are so many rows of one tensor of logits."""
    options = {"lower": "eager", "strict": True, "logits_memory": rows * ROW}
    run = torch.compile(model, backend="fastft", options=options)

    def call(ids: Tensor) -> LazyLogits:
        logits = run(ids)
        assert isinstance(logits, LazyLogits)
        return logits

    return call


@functools.cache
def built() -> tuple[nn.Module, Callable[[Tensor], LazyLogits]]:
    """A model in float64, and compiled."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Model(bias=True).double()
    torch.nn.init.normal_(model.head.weight)
    return model, lazily(model)


def another(bias: bool = False, rows: int = 4) -> tuple[nn.Module, Callable[[Tensor], LazyLogits]]:
    """Another model; Dynamo compiles one function for a few models only."""
    built.cache_clear()
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Model(bias).double()
    return model, lazily(model, rows)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, V)


def scaled_in_place(x: Tensor) -> Tensor:
    x /= 0.7
    x.mul_(1.5)
    return selective_log_softmax(x, LABELS)


def scaled_and_cut(x: Tensor) -> Tensor:
    x.div_(0.7)
    return x[:, -5:].logsumexp(-1).square().sum() + F.cross_entropy(flat(x[:, :-5]), LABELS[:, :-5].reshape(-1))


def focal(x: Tensor) -> Tensor:
    losses = F.cross_entropy(flat(x), PADDED.reshape(-1), reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def focal_by_hand(x: Tensor) -> Tensor:
    p = x.softmax(-1).gather(-1, LABELS[..., None])
    return ((1 - p) ** 2 * p.log() * SHARE[..., None]).sum()


def entropies(x: Tensor) -> Tensor:
    p = x.softmax(dim=2)
    return x.logsumexp(-1) - (p * x).sum(-1)


def smoothed_by_hand(x: Tensor) -> Tensor:
    logs = x.log_softmax(-1)
    chosen = -logs.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    return (0.9 * chosen - 0.1 * logs.mean(-1))[MASK].mean()


def renormalised(x: Tensor) -> Tensor:
    """The share of given classes among the ten most likely ones."""
    values, places = x.topk(10, dim=-1)
    kept = torch.where(x >= values[..., -1:], x, -torch.inf)
    return kept.logsumexp(-1) - values.logsumexp(-1) + values.softmax(-1).pow(2).sum(-1) + places.sum(-1) * 0.1


def mixed(x: Tensor) -> Tensor:
    mixture = torch.logsumexp(torch.stack([x.log_softmax(-1) + 0.3, TEACHER_LOGS]), dim=0)
    return F.kl_div(mixture, TEACHER_SHARES, reduction="none").sum(-1)


def per_token(x: Tensor) -> Tensor:
    return (F.cross_entropy(flat(x), PADDED.reshape(-1), reduction="none") * SHARE.reshape(-1)).sum()


def weighted(**more: Any) -> Use:
    return lambda x: F.cross_entropy(flat(x), PADDED.reshape(-1), weight=WEIGHT, **more)


def temperature(x: Tensor) -> Tensor:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (x / scale).logsumexp(-1).sum().backward(retain_graph=True)
    assert scale.grad is not None
    return scale.grad * (x * scale).exp().sum(-1)


def of_given_rows(x: Tensor) -> Tensor:
    part = flat(x).log_softmax(-1)
    return part[torch.arange(len(part)), LABELS.reshape(-1) - V].exp() + flat(x)[:, 3] + flat(x)[:, [1, 1, -1]].sum(1)


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        p = x.softmax(-1)
        part = p[:, 1:]
    return (p * x.log_softmax(-1)).sum(-1)[:, 1:] + (part * x[:, 1:].detach()).sum(-1) + (part.exp() * x[:, 1:]).sum(-1)


def by_sequence(x: Tensor) -> Tensor:
    return torch.stack([one.logsumexp(-1) for one in x]) + torch.stack([one[2:9].sum() for one in x.unbind()])[:, None]


def in_parts(x: Tensor) -> Tensor:
    parts = [one.softmax(-1).amax(-1) for one in x.split(5, dim=1)] + [one.exp().sum(-1) for one in x.chunk(4, 1)]
    return torch.cat(parts, 1)


def classes_by_number(x: Tensor) -> Tensor:
    """Axes counted from the front, before the rows get another shape."""
    p = flat(x).softmax(1).view(*SHAPE, V).square().sum(2) + x.log_softmax(2).view(-1, V).amax(1).view(SHAPE)
    cumulated = (
        flat(x).cumsum(1).unsqueeze(1).flatten(0, 1).amax(1).view(SHAPE)
        + x.softmax(dim=2)[MASK].square().sum(-1).mean()
    )
    return p + cumulated + F.softmax(x[0, -1], dim=0).unsqueeze(0).square().sum(1)


def leading_ones(x: Tensor) -> Tensor:
    """Operands of all rows, as a tensor of some rank, before the rows get another one."""
    scale = torch.full((1, 1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    y = x * WEIGHT[None, None] / scale
    one = F.cross_entropy((x + WEIGHT.view(1, 1, -1)).view(-1, V), PADDED.view(-1)) + (flat(x) + WEIGHT[None])[3].amax(
        -1
    )
    rows = y.view(-1, V).logsumexp(-1).view(SHAPE) + y[1, :1].square().sum(-1) * one + y[0, 0].unsqueeze(0).std(-1)
    rows.square().sum().backward(retain_graph=True)
    assert scale.grad is not None
    return rows + y[MASK].amax(-1).mean() + scale.grad.view(1, 1)


def stacked_from_the_end(x: Tensor) -> Tensor:
    return torch.stack([x, TEACHER, x * 2], -4).mean(0).view(-1, V).sum(-1)


def metrics(x: Tensor) -> Tensor:
    correct = (x.argmax(-1) == LABELS)[MASK].double().mean() + (x.topk(5).indices == LABELS[..., None]).any(
        -1
    ).double().mean()
    rank = (x > x.gather(-1, LABELS[..., None])).sum(-1) + (x.max(-1).indices == x.argmax(dim=2)).sum()
    return x.max(dim=-1).values * correct * rank + torch.isfinite(x).all()


READS: dict[str, Use] = {
    "predictions": metrics,
    "lse": lambda x: x.logsumexp(-1),
    "entropy": entropies,
    "entropy_from_logits": entropy_from_logits,
    "selective": lambda x: selective_log_softmax(x, LABELS, temperature=0.7, row_mask=MASK),
    "selective_of_many": lambda x: selective_log_softmax(x, torch.stack([LABELS, OTHERS], -1)),
    "selective_and_entropy": lambda x: sum(selective_log_softmax_and_entropy(x, LABELS)),
    "selective_in_halves": lambda x: selective_log_softmax(x.bfloat16(), LABELS).double(),
    "scaled_in_place": scaled_in_place,
    "scaled_and_cut": scaled_and_cut,
    "last": lambda x: x[:, -4:].softmax(-1).pow(2).sum(-1),
    "one_row": lambda x: x[0, -1].softmax(-1).pow(2).sum() + x[1].softmax(-1).square().sum(-1),
    "weighted": weighted(),
    "weighted_and_smoothed": weighted(label_smoothing=0.1, reduction="sum"),
    "weighted_mean_smoothed": weighted(label_smoothing=0.1),
    "weighted_each": lambda x: F.cross_entropy(flat(x), LABELS.reshape(-1), WEIGHT, reduction="none", ignore_index=3),
    "weighted_module": lambda x: nn.CrossEntropyLoss(weight=WEIGHT)(x.transpose(1, 2), PADDED),
    "weighted_nll": lambda x: F.nll_loss(flat(x).log_softmax(-1), PADDED.reshape(-1), weight=WEIGHT),
    "shares": lambda x: F.cross_entropy(flat(x), flat(TEACHER_SHARES), weight=WEIGHT, label_smoothing=0.1),
    "of_a_program": lambda x: F.cross_entropy(flat(x * WEIGHT), PADDED.reshape(-1), label_smoothing=0.1),
    "one_class_each": lambda x: F.nll_loss(flat(x).softmax(-1).log(), PADDED.reshape(-1)) + x[0, 1].softmax(0)[3],
    "z": lambda x: (x.logsumexp(-1) ** 2).mean() + F.cross_entropy(flat(x), LABELS.reshape(-1)),
    "label_smoother": lambda x: LabelSmoother(0.1)({"logits": x}, PADDED, shift_labels=True),
    "smoothed_by_hand": smoothed_by_hand,
    "focal": focal,
    "focal_by_hand": focal_by_hand,
    "per_token": per_token,
    "expected": lambda x: x.softmax(-1) @ MATRIX + F.linear(x.sigmoid(), MATRIX.T) + (x.exp() @ WEIGHT)[..., None],
    "renormalised": renormalised,
    "suppressed": lambda x: (x + WEIGHT.log()).masked_fill(WEIGHT > 1, -torch.inf).softmax(-1).square().sum(dim=2),
    "by_row": lambda x: ((x - SHARE[..., None]).clamp(-1, 1) * SHARE[0, :, None]).std(-1),
    "less_of_the_vocabulary": lambda x: x[..., : V - 3].log_softmax(-1)[:, :, 4] + x[..., 2:5].sum(-1),
    "of_given_rows": of_given_rows,
    "masked": lambda x: (x.log_softmax(-1).exp() ** 2)[MASK].reshape(-1, V).sum(-1),
    "without_gradients": without_gradients,
    "temperature": temperature,
    "by_sequence": by_sequence,
    "in_parts": in_parts,
    "moved": lambda x: x.exp().view(-1, V).unsqueeze(1).flatten(0, 1)[3:9].narrow(0, 1, 4).select(0, 2).sum(),
    "over_all": lambda x: x.square().mean() + x.sigmoid().sum((1, 2), keepdim=True) + x.exp().mean((0, -1)).sum(),
    "divergence": lambda x: F.kl_div(x.log_softmax(-1), TEACHER_SHARES, reduction="batchmean"),
    "reverse": lambda x: F.kl_div(TEACHER_LOGS, x.log_softmax(-1), log_target=True, reduction="none").sum(-1) * SHARE,
    "squares": lambda x: F.mse_loss(x, TEACHER) + F.smooth_l1_loss(x, TEACHER, reduction="sum") * 0.1,
    "weighted_squares": lambda x: F.mse_loss(x, TEACHER, reduction="sum", weight=TEACHER_SHARES),
    "weighted_huber": lambda x: F.huber_loss(x, TEACHER, weight=TEACHER_SHARES),
    "weighted_distance": lambda x: F.l1_loss(x, TEACHER, reduction="none", weight=TEACHER_SHARES).sum(-1),
    "mixed": mixed,
    "classes_by_number": classes_by_number,
    "leading_ones": leading_ones,
    "stacked_from_the_end": stacked_from_the_end,
}  # fmt: skip


class Largest(TorchDispatchMode):
    """The largest memory that a call allocates, in numbers of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            one for one in tree_leaves(result) if type(one) is Tensor and one.numel() <= one.untyped_storage().nbytes()
        ]
        known = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if type(one) is Tensor}
        new = [one.numel() for one in made if one.untyped_storage().data_ptr() not in known]
        self.elements = max([self.elements, *new])
        return result


def weighed(result: Tensor) -> Tensor:
    """A number that every element of a result counts in differently."""
    numbers = torch.arange(result.numel(), dtype=torch.float64).reshape(result.shape)
    return (result * torch.sin(1 + numbers)).sum()


def gradients(run: Callable, model: nn.Module, use: Use) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    result = use(run(IDS))
    if result.requires_grad:
        weighed(result).backward()
    return result.detach(), [value.grad for value in model.parameters()]


def assert_same(run: Callable, model: nn.Module, use: Use, **tolerance: float) -> None:
    (mine, my_gradients), (other, others) = gradients(run, model, use), gradients(model, model, use)
    assert mine.shape == other.shape
    torch.testing.assert_close(mine, other, **tolerance)
    for one, expected in zip(my_gradients, others, strict=True):
        assert (one is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(one, expected, **tolerance)


def unread(run: Callable[[Tensor], LazyLogits]) -> Callable[[Tensor], LazyLogits]:
    """Call a compiled model, having its logits fail where all are computed."""

    def call(ids: Tensor) -> LazyLogits:
        logits = run(ids)
        logits.source.reads = Never()
        return logits

    return call


class Never(Counter[str]):
    """A report's reads, of which there must be none."""

    def __setitem__(self, key: str, value: int) -> None:
        raise AssertionError(f"all logits are read at {key}")


@pytest.mark.parametrize("name", READS)
def test_as_the_models_own_logits(name: str) -> None:
    model, run = built()
    half = {"rtol": 2**-6, "atol": 2**-6} if name == "selective_in_halves" else {"rtol": 1e-9, "atol": 1e-10}
    assert_same(unread(run), model, READS[name], **half)


@pytest.mark.parametrize("name", READS)
def test_no_tensor_of_all_tokens_and_classes(name: str) -> None:
    _, run = built()
    logits = unread(run)(IDS)
    given = {one.untyped_storage().data_ptr() for one in (TEACHER, TEACHER_LOGS, TEACHER_SHARES)}
    kept: list[Tensor] = []
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            result = READS[name](logits)
        weighed(result).backward()
    assert largest.elements <= max(V * H, 4 * V)
    assert max(one.numel() for one in kept if one.untyped_storage().data_ptr() not in given) <= IDS.numel() * H * 2


# Programs of any kind: each step keeps the classes, and an end reduces them.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, y: x * y,
    "sum": lambda x, y: x + 0.5 * y,
    "of_rows": lambda x, y: x * SHARE[..., None],
    "of_classes": lambda x, y: WEIGHT - x,
    "of_both": lambda x, y: torch.where(TEACHER > 0, x, y),
    "softmax": lambda x, y: x.softmax(-1),
    "log_softmax": lambda x, y: F.log_softmax(x, dim=-1),
    "tanh": lambda x, y: x.tanh() * 2.0,
    "clamped": lambda x, y: x.clamp(min=-0.5),
    "compared": lambda x, y: (x > y) * x,
    "masked": lambda x, y: x.masked_fill(~MASK[..., None], 0.5),
    "constant": lambda x, y: x.detach() + y,
    "cumulated": lambda x, y: x.cumsum(-1) / V,
    "of_classes_in_axes": lambda x, y: x * WEIGHT[None, None],
    "of_all_in_axes": lambda x, y: x / torch.full((1, 1, 1), 0.7, dtype=torch.float64),
    "by_number": lambda x, y: x.softmax(2) + y,
    "flat": lambda x, y: flat(x).view(*SHAPE, V),
    "flat_by_number": lambda x, y: (flat(x).cumsum(1) / V).view(*SHAPE, V),
    "flat_of_classes": lambda x, y: (flat(x) + WEIGHT[None]).view(*SHAPE, V),
}
ENDS: dict[str, Use] = {
    "sum": lambda x: x.sum(-1),
    "lse": lambda x: x.logsumexp(dim=2),
    "gather": lambda x: x.gather(-1, torch.stack([LABELS, OTHERS], -1)),
    "all": lambda x: x.square().mean(),
    "norm": lambda x: torch.linalg.vector_norm(x + 0.01, dim=-1),
    "masked": lambda x: x[MASK].mean(-1),
    "part": lambda x: x[1:, 3:].reshape(-1, V).var(-1),
    "product": lambda x: x @ MATRIX,
    "topk": lambda x: x.topk(3, -1).values,
    "flat": lambda x: flat(x).amin(1),
    "of_one": lambda x: x[1, 2].square().sum(0) + x[0, 3].unsqueeze(0).logsumexp(1),
    "of_each": lambda x: torch.stack([one.var(1) for one in x.unbind(1)]),
    "loss": lambda x: F.cross_entropy(flat(x), PADDED.reshape(-1), weight=WEIGHT, label_smoothing=0.2),
}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9)), max_size=5),
    st.sampled_from(sorted(ENDS)),
    st.sampled_from([4, 1000]),
)
@example([("of_classes_in_axes", 0)], "of_each", 1000)
@example([("flat_by_number", 0), ("of_all_in_axes", 0)], "masked", 4)
def test_any_program(steps: list[tuple[str, int]], end: str, rows: int) -> None:
    """Each step takes what the last one gave and some earlier result; so many rows are a chunk."""

    def use(x: Tensor) -> Tensor:
        made = [x]
        for name, other in steps:
            made.append(STEPS[name](made[-1], made[other % len(made)]))
        return ENDS[end](made[-1])

    model, run = built()

    def in_chunks(ids: Tensor) -> LazyLogits:
        logits = unread(run)(ids)
        logits.source.chunk_bytes = rows * ROW
        return logits

    assert_same(in_chunks, model, use, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("frozen", ["head", "inner", "all"])
def test_chunks_of_any_size_and_what_is_frozen(rows: int, frozen: str) -> None:
    model, run = another(rows=rows)
    for name, value in model.named_parameters():
        value.requires_grad_(frozen != "all" and frozen not in name)
    for use in (READS["entropy"], READS["focal_by_hand"], READS["selective"]):
        assert_same(run, model, use, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("head", ["adapted", "in_4_bits", "in_4_bits_adapted"])
def test_heads_of_other_kinds(head: str) -> None:
    """Against the same model with a dense weight."""
    model, _ = another()
    model.float()
    dense = copy.deepcopy(model)
    if head != "adapted":
        model.head, dense.head.weight.data = in_4_bits(model.head)
        dense.head.requires_grad_(False)
    if head != "in_4_bits":
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["head"])
        model, dense = get_peft_model(model, config), get_peft_model(dense, config)
        for one, other in zip(model.parameters(), dense.parameters(), strict=True):
            if one.requires_grad:
                nn.init.normal_(one, std=0.1)
                other.data.copy_(one.data)
    run = unread(lazily(model))
    for name in ("entropy", "selective", "z"):
        (mine, grads), (other, others) = gradients(run, model, READS[name]), gradients(dense, dense, READS[name])
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        for one, expected in zip(grads, others, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def in_4_bits(dense: nn.Linear) -> tuple[nn.Module, Tensor]:
    """A layer in 4 bits of this one's weight, and the weight that it has."""
    made = bitsandbytes.nn.Linear4bit(H, V, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.weight = bitsandbytes.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    made = made.to("cpu")
    made.weight = made.weight.to("cpu")
    return made, bitsandbytes.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)


def test_of_two_models() -> None:
    """A student and its teacher, neither of whose logits is ever there."""
    model, run = another()
    torch.manual_seed(1)
    teacher = Model().double()
    taught = lazily(teacher)
    with torch.no_grad():
        expected = teacher(IDS)
    with torch.no_grad():
        lazy = unread(taught)(IDS)
    for beta in (0.0, 0.3, 1.0):
        mine, others = (
            gradients(one, model, lambda x, by=by, beta=beta: jsd(x, by, beta))
            for one, by in ((unread(run), lazy), (model, expected))
        )
        torch.testing.assert_close(mine, others, rtol=1e-9, atol=1e-10)
    student = run(IDS)
    with Largest() as largest:
        jsd(student, lazy, 0.3).backward()
    assert largest.elements <= max(V * H, 4 * V)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return GKDTrainer.generalized_jsd_loss(student[:, :-1], teacher[:, :-1], PADDED[:, 1:], beta, 0.9)


def test_in_place_where_others_share_the_memory() -> None:
    """A scale in place is read by all views; those that are made of copies keep what they had."""

    def use(x: Tensor) -> Tensor:
        part, copied = x[:, 2:], x.exp()
        x.mul_(0.5)
        return part.logsumexp(-1).sum() + copied.logsumexp(-1).sum() + x.square().sum(-1).sum()

    def alone(x: Tensor) -> Tensor:
        copied, kept = x.exp(), x.double()
        x.mul_(0.5)
        x /= 0.3
        by_rows = copied.sum(-1) + x.softmax(-1).amax(-1) + kept.logsumexp(-1)
        return by_rows + Tripled.apply(x).square().sum(-1) + x.sort(-1).values[..., :3].exp().sum(-1)

    model, run = built()
    for one in (use, alone):
        assert_same(run, model, one, rtol=1e-9, atol=1e-10)


class Tripled(torch.autograd.Function):
    """Takes the tensor itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x * x


def test_a_scale_in_place_of_what_a_function_saved_is_an_error() -> None:
    _, run = built()
    x = run(IDS)
    result = Tripled.apply(x)
    x /= 0.5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("name", ["entropy", "selective_and_entropy", "weighted", "label_smoother", "expected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Each call of the user's under the autocast that it was made under, forward and backward."""
    model, run = another(bias=True)
    model.to(dtype)
    exact = copy.deepcopy(model).double()
    use = AS_SINGLE.get(name, READS[name])
    found = []
    for one, call in ((model, run), (model, model), (exact, exact)):
        one.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=one is model):
            result = use(call(IDS))
        weighed(result).backward()
        found.append([result.detach(), *(value.grad for value in one.parameters())])
    for mine, eager, truth in zip(*found, strict=True):
        assert mine.dtype == eager.dtype
        assert (mine - truth).norm() <= 1.5 * (eager - truth).norm() + 1e-6 * truth.norm()


AS_SINGLE: dict[str, Use] = {
    "weighted": lambda x: F.cross_entropy(flat(x), PADDED.reshape(-1), weight=WEIGHT.to(x.dtype)),
    "expected": lambda x: x.softmax(-1) @ MATRIX.to(x.dtype),
}


def test_twice_differentiated_is_an_error() -> None:
    model, run = built()
    loss = run(IDS).softmax(-1).square().sum()
    (grad,) = torch.autograd.grad(loss, model.inner.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_repeated_backward() -> None:
    model, run = built()

    def use(x: Tensor) -> Tensor:
        loss = entropies(x).sum()
        loss.backward(retain_graph=True)
        return loss * 2

    assert_same(run, model, use, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("late", [False, True], ids=["before_the_loss", "before_backward"])
def test_weights_that_changed_are_an_error(late: bool) -> None:
    model, run = built()
    logits = run(IDS)
    entropy = entropies(logits) if late else None
    with torch.no_grad():
        model.head.weight.mul_(1.0)
    with pytest.raises(RuntimeError, match="read them before the optimizer's step, or compile with"):
        (entropies(logits) if entropy is None else entropy).sum().backward()


class Uncounted(torch.optim.SGD):
    """An optimizer that writes past the version counters."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for value in group["params"]:
                value.data.mul_(1.5)


@pytest.mark.parametrize("changed", ["head", "scale"])
@pytest.mark.parametrize("late", [False, True], ids=["before_the_loss", "before_backward"])
def test_weights_that_an_optimizer_changed_uncounted_are_an_error(changed: str, late: bool) -> None:
    model, run = another()
    scale = nn.Parameter(torch.ones(1, 1, V, dtype=torch.float64))
    logits = run(IDS) * scale
    entropy = entropies(logits) if late else None
    Uncounted([model.inner.weight], lr=1.0).step()
    Uncounted([model.head.weight if changed == "head" else scale], lr=1.0).step()
    with pytest.raises(RuntimeError, match="read them before the optimizer's step, or compile with"):
        (entropies(logits) if entropy is None else entropy).sum().backward()


def test_an_optimizer_of_other_weights_changes_nothing() -> None:
    model, run = another()
    entropy = entropies(run(IDS)).sum()
    (expected,) = torch.autograd.grad(entropies(model(IDS)).sum(), [model.head.weight])
    Uncounted([model.inner.bias], lr=1.0).step()
    entropy.backward()
    torch.testing.assert_close(model.head.weight.grad, expected, rtol=1e-9, atol=1e-10)


def test_results_of_other_rows_are_told() -> None:
    """Where some call gives other rows for a chunk than for all of them, nothing is computed from chunks."""

    def logsumexp(x: Tensor, dim: int) -> Tensor:
        return x.logsumexp(dim)[:, : x.shape[1] if len(x) == SHAPE[0] else 1]

    program = built()[1](IDS).source.program
    assert reduced(Call(torch.logsumexp, (program, -1), {}, 4 * ROW)) is not None
    assert reduced(Call(logsumexp, (program, -1), {}, 4 * ROW)) is None


def test_small_operands_may_change() -> None:
    """Each call has them as they were then."""

    def use(x: Tensor) -> Tensor:
        suppressed, scale, found = torch.zeros(V, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64), []
        for place in range(3):
            suppressed[place] = -1e4
            scale.mul_(0.7)
            found.append((x + suppressed - scale).view(-1, V).logsumexp(-1))
        return torch.cat(found)

    model, run = built()
    assert_same(unread(run), model, use, rtol=1e-9, atol=1e-10)


def test_operands_that_changed_are_an_error() -> None:
    _, run = built()
    scale = torch.ones(*SHAPE, V, dtype=torch.float64)
    scaled = run(IDS) * scale
    scale.zero_()
    with pytest.raises(RuntimeError, match="what they are made of has changed"):
        scaled.sum(-1)


def test_small_ones_without_gradients_are_read_once() -> None:
    """Where all logits are one chunk and no gradient is wanted, nothing is computed twice."""
    model, run = another(rows=1000)
    with torch.no_grad():
        logits = run(IDS)
        before = logits.source.reads.total()
        assert torch.equal(logits.argmax(-1), model(IDS).argmax(-1))
        torch.testing.assert_close(logits.softmax(-1).amax(-1), model(IDS).softmax(-1).amax(-1))
    assert logits.source.reads.total() == before + 1


def test_a_long_program_takes_no_longer_than_its_calls() -> None:
    def use(x: Tensor) -> Tensor:
        for _ in range(40):
            x = (x + x) / 2.0
        return x.logsumexp(-1)

    model, run = built()
    assert_same(unread(run), model, use, rtol=1e-9, atol=1e-10)


def test_no_rows() -> None:
    model, run = built()
    none = torch.zeros(SHAPE, dtype=torch.bool)
    assert_same(run, model, lambda x: x[none].exp().logsumexp(-1), rtol=0, atol=0)


def test_errors_are_those_of_the_call() -> None:
    _, run = built()
    logits = run(IDS)
    with pytest.raises(RuntimeError, match="size of tensor"):
        logits * torch.ones(V + 1)
    with pytest.raises(IndexError, match="Dimension out of range"):
        logits.logsumexp(5)


def kl_terms(x: Tensor) -> Tensor:
    return F.kl_div(x.log_softmax(-1), TEACHER_LOGS, reduction="none", log_target=True)


WHOLE: dict[str, Use] = {
    "over_tokens": lambda x: x.softmax(1).square().sum(1) + x.sum(0).amax(0),
    "over_sequences": lambda x: flat(x).softmax(0).view(*SHAPE, V)[1] * x.logsumexp(0),
    "largest_of_all": lambda x: x.max(),
    "stacked_otherwise": lambda x: torch.stack([x, 2 * x], 1).logsumexp(1).sum(-1),
    "joined": lambda x: torch.cat([x, x * 2], 1).softmax(-1).amax(-1),
    "turned": lambda x: x.transpose(1, 2).softmax(1).square().sum(1),
    "sorted": lambda x: x.exp().sort(-1).values[..., :3],
    "a_larger_operand": lambda x: (x[0] * torch.stack([TEACHER[0], TEACHER[1]])).sum(-1),
    "a_weight_of_each_row": lambda x: torch.bmm(x, TEACHER.transpose(1, 2)),
    "classes_of_each": lambda x: x[:, torch.arange(14), LABELS[0]],
    "weighted_distances": lambda x: F.l1_loss(x, TEACHER, weight=TEACHER_SHARES),
    "weighted_squares": lambda x: F.mse_loss(TEACHER, x, weight=TEACHER_SHARES),
    "weights": lambda x: F.mse_loss(TEACHER, TEACHER_SHARES, weight=x.exp()),
    "vmapped": lambda x: torch.vmap(lambda one: one.logsumexp(-1))(x),
    "stacked_as_many": lambda x: torch.stack([x, TEACHER, 2 * x], 1).mean(0).sum(-1),
    "each_of_a_stack": lambda x: sum(one.logsumexp(-1) for one in torch.stack([x, 2 * x])),
    "parts_of_a_stack": lambda x: torch.cat([one.amax(-1) for one in torch.stack([x, 2 * x]).chunk(2)]),
    "each_of_a_divergence": lambda x: torch.stack([one.sum() for one in kl_terms(x)]),
    "parts_of_a_divergence": lambda x: torch.stack([one.sum() for one in kl_terms(x).split(5, 1)]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_needs_all_of_them_is_right_and_told(name: str) -> None:
    model, run = built()
    seen: list[LazyLogits] = []

    def told(ids: Tensor) -> LazyLogits:
        seen.append(run(ids))
        seen[0].source.reads = Counter()
        return seen[0]

    assert_same(told, model, WHOLE[name], rtol=1e-9, atol=1e-10)
    assert all("test_row_programs.py" in line for line in seen[0].source.reads)
    assert seen[0].source.reads.total() >= 1
