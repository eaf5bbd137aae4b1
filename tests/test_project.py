"""What the repository promises about itself."""

import re
from collections.abc import Sequence
from pathlib import Path

from fastft import patterns
from fastft.rewriter.matching.rule import table

ROOT = Path(__file__).parents[1]
COMPAT = ROOT / "fastft" / "compat"
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


def lines_with(pattern: str, paths: Sequence[Path], flags: int = 0) -> list[str]:
    """Where it occurs, as a compiler would say it."""
    found = re.compile(pattern, flags)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if found.search(line)
    ]


def test_private_torch_symbols_are_in_compat_alone() -> None:
    private = r"\btorch(\.\w+)*\._(?!check\b)\w+"  # torch._check is documented
    assert lines_with(private, [path for path in SOURCES if path.parent != COMPAT]) == []
    assert lines_with(private, [COMPAT / "dynamo.py"]), "none is found where they are"


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_the_engine_names_no_model() -> None:
    engine = sorted((ROOT / "rewriter").rglob("*.py"))
    assert lines_with(r"llama|qwen|gemma|mistral|\bphi", engine, re.IGNORECASE) == []
