"""The ops ``torch.ops.fastft.*``: one file an op, with its reference, autograd, FLOP formula and Triton kernels."""

from fastft.kernels import rms_norm
from fastft.kernels.registry import REGISTRY

__all__ = ["REGISTRY", "rms_norm"]
