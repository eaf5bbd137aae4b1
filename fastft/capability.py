"""From which CUDA capability a GPU runs what; light to import, as both the kernels and the command ask."""

TRITON_FROM = (7, 5)
BFLOAT16_FROM = (8, 0)
