"""docs/expertflow.md is what the rows beside it make of it."""

from __future__ import annotations

from benchmarks.expertflow import figures, page, slowest
from tests.helpers import ROOT

DATA = ROOT / "docs/expertflow"


def test_the_page_says_what_its_numbers_say() -> None:
    """The committed page is what the committed rows make of it."""
    text = (ROOT / "docs/expertflow.md").read_text(encoding="utf-8")
    found = page.sections(DATA)
    assert page.filled(text, found, "docs/expertflow.md") == text
    assert page.NOT_RUN not in found.values()


def test_every_figure_of_the_page_has_rows() -> None:
    names = {name for name, _ in figures.drawn(DATA)}
    assert names == {"gaps", "hits", "speeds", "scheduling", "recall"}
    for name in names:
        assert 0 < (DATA / f"{name}.png").stat().st_size < 300_000
        assert f"expertflow/{name}.png" in (ROOT / "docs/expertflow.md").read_text()


def test_the_committed_cells_are_not_slower_than_lru() -> None:
    found = slowest.pairs(DATA)
    assert len(found) > 200
    assert not slowest.slower(found)
