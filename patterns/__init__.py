"""The rules: which PyTorch expressions become which op.  The largest match wins, then the first."""

import fastft.kernels  # noqa: F401  (registers the ops that the rules name)
from fastft.patterns import add_rms_norm, attention, dora, glu, layer_norm, lora, norm_rotary, rms_norm, rotary

LIFT = (
    *rms_norm.RULES,
    *layer_norm.RULES,
    *rotary.RULES,
    *glu.RULES,
    *lora.RULES,
    *dora.RULES,
    *attention.RULES,
)  # of a model's own code
FUSE = (*add_rms_norm.FUSE, *norm_rotary.FUSE, *rotary.FUSE, *glu.FUSE)  # of what was lifted
RULES = (*LIFT, *FUSE)
