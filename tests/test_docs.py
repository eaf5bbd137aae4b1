"""Every code block of README.md and docs/ runs, in the order of its page; and what the pages list is what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import docs_page
import pytest

from fastft.kernels.core.registry import REGISTRY

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```" in path.read_text()]
CODED = [path for path in PAGES if docs_page.BLOCK.search(path.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", CODED, ids=lambda path: path.stem)
def test_code_runs(page: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "docs_page.py"), str(page)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert int(done.stdout.split()[-2]) > 0


def test_no_block_is_of_another_language() -> None:
    """What is neither run nor plain text would go unchecked."""
    for page in PAGES:
        languages = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert set(languages[::2]) <= {"bash", "python", "", "text"}, page
        assert not any(languages[1::2]), page


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not re.match(r"https?://", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_op_is_listed_with_its_limits() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    forward = [name for name in REGISTRY if "_backward" not in name and "gradient" not in name]
    assert [name for name in forward if f"`{name}`" not in text] == []
