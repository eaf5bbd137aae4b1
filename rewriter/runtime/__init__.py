"""What a training step runs through: memory plans, offloading, CUDA graphs, lazy logits, profiler ranges."""
