"""fastft: a torch.compile backend for fine-tuning language models.

>>> model = torch.compile(model, backend="fastft")
"""

from importlib.metadata import version as _version

from fastft.rewriter.explain import explain
from fastft.rewriter.options import Options, OptionsError
from fastft.rewriter.report import Report

__version__ = _version("fastft")
__all__ = ["Options", "OptionsError", "Report", "__version__", "explain"]
