"""fastft: a torch.compile backend for fine-tuning language models.

>>> model = torch.compile(model, backend="fastft")
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from fastft.rewriter.options import Options, OptionsError

if TYPE_CHECKING:
    from fastft.integrations.trainer import TrainerCallback as TrainerCallback
    from fastft.quantize import Quantized, quantize_
    from fastft.rewriter.bisect import Culprit, bisect
    from fastft.rewriter.check import Check, check
    from fastft.rewriter.explain import explain
    from fastft.rewriter.memory.planner import BudgetError
    from fastft.rewriter.report.history import compilations
    from fastft.rewriter.report.report import Report
    from fastft.rewriter.runtime.controller import set_memory_budget

__version__ = _version("fastft")
__all__ = [  # without TrainerCallback, which needs transformers
    "BudgetError", "Check", "Culprit", "Options", "OptionsError", "Quantized", "Report",
    "__version__", "bisect", "check", "compilations", "explain", "quantize_", "set_memory_budget",
]  # fmt: skip

_LATER = {
    "BudgetError": "fastft.rewriter.memory.planner",
    "Check": "fastft.rewriter.check",
    "Culprit": "fastft.rewriter.bisect",
    "bisect": "fastft.rewriter.bisect",
    "check": "fastft.rewriter.check",
    "compilations": "fastft.rewriter.report.history",
    "explain": "fastft.rewriter.explain",
    "Quantized": "fastft.quantize",
    "Report": "fastft.rewriter.report.report",
    "TrainerCallback": "fastft.integrations.trainer",
    "quantize_": "fastft.quantize",
    "set_memory_budget": "fastft.rewriter.runtime.controller",
}


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is asked for, so that the command answers at once."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
