"""What is matched in the families is what golden/ says, and as often as families.py does: see golden.py."""

import pytest

from models.families import Family, with_lora
from models.golden import DEPTH, FOLDER, KEPT, WRITE, difference, explained, has_adapters, path_of, text_of
from models.test_families import assert_counts


@pytest.mark.parametrize("family", KEPT, ids=lambda family: family.name)
def test_what_is_matched_is_what_was(family: Family) -> None:
    report = explained(family)
    assert_counts(report.graphs, with_lora(family, nf4=True) if has_adapters(family) else family, DEPTH)
    found = difference(family, text_of(family, report))
    if found:
        pytest.fail(
            f"explain() says something else than it did. If that is meant, run: {WRITE}\n{found}", pytrace=False
        )


def test_every_file_is_of_a_family_that_is_kept() -> None:
    assert sorted(FOLDER.iterdir()) == sorted(path_of(family) for family in KEPT)


def test_what_changed_is_shown_as_a_diff() -> None:
    kept = path_of(KEPT[0]).read_text(encoding="utf-8")
    assert difference(KEPT[0], kept) == ""
    found = difference(KEPT[0], kept.replace("   3  glu.silu", "   2  glu.silu")).splitlines()
    assert sum(line.startswith("-   3  glu.silu") for line in found) == 1
    assert sum(line.startswith("+   2  glu.silu") for line in found) == 1
