"""The only file that touches private torch symbols.  Supported: torch 2.11 to 2.15."""

from torch._inductor.compile_fx import compile_fx

__all__ = ["compile_fx"]
