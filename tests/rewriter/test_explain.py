"""explain tells what happens, and changes nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft.patterns import rms_norm
from fastft.rewriter import explain
from fastft.rewriter.pattern import capture


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
    model = Model(layers=1)
    counts = [len(fastft.explain(model, torch.randn(2, 5, 16)).lifted) for _ in range(20)]
    assert counts == [1] * 20


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
    from fastft.rewriter.report import GraphReport, Lifted, Report

    report = Report([GraphReport(lifted=[Lifted("rule", "layers.<b>[bold]", "file.py:1")])])
    path = tmp_path / "report.html"
    report.save(path)
    page = path.read_text()
    assert "<b>[bold]" not in page
    assert "&lt;b&gt;[bold]" in page
    assert page == report._repr_html_()


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
    for _ in range(10):
        assert len(fastft.explain(model, x).graphs) == 2
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend="fastft", options={"lower": "eager"})(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
