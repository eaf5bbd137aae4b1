"""A digest of fastft's own code, for the keys of torch's caches."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

PACKAGES = ("fastft.compat", "fastft.kernels", "fastft.patterns", "fastft.rewriter")


@functools.cache
def sources() -> str:
    """Digest all code that decides what a graph is compiled to, or torch's caches would return an earlier version's."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = folder_of(package)
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def folder_of(package: str) -> Path:
    """Find the folder of one of our packages, which need not be imported for it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
