"""From which CUDA capability a GPU runs what; light to import, as both the kernels and the command ask."""

TRITON_FROM = (7, 5)
BFLOAT16_FROM = (8, 0)
TENSOR_CORES_FROM = (8, 0)  # Triton multiplies tiles without them before
