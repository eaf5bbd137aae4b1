"""A mask read backwards from the graph that builds it, and taken apart into ranges and ids."""
