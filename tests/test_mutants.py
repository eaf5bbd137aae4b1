"""tests/mutants.py changes what it says it changes; that the mutants are caught is for the script to show."""

import importlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from engine_mutants import ENGINE
from mutants import MUTANTS, PLAIN, ROOT, Mutant, arguments_of, mutated, path_of


def faults(mutants: Iterable[Mutant]) -> list[str]:
    """What is wrong with mutants: each changes one line, is a program, and has tests that exist."""
    found = []
    for mutant in mutants:
        named = f"{mutant.kernel}, {mutant.kind}"
        try:
            before, after = path_of(mutant).read_text(encoding="utf-8"), mutated(mutant)
            compile(after, str(path_of(mutant)), "exec")
        except (ValueError, SyntaxError) as error:
            found.append(f"{named}: {error}")
            continue
        lines = before.splitlines(), after.splitlines()
        changed = sum(one != other for one, other in zip(*lines, strict=False))
        if changed != 1 or len(lines[0]) != len(lines[1]):
            found.append(f"{named}: {changed} lines are changed")
        if not Path(next(one for one in arguments_of(mutant) if one.endswith(".py"))).exists():
            found.append(f"{named}: there are no tests in test_{mutant.tests}.py")
    return found


def test_every_kernel_is_broken_in_three_ways() -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    kernels = {
        f"{path.stem.removesuffix('_triton')}.{kernel.__name__}"
        for path in (ROOT / "kernels").glob("*_triton.py")
        for kernel, _ in importlib.import_module(f"fastft.kernels.{path.stem}").variants()
    }
    assert Counter(mutant.kernel for mutant in MUTANTS) == dict.fromkeys(kernels, 3)
    assert len({(mutant.kernel, mutant.kind) for mutant in MUTANTS}) == len(MUTANTS)


def test_all_parts_of_the_engine_are_broken() -> None:
    kinds = Counter(mutant.kind for mutant in ENGINE)
    assert len({(mutant.kernel, mutant.kind) for mutant in ENGINE}) == len(ENGINE)
    assert min(kinds.values()) >= 6


def test_mutants_differ_in_one_place() -> None:
    assert faults((*MUTANTS, *PLAIN, *ENGINE)) == []
