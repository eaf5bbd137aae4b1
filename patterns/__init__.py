"""The rules: which PyTorch expressions become which op.  The largest match wins, then the first."""

from fastft.patterns import rms_norm

RULES = (*rms_norm.RULES,)
