"""What may import what: the stages of the compiler lie one above another, and nothing imports upward."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from test_project import ARCHITECTURE, ROOT, SOURCES, section

# From the ground up, as docs/architecture.md lists them.  A module belongs to the longest of these that it begins with.
LEVELS = (
    ("fastft.errors", "fastft.reasons", "fastft.capability", "fastft.units", "fastft.source_digest"),
    ("fastft.compat",),
    ("fastft.rewriter.options",),
    ("fastft.kernels.core",),
    ("fastft.kernels",),
    ("fastft.rewriter.fx",),
    ("fastft.rewriter.report",),
    ("fastft.rewriter.context",),
    ("fastft.rewriter.capture",),
    ("fastft.rewriter.matching",),
    ("fastft.patterns",),
    (
        "fastft.rewriter.projections",
        "fastft.rewriter.attention",
        "fastft.rewriter.loss",
        "fastft.rewriter.outline",
    ),
    ("fastft.rewriter.memory", "fastft.rewriter.rows"),
    ("fastft.rewriter.runtime",),
    ("fastft.rewriter.lowering",),
    ("fastft.rewriter",),
    ("fastft.integrations",),
    ("fastft",),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fastft" else ("fastft", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a file imports, in functions too; for types alone does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in MODULES else node.module for name in inner if node.module in MODULES)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        else:
            yield from imports(node)


GRAPH = {
    module: sorted(set(imports(ast.parse(path.read_text("utf-8")))) - {module}) for module, path in MODULES.items()
}


def place(module: str) -> tuple[int, str]:
    """The level that a module is on, and its part of it."""
    name = max((name for name in LEVEL if f"{module}.".startswith(f"{name}.")), key=len)
    return LEVEL[name], name


def test_nothing_imports_upward() -> None:
    """Nor sideways: stages on one level know nothing of each other."""
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if place(other)[0] >= place(module)[0] and place(other)[1] != place(module)[1]
    ]
    assert wrong == []


def test_no_module_imports_itself_by_others() -> None:
    done: set[str] = set()

    def cycle(module: str, above: tuple[str, ...]) -> list[str]:
        if module in above:
            return [*above[above.index(module) :], module]
        if module in done:
            return []
        found = next((found for other in GRAPH[module] if (found := cycle(other, (*above, module)))), [])
        done.add(module)
        return found

    assert [found for module in GRAPH if (found := cycle(module, ()))] == []


def test_all_names_come_without_optional_packages() -> None:
    """As `from fastft import *` where only torch is installed."""
    absent = "import sys; sys.modules |= dict.fromkeys(['transformers', 'bitsandbytes', 'peft', 'trl', 'datasets'])"
    names = "import fastft; from fastft import *; assert set(fastft.__all__) <= set(globals())"
    subprocess.run([sys.executable, "-c", f"{absent}; {names}"], check=True)


def test_the_graph_is_the_packages() -> None:
    """Or the tests above would pass of nothing."""
    assert "fastft.rewriter.passes" in GRAPH["fastft.rewriter.backend"]
    assert all(place(module)[1] != "fastft" or module.count(".") < 2 for module in MODULES), "a folder without a level"


def test_the_levels_are_those_of_the_page() -> None:
    lines = [line for line in section("levels", ARCHITECTURE).splitlines() if line]
    assert [line.partition(". ")[0] for line in lines] == [str(number) for number in range(1, len(LEVELS) + 1)]
    assert [tuple(re.findall(r"`([\w.]+)`", line)) for line in lines] == list(LEVELS)
