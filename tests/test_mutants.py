"""tests/mutants.py changes what it says it changes; that the mutants are caught is for the script to show."""

import importlib
from collections import Counter

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

from mutants import MUTANTS, ROOT, Mutant, mutated, path_of


def test_every_kernel_is_broken_in_three_ways() -> None:
    kernels = {
        f"{path.stem.removesuffix('_triton')}.{kernel.__name__}"
        for path in (ROOT / "kernels").glob("*_triton.py")
        for kernel, _ in importlib.import_module(f"fastft.kernels.{path.stem}").variants()
    }
    assert Counter(mutant.kernel for mutant in MUTANTS) == dict.fromkeys(kernels, 3)
    assert len({(mutant.kernel, mutant.kind) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kernel}-{mutant.kind}")
def test_a_mutant_differs_in_one_place(mutant: Mutant) -> None:
    before, after = path_of(mutant.where).read_text(), mutated(mutant)
    compile(after, str(path_of(mutant.where)), "exec")
    assert before != after
    assert sum(one != other for one, other in zip(before.splitlines(), after.splitlines(), strict=True)) == 1
