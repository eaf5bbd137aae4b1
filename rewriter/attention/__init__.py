"""Attention that was lifted, made simpler: what its mask means, which heads it reads."""
