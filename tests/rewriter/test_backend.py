"""The road through torch.compile: by name, with options, and back to the user's graph when fastft fails."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft.compat import aot, dynamo
from fastft.patterns import rms_norm
from fastft.rewriter import backend
from fastft.rewriter.lowering import inductor

ROOT = Path(__file__).parents[2]
EAGER = {"lower": "eager"}


class Block(nn.Module):
    """A norm and a projection, as in any decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(0)))
        self.projection = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(rms_norm.llama(x, self.weight, 1e-6))


class Checkpointed(nn.Module):
    """Two blocks, each recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


class Doubling(torch.autograd.Function):
    """Its forward holds a norm; its backward is the user's own."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm.llama(x, weight, 1e-6)

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * grad_output, grad_output.sum((0, 1))


class Custom(Block):
    """A norm inside an autograd.Function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(Doubling.apply(x, self.weight))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend._warned.clear()


def inputs() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(function: Callable, module: nn.Module) -> list[Tensor]:
    x = inputs()
    y = function(x)
    y.square().mean().backward()
    grads = [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return [grad for grad in grads if grad is not None]


def assert_trains_right(module: nn.Module, options: dict) -> None:
    compiled = torch.compile(module, backend="fastft", options=options)
    for actual, expected in zip(gradients(compiled, module), gradients(module, module), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_name_is_enough() -> None:
    """No import of fastft: the entry point is found by torch."""
    code = "import torch; print('fastft' in torch.compiler.list_backends())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert out.stdout.strip() == "True"


def test_the_folder_kernels_is_not_taken_for_the_hubs_package() -> None:
    """With the repository's root on sys.path, transformers must not believe that ``kernels`` is installed."""
    code = "from transformers.utils import is_kernels_available; import fastft; print(is_kernels_available())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("module", [Block, Checkpointed, Custom])
def test_bodies_are_rewritten_too(module: type[nn.Module]) -> None:
    model = module()
    report = fastft.explain(model, inputs())
    if module is Custom and torch.__version__.startswith("2.11."):  # where a body returns whatever it computes
        assert any("is also used by the graph's output" in miss.reason for miss in report.near_misses)
    else:
        assert len(report.lifted) == (2 if module is Checkpointed else 1)
    assert_trains_right(model, {**EAGER, "strict": True})


@pytest.mark.slow
@pytest.mark.parametrize("module", [Block, Checkpointed, Custom])
def test_through_inductor(module: type[nn.Module]) -> None:
    assert_trains_right(module(), {"strict": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowr": "eager"}, "fastft has no option 'lowr'; did you mean 'lower'?"),
        ({"Strict": True}, "fastft has no option 'Strict'; did you mean 'strict'?"),
        ({"lower": "inductr"}, "option 'lower' is one of 'inductor', 'eager', not 'inductr'."),
        ({"strict": 1}, "option 'strict' is True or False, not 1."),
    ],
)
def test_a_wrong_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(dynamo.BackendCompilerFailed, match=message.replace("?", r"\?")):
        torch.compile(Block(), backend="fastft", options=options)(inputs())
    with pytest.raises(fastft.OptionsError, match=message.replace("?", r"\?")):
        fastft.Options.parse(options)


def test_a_mode_is_refused() -> None:
    with pytest.raises(dynamo.BackendCompilerFailed, match="fastft takes no mode"):
        torch.compile(Block(), backend="fastft", mode="max-autotune")(inputs())


