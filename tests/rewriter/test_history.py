"""What a graph becomes depends on the graph, its model and the options; not on what the process did before."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastft import source_digest
from fastft.rewriter.memory import device_budget, optimizer_state
from fastft.rewriter.memory.partitioner import Partitioner
from fastft.rewriter.report.history import recorded
from fastft.rewriter.runtime.lazy_logits import LazyLogits

OPTIONS = {"lower": "eager", "strict": True}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)


def compiled(what: Any) -> Any:
    return torch.compile(what, backend="fastft", options=OPTIONS)


class Broken(nn.Module):
    """Its graph breaks between the lookup and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(100, 16), nn.Linear(16, 100, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        torch._dynamo.graph_break()
        return self.head(torch.tanh(x))


def test_a_wide_layer_is_no_head_because_of_another_model() -> None:
    """A product with 100 results is a head where its own model has an embedding of 100 tokens."""
    kinds = []
    for _ in range(2):
        torch.compiler.reset()
        kinds.append(type(compiled(nn.Linear(16, 100))(torch.randn(3, 16))))
        compiled(nn.Embedding(100, 8))(torch.tensor([1, 2]))
    assert kinds == [Tensor, Tensor]


def test_a_head_behind_a_graph_break_is_known_by_its_own_model() -> None:
    model, ids = Broken(), torch.randint(100, (2, 5))
    logits = compiled(model)(ids)
    assert isinstance(logits, LazyLogits)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    actual = model.head.weight.grad
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    torch.testing.assert_close(actual, model.head.weight.grad)


def test_reports_are_the_same_in_any_order() -> None:
    models = [Broken, lambda: nn.Sequential(nn.Embedding(100, 16), nn.RMSNorm(16), nn.Linear(16, 100, bias=False))]
    models.append(lambda: nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 100), nn.SiLU(), nn.Linear(100, 7)))

    def reports(order: list[int]) -> list[tuple]:
        found: dict[int, Any] = {}
        for at in order:
            torch.compiler.reset()
            with recorded() as graphs:
                compiled(models[at]())(torch.tensor([[1, 2, 3]]))
            found[at] = [(graph.lifted, graph.near_misses, graph.deferred, graph.whole) for graph in graphs]
        return [found[at] for at in sorted(found)]

    once = reports([0, 1, 2])
    assert all(once)
    assert once == reports([2, 1, 0])


def test_every_file_is_in_the_key_of_torchs_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sub-packages too: what any of them says decides about graphs, and about how they are divided."""
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    for path in (package / "__init__.py", package / "inner" / "deep.py"):
        path.write_text("x = 1\n")
    monkeypatch.setattr(source_digest, "folder_of", lambda name: package)
    keys = set()
    for text in ("x = 1\n", "x = 2\n"):
        (package / "inner" / "deep.py").write_text(text)
        source_digest.sources.cache_clear()
        keys |= {source_digest.sources(), Partitioner(("mm",)).uuid(), Partitioner(None).uuid()}
    monkeypatch.undo()
    source_digest.sources.cache_clear()
    assert len(keys) == 6


@pytest.mark.parametrize("package", source_digest.PACKAGES)
def test_the_key_covers_every_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest.sources()
    (tmp_path / "__init__.py").write_text("")
    folder_of = source_digest.folder_of
    monkeypatch.setattr(source_digest, "folder_of", lambda name: tmp_path if name == package else folder_of(name))
    source_digest.sources.cache_clear()
    after = source_digest.sources()
    monkeypatch.undo()
    source_digest.sources.cache_clear()
    assert before != after
    assert source_digest.sources() == before


def test_optimizers_of_any_class_are_found_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(torch.optim.AdamW):
        pass

    class Own(Inner):
        pass

    device, others = torch.device("cpu"), optimizer_state.optimizers()
    before = device_budget.facts(device, 0, 4).optimizer if others else 0
    optimizer = Own([nn.Parameter(torch.zeros(10))])
    assert optimizer in optimizer_state.optimizers()
    walks = []
    walk = optimizer_state.gc.get_objects
    monkeypatch.setattr(optimizer_state.gc, "get_objects", lambda: walks.append(1) or walk())
    assert device_budget.facts(device, 0, 4).optimizer - before == 2 * 40
    assert len(walks) == 1


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import torch, fastft.kernels
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(50, 16), nn.RMSNorm(16), nn.Linear(16, 50)
    def forward(self, ids):
        return nn.functional.cross_entropy(self.head(self.norm(self.embedding(ids))).flatten(0, 1), ids.flatten())

model, ids = Model(), torch.randint(50, (2, 5))
gradients = []
for run in (torch.compile(model, backend="fastft", options={"strict": True, "lower": "eager"}), model):
    model.zero_grad()
    run(ids).backward()
    gradients.append([value.grad.clone() for value in model.parameters()])
torch.testing.assert_close(*gradients)
print(len(fastft.compilations().graphs[0].lifted), "lifted")
"""


def test_everything_runs_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "2 lifted"
