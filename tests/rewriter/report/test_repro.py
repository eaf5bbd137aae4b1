"""A reproducer is the graph that was captured, shows what failed in a process of its own, and holds nobody's data."""

import re
import runpy
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint
from training.setting import Setting, batch

import fastft
from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.compat.symbolic import hint
from fastft.errors import UserError
from fastft.patterns import rms_norm
from fastft.rewriter import backend
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.metadata import module_path, source_line
from fastft.rewriter.outline.partition import outline
from fastft.rewriter.passes import rewrite
from fastft.rewriter.report import history, repro, repro_writer
from fastft.rewriter.report.repro_builder import named

EAGER: dict[str, Any] = {"lower": "eager"}
FAULT = """
from fastft.rewriter.attention import simplify

def broken(gm):
    raise ValueError("no graph is like this one.")

simplify._Masks = broken
"""


class Layer(nn.Module):
    """A norm and a projection, recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)

    def inner(self, x: Tensor) -> Tensor:
        return self.linear(rms_norm.llama(x, self.weight, 1e-6))


class Stack(nn.Module):
    """An embedding of few rows, and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


IDS = torch.arange(10).view(2, 5)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend._warned.clear()
    monkeypatch.delenv("FASTFT_DUMP", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(history, "_graphs", deque(maxlen=history.LIMIT))


def captured(function: Callable, *args: Any, dynamic: bool | None = None, **batch: Any) -> tuple[GraphModule, dict]:
    """The graph that Dynamo makes, and what its reproducer defines."""
    found: list[tuple[GraphModule, str]] = []

    def keep(gm: GraphModule, example_inputs: list[Any]) -> Callable:
        found.append((gm, repro_writer.text(gm)))
        return gm.forward

    torch.compile(function, backend=keep, dynamic=dynamic)(*args, **batch)
    ((gm, text),) = found
    program: dict[str, Any] = {"__name__": "repro"}
    exec(text, program)
    return gm, program


def told(gm: GraphModule) -> list[tuple]:
    """All that fastft asks of a graph's nodes: calls, modules, values, which of them share memory, what is written."""
    storages: dict[int, int] = {}

    def kind(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return hint(value) if isinstance(value, (int, torch.SymInt)) else type(value)
        number = storages.setdefault(fake_tensors.storage_key(value), len(storages))
        symbols = [isinstance(size, torch.SymInt) for size in value.shape]
        return (
            type(value), isinstance(value, nn.Parameter), value.dtype, symbols, [*map(hint, value.shape)],
            [*map(hint, value.stride())], hint(value.storage_offset()), value.requires_grad, value.is_leaf, number,
            fake_tensors.written_to(value),
        )  # fmt: skip

    return [
        (node.op, node.op == "placeholder" or str(node.target), str(node.args), str(node.kwargs))
        + ((node.name, module_path(node), source_line(node)) if node.op.startswith("call") else ())
        + (fake_tensors.stays_in_place(node), fake_tensors.tree_map_only(object, kind, value_of(node)))
        for body in bodies(gm)
        for node in body.graph.nodes
    ]


def assert_reproduced(gm: GraphModule, program: dict) -> list[str]:
    """The graph, and the same rules and regions; the rules that are lifted."""
    again = repro.load(program["graph"], program["STATE"]).gm
    assert told(again) == told(gm)
    reports = [rewrite(one) for one in (gm, again)]
    for one, report in zip((gm, again), reports, strict=True):
        outline(one, report)
    assert reports[1] == reports[0]
    return [lifted.rule for lifted in reports[0].lifted]


def test_a_checkpointed_layer() -> None:
    gm, program = captured(Stack(), IDS)
    lines = repro.run(program["graph"], backend.fastft, EAGER, program["STATE"])
    assert "integers below 11," in lines[1]
    errors = [float(re.findall(r"\S+", line)[0]) for line in lines[3:]]
    assert len(errors) == 8
    assert max(errors) < 1e-5
    assert assert_reproduced(gm, program) == ["rms_norm.llama"] * 3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_four_bits_and_adapters(checkpointed: bool, tmp_path: Path) -> None:
    """bitsandbytes' autograd.Function has graphs of its own, forward and backward."""
    model = Setting(tmp_path).model(nf4=True, layers=2)
    layer, *_ = model.base_model.model.model.layers
    x, rotation = torch.randn(2, 3, 64, requires_grad=True), (torch.randn(1, 3, 16), torch.randn(1, 3, 16))

    def run(x: Tensor) -> Tensor:
        call = lambda x: layer(x, position_embeddings=rotation)  # noqa: E731
        return checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)

    rules = assert_reproduced(*captured(run, x))
    assert {"lora_linear.four_bit", "lora"} <= {rule if "four_bit" in rule else rule.split(".")[0] for rule in rules}


def test_a_model_of_four_bits_trains(tmp_path: Path) -> None:
    report = fastft.explain(Setting(tmp_path).model(nf4=True, layers=2), **batch(0))
    (path,) = report.save_repro(tmp_path / "new")
    assert path == tmp_path / "new" / "graph_0" / "repro.py"
    program = runpy.run_path(str(path))
    lines = repro.run(program["graph"], backend.fastft, EAGER, program["STATE"])
    assert [float(re.findall(r"\S+", line)[0]) < 1e-2 for line in lines[3:]] == [True] * repro.SHOWN
    assert fastft.compilations().graphs[-1].lifted == report.graphs[0].lifted


def test_sizes_that_are_symbols() -> None:
    gm, program = captured(Stack(), IDS, dynamic=True)
    again = repro.load(program["graph"], program["STATE"]).gm
    ids = [next(value_of(node) for node in one.graph.nodes if "ids" in node.name) for one in (gm, again)]
    assert [[isinstance(size, torch.SymInt) for size in one.shape] for one in ids] == [[True, True]] * 2
    assert "nothing failed" in repro.run(program["graph"], backend.fastft, EAGER, program["STATE"])[0]


def test_memory_that_inputs_share_and_writes() -> None:
    whole = torch.zeros(4, 6)
    left, right, other = whole[:, :4].detach(), whole[1:].detach(), torch.zeros(2, 3).t().requires_grad_()

    def write(left: Tensor, right: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        right.mul_(2)
        return left + 1, other[..., None, 1:] * right.sum(), torch.full((2,), float("inf"))

    gm, program = captured(write, left, right, other)
    assert_reproduced(gm, program)
    first, second, _ = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    assert fake_tensors.storage_key(first) == fake_tensors.storage_key(second)


def test_autocast_around_and_inside() -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = x @ weight
        return x @ weight.half()

    x, weight = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        gm, program = captured(run, x, weight)
        assert program["STATE"] == {"grad": True, "autocast": {"cpu": "float16"}}
        assert_reproduced(gm, program)


def test_a_model_without_values_runs_on_the_cpu(tmp_path: Path) -> None:
    with torch.device("meta"):
        report = fastft.explain(Stack(), torch.zeros(2, 5, dtype=torch.long))
    (path,) = report.save_repro(tmp_path)
    program = runpy.run_path(str(path))
    assert "nothing failed" in repro.run(program["graph"], backend.fastft, EAGER, program["STATE"])[0]


def fall_back(monkeypatch: pytest.MonkeyPatch, times: int = 1) -> list[str]:
    """Let a pass fail; what is warned of."""
    from fastft.rewriter.attention import simplify

    monkeypatch.setattr(simplify, "_Masks", simplify._Masks)
    exec(FAULT, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            torch._dynamo.reset()
            torch.compile(Stack(), backend="fastft", options=EAGER)(IDS)
    return [str(one.message) for one in caught if "fastft" in str(one.message)]


def test_a_fallback_is_shown_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (message,) = fall_back(monkeypatch, times=2)
    start = "fastft left a graph as it was, because of ValueError: no graph is like this one; `python "
    assert message.startswith(start)
    path = message.removeprefix(start).removesuffix("` shows it.")
    assert re.fullmatch(re.escape(str(tmp_path)) + r"/fastft-repro-\w+/repro.py", path)
    assert len(list(tmp_path.iterdir())) == 1, "the second time it is not warned of, nor written"
    (saved,) = fastft.compilations().save_repro(tmp_path / "saved")
    assert saved.read_text() == Path(path).read_text()
    assert "It failed with ValueError: no graph is like this one." in saved.read_text()
    start = f"import runpy, sys\n{FAULT}\nsys.argv = [{path!r}]\nrunpy.run_path({path!r}, run_name='__main__')"
    out = subprocess.run([sys.executable, "-P", "-c", start], capture_output=True, text=True)
    assert out.returncode == 1
    assert out.stderr.strip().endswith("ValueError: no graph is like this one.")
    assert "passes.py" in out.stderr


def test_without_the_fault_it_compares() -> None:
    """As a program, too."""
    report = fastft.explain(Stack(), IDS)
    (path,) = report.save_repro(Path(repro_writer.tempfile.gettempdir()))
    out = subprocess.run([sys.executable, "-P", str(path), "--eager"], capture_output=True, text=True, check=True)
    assert "nothing failed" in out.stdout
    assert "gradient of" in out.stdout


def test_it_never_matters_whether_it_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("no folder")
    monkeypatch.setenv("FASTFT_DUMP", str(tmp_path / "taken"))
    assert fall_back(monkeypatch) == [
        "fastft left a graph as it was, because of ValueError: no graph is like this one."
    ]
    backend._warned.clear()
    monkeypatch.setattr(repro_writer, "_names", lambda gm: 1 / 0)
    assert fall_back(monkeypatch) == [
        "fastft left a graph as it was, because of ValueError: no graph is like this one."
    ]


def test_a_folder_for_every_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTFT_DUMP", str(tmp_path / "dump"))
    for rows in (slice(None), slice(1, None)):
        torch._dynamo.reset()
        torch.compile(Stack(), backend="fastft", options=EAGER)(IDS[rows])
    assert fastft.compilations().graphs[0].repro == "", "what is compiled as ever keeps no text"
    fall_back(monkeypatch)
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    told = [re.sub("repro-.*", "repro-", name) for name in names]
    assert told == ["000_Stack_forward", "001_Stack_forward", "002_Stack_forward", "fastft-repro-"]
    first, second = [(tmp_path / "dump" / name / "repro.py").read_text() for name in names[:2]]
    assert "torch.int64, (2, 5)" in first
    assert "torch.int64, (1, 5)" in second
    assert "OPTIONS = {'lower': 'eager'}" in first


def test_a_report_without_any_says_what_to_do(tmp_path: Path) -> None:
    torch.compile(Stack(), backend="fastft", options=EAGER)(IDS)
    with pytest.raises(UserError, match=r"call fastft\.explain\(model, \*\*batch\)"):
        fastft.compilations().save_repro(tmp_path)


def test_it_holds_no_data() -> None:
    """Weights, a batch, a constant that the model makes of a tensor, and text beside it."""
    model = Stack()
    held, ids = torch.full((2, 5), 54321.0), torch.full((2, 5), 9)
    ids[0] = 6
    for parameter in model.parameters():
        nn.init.constant_(parameter, 54321.0)

    def run(ids: Tensor, said: str) -> Tensor:
        return model(ids) + held.sum() * len(said)

    report = fastft.explain(run, ids, said="a secret of 54321")
    text = report.graphs[0].repro
    assert "torch.int64, (2, 5)" in text
    assert re.findall(r"54321|secret|tensor\(", text) == []


def test_what_is_not_installed_is_named() -> None:
    assert named("torch.nn.functional.silu") is nn.functional.silu
    assert named("getattr") is getattr
    assert named("torch.ops.aten.add.Tensor") is torch.ops.aten.add.Tensor
    for name in ("torch.ops.nowhere.add.default", "nowhere.add", "torch.nowhere"):
        with pytest.raises(UserError, match=f"calls {re.escape(name)}, which is not here"):
            named(name)
