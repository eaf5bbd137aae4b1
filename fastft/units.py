"""Units of memory."""

from __future__ import annotations

GIB = 2**30
MIB = 2**20


def format_bytes(size_bytes: int) -> str:
    """Format a number of bytes as "14.20 GiB", or as "35.1 MiB" if it is less."""
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.2f} MiB"
