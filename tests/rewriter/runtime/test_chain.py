"""What a step runs through is what docs/run-time.md draws."""

import re
import traceback
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import FAMILIES, batch, build

from fastft.kernels.core import dispatch

ROOT = Path(__file__).parents[3]
# In the page, and not on the stack of an op on a CPU: what returns before, is generated, or is for GPUs or several.
ELSEWHERE = {
    "runtime/sharded.py",
    "runtime/controller.py",
    "outline/stitch.py",
    "runtime/cuda_graphs.py",
    "compat/aot.py",
    "core/launch_plan.py",
}


def end_of(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def is_ours(path: Path) -> bool:
    return any(path.is_relative_to(ROOT / folder) for folder in ("fastft", "rewriter", "patterns", "kernels"))


def test_the_calls_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the compiled model's call to an op's kernel, with a plan, rows left out and logits that nobody read yet."""
    page = (ROOT / "docs" / "run-time.md").read_text(encoding="utf-8")
    diagram = re.findall(r"[\w/]+\.py", page.partition("```\n")[2].partition("```")[0])
    drawn = [end_of(path) for path in diagram if end_of(path) not in ELSEWHERE]
    stacks: list[traceback.StackSummary] = []
    fill = dispatch.fill

    def noted(*arguments: Any) -> None:
        stacks.append(traceback.extract_stack())
        fill(*arguments)

    torch._dynamo.reset()
    model = build(FAMILIES[0], nf4=False, checkpoint=False, train_norms=False, layers=3)
    options = {"lower": "eager", "memory_budget": "max-speed"}
    compiled = torch.compile(model, backend="fastft", dynamic=True, options=options)
    inputs = batch(padded=True)
    compiled(**inputs)
    monkeypatch.setattr(dispatch, "fill", noted)
    compiled(**inputs)
    ours = [end_of(frame.filename) for frame in stacks[0] if is_ours(Path(frame.filename).resolve())]
    called = [path for path, _ in groupby([*ours, "core/dispatch.py"])]
    assert called == [path for path, _ in groupby(drawn)]
