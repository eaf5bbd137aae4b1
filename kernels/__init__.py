"""The ops ``torch.ops.fastft.*``: one file an op, with its reference, autograd, FLOP formula and Triton kernels."""
