"""From the rewritten graph to a function: pieces compiled by kind, a plan built, CUDA graphs chosen."""
