"""The package is whole however it is installed: every file is there, is imported, and trains."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastft import source_digest

ROOT = Path(__file__).parents[1]
SOURCES = ("fastft", "rewriter", "kernels", "patterns", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import setuptools.build_meta as backend, sys; getattr(backend, sys.argv[1])(sys.argv[2])"
TRAIN = """
import importlib, pkgutil, torch, fastft
from fastft import source_digest

without_triton = importlib.util.find_spec("triton") is None
elsewhere = ("fastft.__main__", "fastft.integrations.axolotl")  # the latter is imported by Axolotl
for module in pkgutil.walk_packages(fastft.__path__, "fastft."):
    if module.name not in elsewhere and not (without_triton and module.name.endswith(("_triton", "tiles"))):
        importlib.import_module(module.name)

class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

model = Norm()
compiled = torch.compile(model, backend="fastft", options={"lower": "eager", "strict": True})
optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
for _ in range(3):
    loss = compiled(x).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[2] < losses[1] < losses[0], losses
assert len(fastft.compilations().lifted) == 1
print(fastft.__file__, source_digest.sources())
"""


def environment(folder: Path) -> Path:
    """Make an environment that has what this one has, but for fastft; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "others.pth").write_text("\n".join(paths))
    return python


def built(checkout: Path, how: str) -> Path:
    """Build a wheel or an sdist as a front end would, and return its path."""
    out = checkout.parent / how
    out.mkdir()
    command = [sys.executable, "-c", BUILD, f"build_{how}", str(out)]
    subprocess.run(command, cwd=checkout, capture_output=True, check=True)
    (path,) = out.iterdir()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "sdist", "editable"])
def test_it_imports_and_trains(how: str, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    python = environment(tmp_path / "environment")
    what = ["-e", str(checkout)] if how == "editable" else [str(built(checkout, how))]
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*install, *what], cwd=tmp_path, capture_output=True, check=True)
    done = subprocess.run([str(python), "-c", TRAIN], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, digest = done.stdout.split()[-2:]
    assert Path(file).is_relative_to(checkout if how == "editable" else tmp_path / "environment")
    assert digest == source_digest.sources(), "a file is missing, or one too many"
