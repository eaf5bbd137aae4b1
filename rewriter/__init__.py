"""The engine: Dynamo's graph in, a graph of fused ops out, and the lowering of what results."""
