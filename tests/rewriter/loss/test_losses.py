"""Heads and their losses in one graph: what is lifted, by which name, with which gradients, and what is left alone."""

import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from compare import FORWARD, GRADIENT, assert_close_to_truth
from lifting import Capture, compiled, ops, reasons
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastft
from fastft.rewriter.runtime.lazy_logits import LazyLogits

V, H = 131, 64
IDS, LABELS = (torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
LABELS[1, 4:] = -100
TEACHER = torch.randn(2, 9, V, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
FEW = 3 * 192 * 4  # bytes of three rows of logits


captured = functools.partial(compiled, lazy=True, logits_memory=FEW)


class Model(nn.Module):
    """An embedding, something to learn, a head, and what is done with its logits."""

    def __init__(self, loss: Callable[..., Any], bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=bias)
        self.loss = loss
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head(torch.tanh(self.inner(self.embedding(ids)))), labels)


def flat(logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), **more)


def causal(logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    """As transformers' ForCausalLMLoss."""
    logits = logits.float()
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    loss = F.cross_entropy(
        logits.view(-1, V), shifted.to(logits.device), ignore_index=-100, reduction="mean" if items is None else "sum"
    )
    return loss if items is None else loss / items


def capped(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits / 5.0
    return causal(torch.tanh(logits) * 5.0, labels)


def distances(logits: Tensor, labels: Tensor) -> Tensor:
    """Of a policy's log-probabilities, as DPO sums them."""
    log_p = torch.gather(logits[:, :-1].log_softmax(-1), dim=2, index=labels[:, 1:].clamp_min(0).unsqueeze(2)).squeeze(
        2
    )
    return (log_p * (labels[:, 1:] != -100)).sum(-1).sigmoid().sum()


def distilled(logits: Tensor, **more: Any) -> Tensor:
    """At a temperature of 2, from what a teacher left."""
    return F.kl_div((logits / 2.0).log_softmax(-1), TEACHER.to(logits.dtype), log_target=True, **more) * 4.0


def by_token(logits: Tensor) -> Tensor:
    target = TEACHER.to(logits.dtype)
    return F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(dim=-1)


LOSSES: dict[str, tuple[Callable, str]] = {
    "causal": (causal, "cross_entropy"),
    "items": (lambda x, y: causal(x, y, torch.tensor(7)), "cross_entropy"),
    "items_as_int": (lambda x, y: causal(x, y, 7), "cross_entropy"),
    "capped": (capped, "cross_entropy"),
    "scaled": (lambda x, y: causal(x * 0.25, y), "cross_entropy"),
    "plain": (flat, "cross_entropy"),
    "smoothed": (lambda x, y: flat(x, y, label_smoothing=0.1), "cross_entropy"),
    "sum": (lambda x, y: flat(x, y, reduction="sum"), "cross_entropy"),
    "none": (lambda x, y: (flat(x, y, reduction="none") * torch.arange(18)).sum(), "cross_entropy"),
    "classes_second": (lambda x, y: F.cross_entropy(x.transpose(1, 2), y), "cross_entropy"),
    "sliced": (
        lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, V).float(), y[:, 1:].reshape(-1)), "cross_entropy",
    ),
    "module": (lambda x, y: nn.CrossEntropyLoss()(x.flatten(0, 1), y.flatten()), "cross_entropy"),
    "nll": (lambda x, y: F.nll_loss(F.log_softmax(x, -1).view(-1, V), y.view(-1)), "nll_loss"),
    "distances": (distances, "log_probability"),
    "distilled": (lambda x, y: distilled(x, reduction="batchmean"), "kl_div"),
    "distilled_mean": (lambda x, y: distilled(x, reduction="mean"), "kl_div"),
    "distilled_by_token": (lambda x, y: (by_token(x) * (y != -100)).sum() / 7, "kl_div"),
    "nll_classes_second": (lambda x, y: F.nll_loss(x.log_softmax(-1).transpose(1, 2), y), "nll_loss"),
}  # fmt: skip
NOT_LIFTED: dict[str, tuple[Callable, str]] = {
    "argmax": (lambda x, y: flat(x, y) + (x.argmax(-1) == y).float().mean(), "its logits are also used by argmax"),
    "weights": (
        lambda x, y: flat(x, y, weight=torch.ones(V, dtype=x.dtype)) + flat(x, y),
        "also used by cross_entropy",
    ),
    "changed": (lambda x, y: flat(x.clone().exp_(), y) + flat(x, y), "also used by exp_"),
    "penalty": (lambda x, y: flat(x, y) + 1e-3 * x.logsumexp(-1).square().mean(), "also used by logsumexp"),
}


