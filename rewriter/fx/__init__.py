"""What every pass asks of an FX graph: metadata, side effects, autocast, nested graphs, edits."""
