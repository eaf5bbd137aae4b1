"""A graph cut into pieces at its layers, of which those of equal structure are compiled once."""
