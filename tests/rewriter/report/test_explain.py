"""explain tells what happens, and changes nothing."""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from training.setting import LAYERS, adapter, base, batch

import fastft
from fastft.patterns import rms_norm
from fastft.reasons import Reason, with_prefix
from fastft.rewriter import explain
from fastft.rewriter.matching.pattern import capture
from fastft.rewriter.report.advice import ADVICE, advice, with_advice
from fastft.rewriter.report.graph_listing import Line


class Model(nn.Module):
    """Layers with a norm each, a buffer that forward changes, dropout, and a last norm over the wrong axis."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.weights = nn.ParameterList(torch.ones(16) for _ in range(layers))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer, weight in zip(self.layers, self.weights, strict=True):
            x = x + nn.functional.dropout(layer(rms_norm.llama(x, weight, 1e-6)), 0.5, self.training)
        return self.weights[0] * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))


class Restless(nn.Module):
    """Changes its buffers in every way, without a version to tell by, and goes on in place after a break."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.linear = nn.Linear(16, 16)
        self.register_buffer("rebound", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.rebound = self.rebound + 1
        self.hidden.data.add_(1)
        y = self.linear(self.norm(x))
        print("halfway")
        y += x
        return y


class Breaking(nn.Module):
    """Prints halfway."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        print("halfway")
        return x + 1


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_it_lists_matches_near_misses_and_lines() -> None:
    report = fastft.explain(Model(), torch.randn(2, 5, 16))
    assert [one.rule for one in report.lifted] == ["rms_norm.llama"] * 3
    assert len(report.graphs) == 1
    assert report.breaks == []
    (miss,) = report.near_misses
    assert miss.reason.startswith("expected mean(pow(…), -1, True), found mean(")
    path, _, line = miss.source.rpartition(":")
    assert path == __file__
    assert "rsqrt" in Path(path).read_text().splitlines()[int(line) - 1]
    text = str(report)
    for part in ("1 graph, 0 breaks", "3 lifted, 1 near miss", "rms_norm.llama", "test_explain.py:", "3 linear"):
        assert part in text


def test_minus_a_loss_is_no_near_miss_of_a_rotation() -> None:
    """Rotary rules begin with minus a half of each head; a scalar has no halves."""

    class Scored(Model):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x).sum()

    report = fastft.explain(Scored(), torch.randn(2, 5, 16))
    assert [miss.rule.split(".")[0] for miss in report.near_misses] == ["rms_norm"]


def test_a_break_is_shown_with_the_users_line() -> None:
    report = fastft.explain(Breaking(), torch.randn(2, 5, 16))
    ((reason, where),) = report.breaks
    assert "print" in reason
    path, _, line = where.rpartition(":")
    assert path == __file__
    assert 'print("halfway")' in Path(path).read_text().splitlines()[int(line) - 1]
    assert len(report.lifted) == 3


def test_nothing_in_the_model_changes() -> None:
    model = Model().train()
    x = torch.randn(2, 5, 16, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, keys = torch.get_rng_state(), set(vars(model))
    fastft.explain(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert set(vars(model)) == keys
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_activation_is_kept() -> None:
    weight, x = torch.ones(16, requires_grad=True), torch.randn(2, 5, 16)
    gm = capture(lambda x, weight: (rms_norm.llama(x, weight, 1e-6), x + 1), x, weight)
    y, z = explain._without_activations(gm)(x, weight)
    assert y.requires_grad
    assert isinstance(y.grad_fn, explain._Grown._backward_cls)  # of the tensor itself, not of what computed it
    assert next(function for function, _ in y.grad_fn.next_functions if function is not None).variable.numel() == 0
    assert not z.requires_grad


def test_a_model_without_memory_can_be_explained() -> None:
    with torch.device("meta"):
        model = Model(layers=12)
        report = fastft.explain(model, torch.empty(2, 5, 16))
    assert len(report.lifted) == 12


def test_it_can_be_asked_often() -> None:
    model, often = Model(layers=1), torch._dynamo.config.recompile_limit + 2
    counts = [len(fastft.explain(model, torch.randn(2, 5, 16)).lifted) for _ in range(often)]
    assert counts == [1] * often


def test_a_compiled_model_is_not_recompiled_by_it() -> None:
    model = Model(layers=1).eval()
    compiled = torch.compile(model, backend="fastft", options={"lower": "eager"})
    x = torch.randn(2, 5, 16)
    compiled(x)
    fastft.explain(model, x)
    torch._dynamo.utils.counters.clear()
    compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_html_escapes_names(tmp_path: Path) -> None:
    from fastft.rewriter.report.data import GraphReport, Lifted, NearMiss, Region
    from fastft.rewriter.report.report import Report

    evil = "layers.<b>[bold]"
    graph = GraphReport(
        lifted=[Lifted(f"rule {evil}", evil, "file.py:1")], near_misses=[NearMiss("rule", evil, evil, f"print {evil}")],
        regions=[Region(evil, 2, 3)], before=[Line(evil, evil, evil)], after=[Line(evil, f"fastft.{evil}", evil)],
        failure=evil, reason=evil, whole=evil, deferred=[evil], place=evil, seconds=1.0, left=Counter([evil]),
    )  # fmt: skip
    report = Report([graph], [(evil, evil)], evil)
    path = tmp_path / "report.html"
    report.save(path)
    page = path.read_text()
    assert "<b>[bold]" not in page
    assert page.count("&lt;b&gt;[bold]") >= 15
    assert page == report._repr_html_()


def test_a_model_with_adapters_can_be_explained_without_memory() -> None:
    reports = []
    for device in ("meta", "cpu"):
        torch._dynamo.reset()
        with torch.device(device):
            model, ids = get_peft_model(base(layers=1), adapter()).train(), torch.zeros(2, 24, dtype=torch.long)
            reports.append(fastft.explain(model, input_ids=ids, labels=ids, use_cache=False))
    counts = [Counter(one.rule for one in (*report.lifted, *report.fused)) for report in reports]
    assert counts[0] == counts[1]
    assert counts[0]["lora_linear.group"] == 4
    assert not reports[0].near_misses


def test_the_page_shows_layers_before_and_after_memory_and_kernels(tmp_path: Path) -> None:
    ids = torch.zeros(2, 24, dtype=torch.long)
    report = fastft.explain(base().train(), input_ids=ids, labels=ids)
    (graph,) = report.graphs
    assert sum(line.call == "fastft.attention" for line in graph.after) == LAYERS
    assert not any(line.ours for line in graph.before)
    assert graph.plan is not None
    assert graph.plan.peak_bytes > 0
    page = report._repr_html_()
    for part in (
        "Matches by layer",
        "rms_norm.llama",
        "<summary><code>model.layers.0</code> (3 of its kind)",
        "data:image/png;base64,",
    ):
        assert part in page
    for part in ("fastft::attention", "attention_backward", "plain PyTorch, on cpu", ">fastft.rms_norm"):
        assert part in page
    addresses = re.findall(r'(?:src|href)="([^"]{0,10})', page)
    assert set(addresses) == {"data:image"}  # nothing is fetched


def test_a_failure_in_fastft_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(gm: torch.fx.GraphModule, **_: object) -> None:
        raise RuntimeError("forced")

    monkeypatch.setattr("fastft.rewriter.explain.rewrite", failing)
    report = fastft.explain(Model(), torch.randn(2, 5, 16))
    assert [graph.failure for graph in report.graphs] == ["RuntimeError: forced"]
    assert "RuntimeError: forced" in str(report)


def test_buffers_are_put_back_however_they_change() -> None:
    model = Restless()
    objects = dict(model.named_buffers())
    before = {name: value.clone() for name, value in objects.items()}
    report = fastft.explain(model.forward, torch.randn(5, 16))
    assert (len(report.graphs), report.stopped_by) == (2, "")
    for name, value in model.named_buffers():
        assert value is objects[name]
        assert torch.equal(value, before[name])


def test_an_error_after_some_graphs_is_reported() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            print("halfway")
            raise KeyError("no such expert")

    report = fastft.explain(Failing(), torch.randn(5))
    assert len(report.graphs) == 1
    assert "no such expert" in str(report)
    with pytest.raises(TypeError):
        fastft.explain(Failing())


def test_a_model_with_breaks_can_be_asked_often_and_compiled_afterwards() -> None:
    model, x = Breaking(), torch.randn(2, 5, 16)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert len(fastft.explain(model, x).graphs) == 2
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend="fastft", options={"lower": "eager"})(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class Printing(nn.Module):
    """Prints, takes a number from the device, or reads the logits besides the loss."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.model, self.what = base(layers=1), what

    def forward(self, **each: Any) -> Tensor:
        out = self.model(**each)
        if self.what == "print":
            print("a step")
        if self.what == "item" and out.loss.item() > 0:
            return out.loss * 2
        return out.loss + out.logits.softmax(-1).sum() if self.what == "logits" else out.loss


def with_hook() -> nn.Module:
    model, kept = base(layers=1), []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, result: kept.append(result))
    return model


