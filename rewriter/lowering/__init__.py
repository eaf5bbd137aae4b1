"""From the rewritten graph to a function: compile pieces by kind, build a memory plan, choose CUDA graphs."""
