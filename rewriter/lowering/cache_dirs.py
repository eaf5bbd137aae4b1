"""Folders that torch and Triton keep compiled code in, and another where one cannot be written."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch

from fastft.compat import aot

LEAST_FREE_BYTES = 2**26  # a model's code takes a few MiB


def inductor_folder() -> Path:
    """Inductor's: TORCHINDUCTOR_CACHE_DIR, or what torch takes instead."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or aot.cache_folder())


def triton_folder() -> Path:
    """Triton's own: TRITON_CACHE_DIR, or one in the home folder."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")


def folders() -> dict[str, Path]:
    """What is compiled on this machine goes there, by the variable that says where."""
    triton = {"TRITON_CACHE_DIR": triton_folder()} if torch.cuda.is_available() else {}
    return {"TORCHINDUCTOR_CACHE_DIR": inductor_folder(), **triton}


def ensure_writable() -> None:
    """Set the variable of a folder that cannot be written to a new one that can, with one warning.

    What was compiled is then lost when the process ends, and nothing else is.  Where no folder can be written, torch
    will say so.
    """
    for variable, folder in folders().items():
        reason = unwritable_reason(folder)
        other = _another() if reason else None
        if other is not None:
            advice = f"set {variable} to a folder with space"
            message = f"fastft keeps compiled code in {other}, as {folder} {reason}: {advice}."
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            os.environ[variable] = str(other)


def unwritable_reason(folder: Path) -> str:
    """Why nothing can be written there; "" if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        return "" if shutil.disk_usage(folder).free >= LEAST_FREE_BYTES else "is full"
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def _another() -> Path | None:
    for parent in (tempfile.gettempdir(), "/dev/shm", str(Path.home()), os.getcwd()):
        if Path(parent).is_dir() and not unwritable_reason(Path(parent)):
            return Path(tempfile.mkdtemp(prefix="fastft-", dir=parent))
    return None