def in_double() -> nn.Module:
    return base(layers=1).double()


def with_requires_grad() -> nn.Module:
    """As enable_input_require_grads() has it, seen at once by every version of torch."""

    class Model(nn.Module):
        def forward(self, **_: Any) -> Tensor:
            x = torch.ones(3) + 1
            x.requires_grad_()
            print("halfway")
            return x.sum()

    return Model()


def lora(**more: Any) -> nn.Module:
    return get_peft_model(base(layers=1), adapter(target_modules=["q_proj"], **more))


@pytest.mark.parametrize(
    ("make", "advised"),
    [
        (lambda: Printing("print"), "torch.compiler.is_compiling"),
        (lambda: Printing("item"), "keep the number on the device"),
        (lambda: Printing("logits"), "use the logits for the loss alone"),
        (with_hook, "take hooks that keep what a module computes off it"),
        (lambda: lora(use_dora=True, lora_dropout=0.1), "lora_dropout=0 in LoraConfig"),
        (in_double, "train in float32 or less"),
        (with_requires_grad, "leave gradient_checkpointing off"),
    ],
)
def test_it_says_what_to_change(make: Any, advised: str) -> None:
    torch._dynamo.reset()
    report = fastft.explain(make().train(), **batch(0))
    reasons = [miss.reason for miss in report.near_misses] + [why for why, _ in report.breaks]
    assert any(advised in advice(reason) for reason in reasons), reasons
    for page in (str(report), report._repr_html_()):
        assert advised.split()[0] in page
        assert "→" in page


