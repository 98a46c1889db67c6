"""The HTML page: whole, self-contained, the same every time, or one line of error."""

import json
import re
from html.parser import HTMLParser

import pytest

from policies.result import read_results
from reports import html
from reports.html import write_report
from tests.unit.reports_fakes import borrowed, fake_recording, fake_result
from traces.errors import InputError

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Tags in order, all links and sources, ids, and the text between the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        named = dict(attrs)
        self.links += [named[key] for key in ("src", "href") if key in named]
        self.ids += [named["id"]] if "id" in named else []
        if tag == "img":
            self.images.append(named)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def runs():
    results = [fake_result(name) for name in ("lru", "predictive", "belady")]
    return results, {0: fake_recording(), 1: fake_recording(prefetch=True)}


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out") / "deep" / "report"
    curves = {"lru": [(8, 0.7), (16, 0.5)], "belady": [(8, 0.4), (16, 0.2)]}
    page = write_report(directory, *runs, curves, "A title <&>", command="simctl compare --x 'a b'")
    assert page == directory / "index.html"
    return directory


@pytest.fixture(scope="module")
def page(report):
    return Page((report / "index.html").read_text(encoding="utf-8"))


def test_page_is_self_contained(page):
    assert "script" not in page.tags
    assert "link" not in page.tags
    for link in page.links:
        assert link.startswith(("data:image/svg+xml;base64,", "#", "figures/", "results.json")), (
            link
        )


def test_style_asks_for_nothing(report):
    text = (report / "index.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]
    assert "@media print" in style[1]


def test_links_lead_somewhere(page, report):
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif not link.startswith("data:"):
            assert (report / link).is_file()
    assert len(page.ids) == len(set(page.ids))


def test_every_figure_has_words_and_files(page, report):
    assert len(page.images) == 8
    assert all(len(image["alt"] or "") > 80 for image in page.images)
    names = sorted(path.name for path in (report / "figures").iterdir())
    assert len(names) == 16
    assert {"token-time.svg", "token-time.png", "heat-maps.svg", "miss-ratio.png"} <= set(names)


def test_page_tells_the_numbers_and_where_they_come_from(page):
    for text in (
        "A title <&>",
        "predictive (ahead), 50\u00a0%",
        "10.0 ms",
        "Time in which the host-to-device engine copies",
        "bench (measured)",
        "simctl compare --x 'a b'",
        "matplotlib",
        "abababab",
        "horizon=4",
    ):
        assert text in page.text, text


def test_results_can_be_read_again(report, runs):
    assert read_results(report / "results.json") == list(runs[0])
    assert isinstance(json.loads((report / "results.json").read_text()), list)


def test_same_runs_give_the_same_bytes(runs, tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, runs[0][:1], {0: runs[1][0]})
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 18
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_what_a_reader_must_know_comes_first(tmp_path):
    result = fake_result("mixed", slots=4, quality={"low_accesses": 0.25, "low_weight": 0.1})
    result = fake_result(
        "mixed",
        slots=4,
        quality=result.quality,
        model=borrowed(result, "mixtral-8x7b"),
        hardware={"name": "rtx", "kind": "datasheet"},
    )
    text = Page(write_report(tmp_path, [result]).read_text(encoding="utf-8")).text
    head = text[: text.index("At a glance")]
    assert "sizes of one layer taken from mixtral-8x7b" in head
    assert "4 slots are fewer than the 8 experts of one token" in head
    assert "rtx is a datasheet profile" in head
    assert "mixed is not exact" in head
    assert "25.00\u00a0%" in text


def test_many_runs_stay_in_tables_of_five(tmp_path):
    runs = [fake_result(slots=8 + i) for i in range(12)]
    text = write_report(tmp_path, runs).read_text(encoding="utf-8")
    Page(text)
    assert text.count('<th class="words" scope="col">metric</th>') == 3
    assert text.count("what it says") == 1


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("taken")
    for path in (tmp_path / "file", tmp_path / "file" / "report"):
        with pytest.raises(InputError) as error:
            write_report(path, [fake_result()])
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "taken"


def test_no_results_are_refused(tmp_path):
    with pytest.raises(InputError, match="no results"):
        write_report(tmp_path / "x", [])
    assert not (tmp_path / "x").exists()


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(html, "_page", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "report", [fake_result()])
    assert list(tmp_path.iterdir()) == []
