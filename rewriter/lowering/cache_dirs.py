"""The folders where torch and Triton cache compiled code, and a replacement for one that cannot be written."""

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
    """Return Inductor's cache folder: TORCHINDUCTOR_CACHE_DIR, or torch's default."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or aot.cache_folder())


def triton_folder() -> Path:
    """Return Triton's cache folder: TRITON_CACHE_DIR, or one in TRITON_HOME or the home folder."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")


def folders() -> dict[str, Path]:
    """Return the cache folders that this machine uses, by the environment variable that sets each."""
    triton = {"TRITON_CACHE_DIR": triton_folder()} if torch.cuda.is_available() else {}
    return {"TORCHINDUCTOR_CACHE_DIR": inductor_folder(), **triton}


def ensure_writable() -> None:
    """Replace each cache folder that cannot be written by a new one, set in its environment variable, with a warning.

    Code that is compiled there is lost for later processes, and nothing else is.  If no folder can be written, nothing
    is changed, and torch will raise an error.
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
    """Return why a folder cannot be written, or "" if it can; a missing folder is created."""
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