def test_a_mask_that_is_given_whole_says_what_to_change() -> None:
    each = batch(0) | {"attention_mask": torch.rand(2, 1, 24, 24)}
    report = fastft.explain(base(layers=1).train(), **each)
    assert all("attention_mask with two axes" in advice(mask.rule) for mask in report.masks)


def test_every_code_has_advice() -> None:
    """And every advice a reason that asks for it."""
    root, codes = Path(__file__).parents[3], set()
    for path in (path for folder in ("rewriter", "patterns", "kernels") for path in (root / folder).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") in ("Reason", "Declined") and len(call.args) == 2:
                codes.add(getattr(call.args[1], "value", None))
    assert codes == set(ADVICE)


def test_a_reason_keeps_its_code_behind_other_words() -> None:
    reason = with_prefix("dense: ", Reason("it is data", "mask.data"))
    assert reason == "dense: it is data"
    assert with_advice(reason).startswith("dense: it is data\n→ pass the attention_mask")
    assert advice(with_prefix("dense: ", "whatever")) == ""


@pytest.mark.parametrize(
    ("reason", "advised"),
    [
        ("tensor 'x' size mismatch at index 1. expected 13, actual 26", "pad_to_multiple_of"),
        ("whatever else", ""),
    ],
)
def test_advice_on_what_dynamo_says(reason: str, advised: str) -> None:
    assert advised in advice(reason)
    assert bool(advised) == bool(advice(reason))
