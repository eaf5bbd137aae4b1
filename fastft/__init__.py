"""fastft: a torch.compile backend for fine-tuning language models.

>>> model = torch.compile(model, backend="fastft")
"""

from importlib.metadata import version as _version

from fastft.rewriter.options import Options, OptionsError

__version__ = _version("fastft")
__all__ = ["Options", "OptionsError", "__version__"]
