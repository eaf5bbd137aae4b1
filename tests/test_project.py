"""What the repository promises about itself."""

import re
from pathlib import Path

import pytest

from fastft import patterns
from fastft.rewriter.rule import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = sorted(
    path for folder in ("fastft", "rewriter", "patterns", "kernels") for path in (ROOT / folder).rglob("*.py")
)


def section(name: str) -> str:
    """What stands in README.md between two comments."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert found, f"README.md has no section {name}"
    return found.group(1)


def test_the_table_of_rules_is_the_rules() -> None:
    assert section("rules").strip() == table(patterns.RULES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_private_torch_symbols_are_in_compat_alone(path: Path) -> None:
    if path.name in ("compat.py", "compat_ddp.py"):
        return
    private = re.compile(r"\btorch(\.\w+)*\._(?!check\b)\w+")  # torch._check is documented
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if private.search(line)]
    assert lines == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_engine_names_no_model() -> None:
    models = re.compile(r"llama|qwen|gemma|mistral|\bphi", re.IGNORECASE)
    for path in (ROOT / "rewriter").rglob("*.py"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if models.search(line)]
        assert lines == [], path
