"""Hypothesis profiles, FASTFT_HYPOTHESIS_PROFILE: ci (the default: few examples, always the same), interpreter, gpu,
and mutants, where a failure need not be made small.

The quick tier, ``pytest -m quick``: what of the files below compiles nothing and starts no process.

And how many threads torch computes with: several processes with as many each as there are cores wait for one another;
and how often Python collects.
"""

import gc
import inspect
import logging
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import faster_interpreter
import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci", max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("gpu", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(  # hundreds of times slower than a compiled kernel: what fails is told as it was drawn
    "interpreter",
    max_examples=3,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
)
settings.load_profile(os.environ.get("FASTFT_HYPOTHESIS_PROFILE", "ci"))

HERE = Path(__file__).parent
QUICK = (
    "patterns/", "rewriter/memory/test_memory.py", "rewriter/capture/test_normalize.py",
    "rewriter/runtime/test_offload.py", "rewriter/matching/test_pattern.py", "rewriter/memory/test_planner.py",
    "rewriter/matching/test_checks.py", "rewriter/projections/test_merge.py", "rewriter/loss/test_heads.py",
    "rewriter/memory/test_step_memory.py", "rewriter/attention/masks/test_terms.py",
    "rewriter/attention/masks/test_substitution.py", "kernels/test_dispatch.py",
    "kernels/test_layout.py", "kernels/test_lora_plan.py", "kernels/test_strategies.py", "benchmarks/test_compare.py",
    "benchmarks/test_occupancy.py", "benchmarks/test_peak.py", "cli/test_data.py", "test_imports.py", "test_mutants.py",
    "test_project.py",
)  # fmt: skip
SLOWER = re.compile(r"\b(compiled|captured|explain|same)\(|torch\.compile|compile_in_place|subprocess|\.launch\(")


def is_quick(path: Path) -> bool:
    return path.is_relative_to(HERE) and path.relative_to(HERE).as_posix().startswith(QUICK)


def pytest_configure(config: pytest.Config) -> None:
    """Before torch is imported, for the processes of xdist and those that tests start too."""
    processes = len(config.getoption("tx", None) or [])
    if processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    if os.environ.get("TRITON_INTERPRET") == "1":
        faster_interpreter.install()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries report at the end what they think leaked


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the quick tier alone no other file is imported: that takes as long as its tests."""
    others = config.option.markexpr == "quick" and collection_path.suffix == ".py" and not is_quick(collection_path)
    return True if others else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Quick are the tests of those files that name nothing that compiles; that this is so is seen when they run."""
    if isinstance(item, pytest.Function) and is_quick(item.path):
        source = inspect.getsource(inspect.unwrap(item.function))
        if not SLOWER.search(source) and not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    """Keep pytest's handlers away from torch's structured trace, for which each graph would be spelled many times.

    They are added to loggers that do not propagate; this one has handlers only where somebody wants a trace.
    """
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="module", autouse=True)
def _collected_seldom() -> Iterator[None]:
    """Tracing makes millions of objects that live, for which Python's collector would look again and again.

    So it runs less often, and what lives when a file's tests have run is left out.  On a GPU it stays as users have it:
    memory that waits for it would be measured.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    gc.set_threshold(100_000, 20, 100)
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quick_is_quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a quick test, wherever it runs, neither Dynamo nor another process is started."""
    if request.node.get_closest_marker("quick") is None:
        yield
        return
    import torch

    def refuse(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("a test of the quick tier starts a process: name that in the test, or leave its file out")

    with pytest.MonkeyPatch.context() as patched, torch.compiler.set_stance("fail_on_recompile"):
        patched.setattr(subprocess.Popen, "__init__", refuse)
        yield


@pytest.fixture
def planned_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Launch plans on the CPU too, and those that are made; no code that was compiled without them."""
    import torch

    from fastft.kernels.core import launch_plan

    monkeypatch.setattr(launch_plan, "PLANNED_ON", {"cpu"})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plans: dict[str, Any] = {}
    monkeypatch.setattr(launch_plan, "_plans", plans)
    torch._dynamo.reset()
    yield plans
    torch._dynamo.reset()
