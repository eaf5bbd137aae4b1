"""Run tests of a mutant of the engine in a process that has imported torch, which takes longer than most of them do.

Such a process is the fork of a server, and imports the engine anew.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

context = get_context("forkserver")
context.set_forkserver_preload(["pytest", "hypothesis.extra", "fastft.patterns", "fastft.rewriter.passes"])
NOT_IMPORTED = 99  # the exit status where the tests never came to what is broken


class _Finder:
    """Finds one module in a file of its own."""

    def __init__(self, module: str, file: str) -> None:
        self.module, self.file = module, file

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.file) if name == self.module else None


def _is_engine(name: str) -> bool:
    """Whether a module is imported anew; the ops, which torch knows for good, and what they import are not."""
    return name == "fastft" or name.startswith(("fastft.rewriter", "fastft.patterns"))


def run(module: str, file: str, arguments: Sequence[str], output: str) -> None:
    """Import the engine with one module from this file, run pytest, and exit as that does."""
    import pytest

    for name in filter(_is_engine, list(sys.modules)):
        del sys.modules[name]
    os.environ["FASTFT_HYPOTHESIS_PROFILE"] = "mutants"
    sys.meta_path.insert(0, _Finder(module, file))  # type: ignore[arg-type]
    with Path(output).open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        code = int(pytest.main(list(arguments)))
    met = getattr(sys.modules.get(module), "__file__", None) == file
    os._exit(code if met else NOT_IMPORTED)


def tested(module: str, file: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit status of these tests and what pytest prints."""
    output = file.with_suffix(".txt")
    process = context.Process(target=run, args=(module, str(file), arguments, str(output)))
    process.start()
    process.join()
    return process.exitcode or 0, output.read_text(encoding="utf-8")
