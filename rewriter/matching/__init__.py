"""Rules: found in a graph, checked, and carried out."""
