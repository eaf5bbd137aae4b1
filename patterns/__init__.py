"""The rules: which PyTorch expressions become which op.  Most specific first; the first that applies wins."""

from fastft.patterns import rms_norm

RULES = (*rms_norm.RULES,)
