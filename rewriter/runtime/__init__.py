"""What a step runs through: plans at work, offloading, CUDA graphs, logits computed when read."""
