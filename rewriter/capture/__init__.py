"""Dynamo's graph as it arrives: numbers, sizes, checkpoints, and one spelling of each call."""
