"""Lets the benchmarks run from a checkout where fastft is not installed.

The usual way, which needs no network and only setuptools:

    pip install --no-deps --no-build-isolation -e .

Where that cannot be done, a folder of links lays the checkout out as an installed package, entry point included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def installed() -> bool:
    """Whether fastft is installed, leftovers of a build in the repository's root aside; imports nothing."""
    path = [part for part in sys.path if Path(part).resolve() != ROOT]
    return any(metadata.distributions(name="fastft", path=path))


def search_path() -> list[str]:
    """PYTHONPATH without the repository's root, whose ``kernels`` would shadow the hub's package of that name."""
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [part for part in parts if part and Path(part).resolve() != ROOT]


def link_package(folder: Path) -> None:
    """Make ``folder`` a place from which fastft imports, by the mapping in pyproject.toml."""
    import tomllib  # Python 3.11; install the package on 3.10

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    for package, source in settings["tool"]["setuptools"]["package-dir"].items():
        target = folder / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for entry in (ROOT / source).iterdir():
            if entry.name != "__pycache__":
                (target / entry.name).symlink_to(entry)
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def commit() -> str | None:
    """HEAD's short hash, with a + if tracked files differ from it; None outside a git checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
