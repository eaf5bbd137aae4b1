"""Check types, as CI and the hook do: python tests/check_types.py

The folders are imported under other names than theirs (pyproject.toml), so mypy reads the package as it is installed,
in .mypy_site.  What setuptools built before goes first: it leaves files of modules that are gone in build/, and would
install them.  Needs pip and mypy in the Python that runs this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE, BUILD, EGG = ROOT / ".mypy_site", ROOT / "build", ROOT / "fastft.egg-info"


def install() -> None:
    """Install the package as it lies here into a folder of its own, and leave nothing else behind."""
    left_behind = [BUILD] if EGG.exists() else [BUILD, EGG]  # an editable install may need the latter
    for folder in (SITE, BUILD):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, "--target", str(SITE), str(ROOT)], check=True)
    finally:
        for folder in left_behind:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    install()
    environment = {**os.environ, "MYPYPATH": str(SITE)}
    return subprocess.run([sys.executable, "-m", "mypy", "-p", "fastft"], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