def break_rewriting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail after the graph has been changed, which is the worst moment."""
    rewrite = backend.rewrite

    def failing(gm: torch.fx.GraphModule, **_: bool) -> None:
        report = rewrite(gm)
        assert report.lifted
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.fastft.rms_norm.default):
            node.args = (*node.args[:2], 1e3, *node.args[3:])  # an eps that would show
        gm.recompile()
        raise RuntimeError("forced\nand more lines")

    monkeypatch.setattr(backend, "rewrite", failing)


@pytest.mark.parametrize("module", [Block, Checkpointed])
@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_failing_rewrite_falls_back_with_one_warning(
    module: type[nn.Module], lower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rewriting(monkeypatch)
    model = module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_trains_right(model, {"lower": lower})
        torch._dynamo.reset()
        assert_trains_right(model, {"lower": lower})
    ours = [str(one.message).split(";")[0] for one in caught if "fastft" in str(one.message)]
    assert ours == ["fastft left a graph as it was, because of RuntimeError: forced"]


def test_a_failing_lowering_falls_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_fx = aot.compile_fx

    def failing(gm: torch.fx.GraphModule, example_inputs: list[Tensor], *settings: Any, **more: Any) -> Callable:
        if any("fastft" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("this op cannot be lowered")
        return compile_fx(gm, example_inputs, *settings, **more)

    monkeypatch.setattr(aot, "compile_fx", failing)
    with pytest.warns(RuntimeWarning, match="because of RuntimeError: this op cannot be lowered"):
        assert_trains_right(Block(), {})


def test_strict_raises_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    break_rewriting(monkeypatch)
    with pytest.raises(dynamo.BackendCompilerFailed, match="forced"):
        torch.compile(Block(), backend="fastft", options={**EAGER, "strict": True})(inputs())


def test_what_inductor_cannot_compile_runs_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(gm: torch.fx.GraphModule, example_inputs: list[Tensor], *settings: object, **more: object) -> Callable:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(aot, "compile_fx", failing)
    with pytest.warns(RuntimeWarning, match="without Inductor, which failed with RuntimeError: no compiler"):
        assert_trains_right(Block(), {})
    torch._dynamo.reset()
    with pytest.raises(dynamo.BackendCompilerFailed, match="no compiler"):
        torch.compile(Block(), backend="fastft", options={"strict": True})(inputs())


def test_dynamo_may_trace_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends a compilation by an error of its own where it learns that a number has to be a constant."""
    lower, calls = backend.lower, []

    def restart_once(*arguments: object, **options: object) -> Callable:
        calls.append(arguments)
        if len(calls) == 1:
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis
        return lower(*arguments, **options)

    monkeypatch.setattr(backend, "lower", restart_once)
    block, x = Block(), torch.randn(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.testing.assert_close(torch.compile(block, backend="fastft", options=EAGER)(x), block(x))
    assert len(calls) == 2


def test_changing_shapes() -> None:
    model = Block()
    compiled = torch.compile(model, backend="fastft", options={**EAGER, "strict": True})
    for length in (5, 7, 11, 1, 64):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), model(x))


def test_dynamic_shapes_are_lifted_too() -> None:
    captured = []

    def capture(gm: torch.fx.GraphModule, _: object) -> Callable:
        captured.append(backend.rewrite(gm))
        return gm.forward

    torch.compile(Block(), backend=capture, dynamic=True)(inputs())
    assert [len(report.lifted) for report in captured] == [1]


def test_eval_and_no_grad() -> None:
    model = Block().eval()
    compiled = torch.compile(model, backend="fastft", options={**EAGER, "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()), model(inputs()))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(inputs()), model(inputs()))


def test_autocast() -> None:
    model = Block()
    compiled = torch.compile(model, backend="fastft", options={**EAGER, "strict": True})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(inputs()), model(inputs())
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_caches_are_kept_apart_by_the_version_of_the_ops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's caches hold the backward as it was traced; a corrected one must not be shadowed by it."""
    misses = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for digest in ("one", "one", "two"):
        monkeypatch.setattr(inductor, "sources", lambda digest=digest: digest)
        torch._dynamo.reset()
        before = aot.cache_counts()["miss"]
        assert_trains_right(Block(), {"strict": True})
        misses.append(aot.cache_counts()["miss"] - before)
    assert misses == [1, 0, 1]