def step(model: nn.Module, run: Callable, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model.zero_grad()
    loss = run(IDS, LABELS)
    loss.backward()
    return [loss.detach(), *(one.grad.clone() for one in model.parameters() if one.requires_grad)]


def assert_right(model: nn.Module, run: Callable) -> None:
    """Loss and gradients as near to float64's as eager's."""
    mine, eager = step(model, run), step(model, model)
    exact = step(model.double(), model)
    model.float()
    for at, (one, other, truth) in enumerate(zip(mine, eager, exact, strict=True)):
        assert_close_to_truth(one, other, truth.double(), GRADIENT if at else FORWARD, magnitude=1.0)


@pytest.mark.parametrize("trained", ["all", "tied", "bias", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_lifted(name: str, trained: str) -> None:
    loss, rule = LOSSES[name]
    model = Model(loss, bias=trained == "bias", tied=trained == "tied")
    if trained == "frozen":
        model.head.requires_grad_(False)
    captures: list[Capture] = []
    assert_right(model, captured(model, captures, lazy=False))
    ((gm, report),) = captures
    assert ops(gm) == ["linear_kl_div" if rule == "kl_div" else "linear_cross_entropy"]
    assert [one.rule for one in report.lifted] == [f"linear_cross_entropy.{rule}"]
    assert [one.module for one in report.lifted] == [""]
    assert not report.near_misses


@pytest.mark.parametrize("name", NOT_LIFTED)
def test_what_needs_the_logits_is_left_alone(name: str) -> None:
    loss, reason = NOT_LIFTED[name]
    model, captures = Model(loss), []
    assert_right(model, captured(model, captures))
    ((gm, report),) = captures
    assert ops(gm) == []
    assert reason in reasons(report)[0]
    assert "test_losses.py" in reasons(report)[0]


def test_a_graph_without_a_loss_of_its_vocabulary_is_untouched() -> None:
    """A classifier of many classes, a wide layer, an encoder."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.wide = nn.Linear(H, H), nn.Linear(H, 3 * H)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.inner(x))

    captures: list[Capture] = []
    captured(Classifier(), captures)(torch.randn(2, 5, H))
    ((gm, report),) = captures
    assert not report.lifted
    assert not report.deferred
    assert not report.near_misses
    assert ops(gm) == []


@pytest.mark.parametrize("spelling", ["T", "t", "transpose", "mT"])
def test_products_with_the_table_itself(spelling: str) -> None:
    """hidden @ weight.T, as models written by hand have it."""
    turned = {
        "T": lambda w: w.T, "t": lambda w: w.t(), "transpose": lambda w: w.transpose(0, 1), "mT": lambda w: w.mT
    }[spelling]  # fmt: skip

    class Tied(Model):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return causal(torch.tanh(self.inner(self.embedding(ids))) @ turned(self.embedding.weight), labels)

    model, captures = Tied(causal), []
    model.head = None
    assert_right(model, captured(model, captures))
    assert ops(captures[0][0]) == ["linear_cross_entropy"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapter_on_the_head(dropout: float) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["head", "inner"], lora_dropout=dropout)
    model = get_peft_model(Model(causal), config)
    for name, one in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(one, std=0.1)
    captures: list[Capture] = []
    run = captured(model, captures)
    if dropout:
        run(IDS, LABELS)  # with its own mask; the head stays as it is
        assert ops(captures[0][0]) == ["lora_linear", "lora_linear"]
        return
    assert_right(model, run)
    assert ops(captures[0][0]) == ["lora_linear", "linear_cross_entropy"]


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "with_an_adapter"])
def test_a_head_in_4_bits(adapted: bool) -> None:
    """Against the same model with its weight de-quantised."""
    model = Model(causal)
    head = bitsandbytes.nn.Linear4bit(H, V, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.weight = bitsandbytes.nn.Params4bit(model.head.weight.data, requires_grad=False, quant_type="nf4")
    model.head = head.to("cpu")
    model.head.weight = model.head.weight.to("cpu")
    dense = Model(causal)
    dense.head.weight.data.copy_(bitsandbytes.functional.dequantize_4bit(head.weight.data, head.weight.quant_state))
    dense.head.requires_grad_(False)
    if adapted:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["head"])
        model, dense = get_peft_model(model, config), get_peft_model(dense, config)
        for one, other in zip(model.parameters(), dense.parameters(), strict=True):
            if one.requires_grad:
                nn.init.normal_(one, std=0.1)
                other.data.copy_(one.data)
    captures: list[Capture] = []
    mine, other = step(model, captured(model, captures)), step(dense, dense)
    made = ["dequantize_4bit", "linear_cross_entropy"]
    assert ops(captures[0][0]) == made
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["around", "inside", "logits_only"])
def test_autocast(where: str) -> None:
    """Around the call, in the graph as accelerate puts it, or around the model but not its loss."""

    class Cast(Model):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            if where == "around":
                return super().forward(ids, labels)
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.head(torch.tanh(self.inner(self.embedding(ids))))
                loss = self.loss(logits, labels)
            return self.loss(logits, labels) if where == "logits_only" else loss

    model, captures = Cast(causal, bias=True), []
    run = captured(model, captures)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        found = [step(model, one) for one in (run, model)]
    assert set(ops(captures[0][0])) == {"linear_cross_entropy"}
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= 2**-6 * other.norm()


def test_logits_beside_the_loss_are_left_to_their_reader() -> None:
    class Both(Model):
        def forward(self, ids: Tensor, labels: Tensor) -> Any:
            logits = self.head(torch.tanh(self.inner(self.embedding(ids)))) * 0.5
            return causal(logits, labels), logits

    model, captures = Both(causal, bias=True), []
    run = captured(model, captures)
    for use in (lambda loss, logits: loss, lambda loss, logits: loss + logits.square().mean()):
        found = []
        for one in (run, model):
            model.zero_grad()
            loss = use(*one(IDS, LABELS))
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert type(run(IDS, LABELS)[1]) is LazyLogits
    assert captures[0][1].deferred == ["head"]


def test_without_laziness_logits_that_are_returned_keep_their_loss() -> None:
    model, captures = Model(lambda x, y: (flat(x, y), x)), []
    loss, logits = captured(model, captures, lazy=False)(IDS, LABELS)
    assert type(logits) is Tensor
    assert reasons(captures[0][1]) == ["its logits are an output"]
    torch.testing.assert_close(loss, model(IDS, LABELS)[0])


def test_any_length_by_one_graph() -> None:
    model, captures = Model(causal), []
    run = captured(model, captures)
    for length in (9, 5, 7, 3, 2):
        ids, labels = IDS[:, :length], LABELS[:, :length]
        torch.testing.assert_close(run(ids, labels), model(ids, labels))
    assert [ops(gm) for gm, _ in captures] == [["linear_cross_entropy"]] * 2


def test_a_compiled_train_step() -> None:
    """The loss outside the model and its backward inside what is compiled."""
    model, twin = Model(lambda x, _: x), Model(lambda x, _: x)
    captures: list[Capture] = []

    def train(one: nn.Module) -> Tensor:
        loss = F.cross_entropy(one(IDS, LABELS).view(-1, V), LABELS.view(-1))
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(captured(lambda: train(model), captures)(), train(twin))
    assert any("linear_cross_entropy" in ops(gm) for gm, _ in captures)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("logits_memory", ["1B", "2KiB", 2**20])
def test_memory_is_what_the_option_says(logits_memory: str | int) -> None:
    model = Model(causal)
    run = torch.compile(
        model, backend="fastft", options={"lower": "eager", "strict": True, "logits_memory": logits_memory}
    )
    torch._dynamo.reset()
    torch.testing.assert_close(run(IDS, LABELS), model(IDS, LABELS))


@pytest.mark.parametrize("wrong", ["much", "-1GiB", "0B", 0, 1.5, True, "12"])
def test_what_is_no_number_of_bytes(wrong: Any) -> None:
    with pytest.raises(fastft.OptionsError, match="'logits_memory' is a number of bytes such as '256MiB'"):
        fastft.Options(logits_memory=wrong)
