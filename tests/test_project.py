"""What the repository promises about itself."""

import ast
import logging
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


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
HISTORY = {"decisions.md", "performance.md", "CHANGELOG.md"}  # their entries speak of their time


def section(name: str, text: str = README) -> str:
    """What stands in a page between two comments."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found, f"there is no section {name}"
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
    private += r"|\._schema\b|\.node\.(expr|hint|shape_env)\b|\baten, f?\"_"
    assert lines_with(private, [path for path in SOURCES if path.parent != COMPAT]) == []
    assert lines_with(private, [COMPAT / "dynamo.py"]), "none is found where they are"


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_the_engine_names_no_model() -> None:
    engine = sorted((ROOT / "rewriter").rglob("*.py"))
    assert lines_with(r"llama|qwen|gemma|mistral|\bphi", engine, re.IGNORECASE) == []


def folders_of_the_tree() -> dict[str, str]:
    """The folders that docs/architecture.md draws, with what it says of each."""
    found: dict[str, str] = {}
    above: list[str] = []
    for indent, name, purpose in re.findall(r"^( *)(\w+)/ +(.+)$", section("tree", ARCHITECTURE), re.MULTILINE):
        above = [*above[: len(indent) // 2], name]
        found["/".join(above)] = purpose
    return found


def test_the_tree_is_the_packages() -> None:
    """Folder by folder, each with the first line of its docstring."""
    packages = [path.parent for path in SOURCES if path.name == "__init__.py"]
    docstrings = {
        path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse((path / "__init__.py").read_text("utf-8"))) or ""
        for path in packages
    }
    first_lines = {folder: text.partition("\n")[0].replace("``", "") for folder, text in docstrings.items()}
    assert folders_of_the_tree() == first_lines


def test_files_that_pages_name_are_there() -> None:
    """By their path or the end of it."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pages += [path for path in (ROOT / "docs").glob("*.md") if path.name not in HISTORY]
    folders = ("fastft", "rewriter", "patterns", "kernels", "tests", "benchmarks")
    files = [f"/{path.relative_to(ROOT).as_posix()}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = [(page.name, name) for page in pages for name in re.findall(r"`([\w/.]+\.py)`", page.read_text("utf-8"))]
    assert named
    assert [(page, name) for page, name in named if not any(path.endswith(f"/{name}") for path in files)] == []


# What a sentence about a value begins with; a docstring says what a function does.
NO_VERBS = {
    "the", "a", "an", "whether", "what", "every", "of", "one", "how", "all", "where", "why", "which", "nothing",
    "each", "as", "by", "these", "those", "in", "with", "its", "their", "from", "to", "for", "only", "no",
    "two", "three", "without", "under", "below", "beyond", "something", "itself", "it", "this", "that", "if",
    "when", "while", "both", "neither", "either", "another", "other", "others", "some", "any", "most", "more",
    "less", "fewer", "such", "same", "own", "torch's", "dynamo's",
}  # fmt: skip


def test_docstrings_begin_with_a_verb() -> None:
    """But for references and replacements of rules, whose docstrings are README's table, and formulas of kernels."""
    functions = (function for rule in patterns.RULES for function in (rule.reference, rule.replacement))
    tables = {getattr(function, "func", function).__name__ for function in functions if function is not None}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {doc.splitlines()[0]}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node))
        if not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        if not (path.parent.name == "patterns" and node.name in tables)
        if doc.split()[0].strip(",.:;").lower() in NO_VERBS
    ]
    assert found == []


def test_nothing_listens_to_the_trace_of_torch() -> None:
    """With a handler, which pytest would add, every graph is spelled after each pass: conftest.py keeps it away."""
    handlers = logging.getLogger("torch.__trace").handlers
    assert [handler for handler in handlers if not type(handler).__module__.startswith("torch.")] == []
