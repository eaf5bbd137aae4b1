"""fastft.compilations() tells what was compiled and why, and keeps nothing alive."""

import gc
import weakref
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft.compat import dynamo
from fastft.patterns import rms_norm
from fastft.rewriter import backend
from fastft.rewriter.report import history
from fastft.rewriter.report.data import GraphReport, Region
from fastft.rewriter.report.report import Report

EAGER = {"lower": "eager"}


class Layer(nn.Module):
    """A norm and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(rms_norm.llama(x, self.weight, 1e-6))


class Stack(nn.Module):
    """Layers, and what is before and after them."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale  # from here on all need gradients, or the first layer would be of another kind
        for layer in self.layers:
            x = layer(x)
        return x.sum()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    backend._warned.clear()
    monkeypatch.setattr(history, "_graphs", deque(maxlen=history.LIMIT))


def run(model: nn.Module, *sizes: tuple[int, ...], options: dict | None = None) -> list[GraphReport]:
    compiled = torch.compile(model, backend="fastft", options=options or {**EAGER, "strict": True})
    for size in sizes:
        compiled(torch.randn(*size))
    return fastft.compilations().graphs


def test_nothing_compiled_yet() -> None:
    assert fastft.compilations() == Report()
    assert "0 graphs" in str(fastft.compilations())


def test_a_graph_and_its_regions() -> None:
    (graph,) = run(Stack(), (2, 3, 16))
    assert [(region.module, region.calls) for region in graph.regions] == [("", 1), ("layers.0", 5), ("", 1)]
    assert (graph.reason, graph.whole, graph.failure) == ("", "", "")
    assert graph.dynamic == ["x.size(0)", "x.size(1)"]  # from the start
    assert 0 < sum(region.seconds for region in graph.regions) < graph.seconds
    forward = Stack.forward.__code__
    assert graph.place == f"Stack.forward ({__file__}:{forward.co_firstlineno})"
    assert len(graph.lifted) == 5


def test_why_it_was_compiled_again() -> None:
    _, again = run(Stack(), (1, 3, 16), (2, 5, 16), (4, 7, 16))  # 1 is a size that Dynamo always compiles for apart
    assert again.reason == "tensor 'x' size mismatch at index 0. expected 1, actual 2"
    assert again.dynamic == ["x.size(0)", "x.size(1)"]
    text = str(fastft.compilations())
    tables = ("Compiled again", "Regions, each compiled once")
    for part in ("2 graphs compiled in", *tables, again.reason, "layers.0", "×5"):
        assert part in text
    assert "(the rest)" in text


def test_a_reason_that_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise AttributeError("no such part")

    monkeypatch.setattr(dynamo, "recompile_reason", missing)
    monkeypatch.setattr(dynamo, "current_code", missing)
    (graph,) = run(Stack(), (2, 3, 16))
    assert (graph.reason, graph.place) == ("unknown", "")


def test_a_graph_compiled_whole_says_why() -> None:
    (graph,) = run(Layer(), (2, 3, 16))
    assert (graph.regions, graph.whole) == ([], "nothing in it repeats")
    torch._dynamo.reset()
    *_, graph = run(Stack(), (2, 3, 16), options={**EAGER, "outline": False})
    assert (graph.regions, graph.whole) == ([], "outline=False")
    assert "nothing in it repeats" in str(fastft.compilations())


def test_explain_shows_regions_without_seconds_and_records_nothing() -> None:
    text = str(fastft.explain(Stack(), torch.randn(2, 3, 16)))
    assert "layers.0" in text
    assert "×5" in text
    assert "seconds" not in text
    assert "Compiled whole" in str(fastft.explain(Layer(), torch.randn(2, 3, 16)))
    assert fastft.compilations().graphs == []


def test_a_fallback_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(gm: torch.fx.GraphModule, **_: bool) -> None:
        raise RuntimeError("forced")

    monkeypatch.setattr(backend, "rewrite", failing)
    with pytest.warns(RuntimeWarning, match="forced"):
        (graph,) = run(Stack(), (2, 3, 16), options=EAGER)
    assert graph.failure == "RuntimeError: forced"
    assert graph.seconds > 0
    assert "forced" in str(fastft.compilations())


def test_nothing_is_kept_alive() -> None:
    model, x = Stack(), torch.randn(2, 3, 16)
    compiled = torch.compile(model, backend="fastft", options=EAGER)
    compiled(x)
    alive = [weakref.ref(model), weakref.ref(model.layers[0].weight), weakref.ref(x)]
    torch._dynamo.reset()
    del model, x, compiled
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert len(fastft.compilations().graphs) == 1


def test_it_is_bounded() -> None:
    for number in range(history.LIMIT + 10):
        history._graphs.append(GraphReport(nodes_before=number))
    graphs = fastft.compilations().graphs
    assert (len(graphs), graphs[-1].nodes_before) == (256, 265)


def test_a_report_stays_as_it_was() -> None:
    before = fastft.compilations()
    run(Layer(), (2, 3, 16))
    assert before.graphs == []


def test_html_escapes_reasons(tmp_path: Path) -> None:
    graph = GraphReport(place="<b>", reason="[bold]a < b", seconds=1.0, regions=[Region("layers.<i>", 2, 3, 1.0)])
    Report([graph]).save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "[bold]a &lt; b" in page
    assert "layers.&lt;i&gt;" in page
    assert "<i>" not in page


@pytest.mark.slow
def test_hits_and_misses_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        compiled: Callable = torch.compile(Layer(), backend="fastft", options={"strict": True})
        compiled(torch.randn(2, 3, 16)).sum().backward()  # what has no backward yet is not stored
        found.append(+fastft.compilations().graphs[-1].cache)
    assert found == [Counter(miss=1), Counter(hit=1)]
    assert "1 hit" in str(fastft.compilations())
