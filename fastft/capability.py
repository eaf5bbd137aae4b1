"""The CUDA capability from which a GPU runs what; light to import, as both the kernels and the command need it."""

TRITON_FROM = (7, 5)
BFLOAT16_FROM = (8, 0)
TENSOR_CORES_FROM = (8, 0)  # Triton multiplies tiles without them before
TILES_FROM = (9, 0)  # the tensor memory accelerator, which loads tiles
