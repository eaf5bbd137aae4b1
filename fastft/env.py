"""What this machine has: versions, device, compiler, and which kernels can run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from fastft.capability import BFLOAT16_FROM, TRITON_FROM
from fastft.errors import UserError
from fastft.units import GIB

PACKAGES = ("fastft", "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Return the version of Python and of each package, or "not installed"."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def cpp_compiler() -> str | None:
    """Find the C++ compiler that Inductor would start, or return None."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def c_compiler() -> str | None:
    """Find the C compiler with which Triton builds its launchers, or return None."""
    candidates = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def require_compiler(device: str, lower: str) -> None:
    """Raise UserError if compilation for this device would fail for lack of a compiler."""
    if device == "cpu" and lower == "inductor" and not cpp_compiler():
        name = os.environ.get("CXX", "g++")
        other = "set CXX=clang++" if shutil.which("clang++") else "install g++, or set CXX to a C++ compiler"
        raise UserError(
            f"Compiling for the CPU needs a C++ compiler and {name} was not found: {other}, or use --lower eager."
        )
    if device.startswith("cuda") and not c_compiler():
        raise UserError("Triton needs a C compiler and found none: install gcc, or set CC to one.")


def kernels(capability: tuple[int, int] | None, triton: bool) -> Iterator[tuple[str, str]]:
    """Yield each group of kernels with "yes" or the reason why it cannot run."""
    if not triton:
        missing = "no: triton is not installed"
    elif capability is None:
        missing = "no: there is no CUDA device; every op runs its PyTorch reference"
    elif capability < TRITON_FROM:
        missing = f"no: capability {_dotted(capability)} is below {_dotted(TRITON_FROM)}"
    else:
        missing = ""
    old = f"no: the GPU's capability is below {_dotted(BFLOAT16_FROM)}"
    recent = capability is not None and capability >= BFLOAT16_FROM
    yield "elementwise kernels (norm, rotary, activation, NF4)", missing or "yes"
    yield "matrix kernels on tensor cores", missing or ("yes" if recent else f"{old}; cuBLAS is used")
    yield "bfloat16", missing or ("yes" if recent else old)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def tables() -> list[Table]:
    """Build the three tables of ``fastft env``."""
    import torch

    installed = versions()
    packages = _table("Versions", installed.items())
    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else None
    machine = _table("Machine", [*_device(capability), ("C++ compiler", cpp_compiler() or "not found (install g++)")])
    usable = _table("Kernels", kernels(capability, installed["triton"] != "not installed"))
    return [packages, machine, usable]


def _device(capability: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    import torch

    if capability is None:
        yield "device", f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        yield "capability", "none: no CUDA device"
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB"
        return
    free, total = torch.cuda.mem_get_info()
    yield "device", torch.cuda.get_device_name()
    yield "capability", _dotted(capability)
    yield "memory", f"{total / GIB:.1f} GiB, of which {free / GIB:.1f} GiB are free"
    yield "C compiler (for Triton)", c_compiler() or "not found (install gcc)"


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def show(console: Console) -> None:
    """Print the tables."""
    for table in tables():
        console.print(table)
