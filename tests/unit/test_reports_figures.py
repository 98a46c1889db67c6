"""The figures draw the numbers they are given, and nothing covers anything."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from policies.result import CAUSES
from reports.figures.bounds import Standing, against_bounds
from reports.figures.distribution import tpot_distribution
from reports.figures.heat_maps import heat_maps
from reports.figures.link import bin_link, link_over_time
from reports.figures.memory import speed_against_memory
from reports.figures.miss_ratio import BOUND, THEORY, miss_ratio_curves
from reports.figures.prefetch import NONE, prefetch_quality
from reports.figures.style import CAUSE_FILLS, line_style, to_bytes, wrap
from reports.figures.token_time import time_per_token
from reports.gallery import charts
from tests.unit.reports_fakes import PARTS, fake_recording, fake_result

LONG = "a policy with a very long name (markov), 12.5 %, horizon=4 width=2 batch 16"


def names(count):
    return [f"{LONG} {i}" if i % 3 == 2 else f"run {i}, 25 %" for i in range(count)]


def all_figures(count):
    """Every kind of figure for *count* runs."""
    labels = names(count)
    recordings = [fake_recording(prefetch=i % 2 == 1) for i in range(count)]
    seconds = np.linspace(0.008, 0.02, 50)
    shares = {"accuracy": 0.7, "coverage": 0.2, "timeliness": 0.9}
    return {
        "token_time": time_per_token([(n, PARTS) for n in labels]),
        "bounds": against_bounds([Standing(n, 0.4, 0.3, 1 + i) for i, n in enumerate(labels)]),
        "memory": speed_against_memory(
            {n: [(2.0, 10.0), (3.0, 12.0 + i)] for i, n in enumerate(labels)},
            [(2.0, 20.0), (3.0, 30.0), (5.0, 40.0)],
        ),
        "miss_ratio": miss_ratio_curves(
            {n: [(8, 0.6), (16, 0.3)] for n in labels} | {"belady": [(8, 0.4), (16, 0.2)]},
            32,
            popularity=np.arange(32),
            cycle=8,
        ),
        "prefetch": prefetch_quality([(n, shares if i % 2 else None) for i, n in enumerate(labels)])
        if count > 1
        else prefetch_quality([(labels[0], shares)]),
        "distribution": tpot_distribution({n: seconds * (1 + i) for i, n in enumerate(labels)}),
        "link": link_over_time(
            [bin_link(n, r.steps, r.queue) for n, r in zip(labels, recordings, strict=True)]
        ),
        "heat_maps": heat_maps(np.full((4, 8), 0.2), {n: np.full((4, 8), 0.5) for n in labels}),
    }


@pytest.fixture(scope="module", params=[1, 4, 12])
def figures(request) -> dict[str, Figure]:
    drawn = all_figures(request.param)
    for figure in drawn.values():
        figure.canvas.draw()
    return drawn


def boxes(figure):
    """The box of each visible axes with its labels."""
    return [axes.get_tightbbox() for axes in figure.get_axes() if axes.get_visible()]


def test_legends_lie_outside_the_axes(figures):
    for name, figure in figures.items():
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes) for axes in boxes(figure)), name


def test_nothing_is_cut_off(figures):
    for name, figure in figures.items():
        width, height = figure.canvas.get_width_height()
        parts = boxes(figure) + [legend.get_window_extent() for legend in figure.legends]
        for box in parts:
            assert box.x0 >= -1, name
            assert box.y0 >= -1, name
            assert box.x1 <= width + 1, name
            assert box.y1 <= height + 1, name


def test_axes_do_not_overlap(figures):
    for name, figure in figures.items():
        drawn = boxes(figure)
        for i, box in enumerate(drawn):
            assert not any(box.padded(-2).overlaps(other) for other in drawn[i + 1 :]), name


def test_axes_are_labelled(figures):
    for name in ("token_time", "bounds", "memory", "miss_ratio", "prefetch", "distribution"):
        axes = figures[name].axes[0]
        assert "(" in axes.get_xlabel(), name
        assert axes.get_ylabel() or [t.get_text() for t in axes.get_yticklabels()], name


def test_bars_add_up_to_the_time_per_token():
    runs = [("lru", PARTS), ("half", {c: s / 2 for c, s in PARTS.items()})]
    axes = time_per_token(runs).axes[0]
    for row, (_, parts) in enumerate(runs):
        bars = [container.patches[row] for container in axes.containers]
        assert sum(bar.get_width() for bar in bars) == pytest.approx(1e3 * sum(parts.values()))
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(1e3 * sum(parts.values()))
    assert len(axes.containers) == sum(seconds > 0 for seconds in PARTS.values())


def test_no_decode_steps_are_said():
    figure = time_per_token([("lru", dict.fromkeys(CAUSES, 0.0))])
    assert "No decode steps" in figure.texts[0].get_text()


def test_curves_are_drawn_in_per_cent_with_belady_and_theory():
    figure = miss_ratio_curves(
        {"lru": [(16, 0.3), (8, 0.6)]}, 32, runs={"belady": [(8, 0.4)]}, popularity=np.ones(32)
    )
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["lru"].get_xdata().tolist() == [25, 50]
    assert lines["lru"].get_ydata().tolist() == [60, 30]
    assert lines[BOUND].get_ydata().tolist() == [40]
    # Equal popularity: what does not fit is missed.
    x, y = lines[THEORY].get_data()
    assert np.allclose(y, 100 - x)


def test_marks_of_runs_lie_on_their_curve():
    figure = miss_ratio_curves(
        {"lru": [(8, 0.6), (16, 0.3)]}, 32, runs={"lru": [(12, 0.45)], "fifo": [(12, 0.5)]}
    )
    drawn = [(list(ln.get_xdata()), list(ln.get_ydata())) for ln in figure.axes[0].lines]
    assert ([37.5], [45.0]) in drawn
    assert ([25.0, 37.5, 50.0], [60.0, 45.0, 30.0]) in drawn
    assert len(figure.legends[0].get_texts()) == 2


def test_limit_between_budgets_is_that_of_the_larger():
    figure = speed_against_memory({"lru": [(2, 5)]}, [(2, 10), (4, 30)])
    step = figure.axes[0].lines[1]
    assert step.get_drawstyle() == "steps-pre"
    assert list(step.get_ydata()) == [10, 30]
    assert "output tokens" in figure.axes[0].get_ylabel()


def test_bounds_draw_seconds():
    axes = against_bounds([Standing("lru", 0.4, 0.3, 1.0), Standing("x", 1, 2, 4, False)]).axes[0]
    widths = [[bar.get_width() for bar in container.patches] for container in axes.containers]
    assert widths == [[1.0, 4], [0.4, 1], [0.3, 2]]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["40 % of the limit's speed", "not exact: may pass the limit"]


def test_prefetch_shares():
    shares = {"accuracy": 0.7, "coverage": 0.2, "timeliness": 0.9}
    axes = prefetch_quality([("lru", None), ("predictive", shares)]).axes[0]
    assert [c.patches[1].get_width() for c in axes.containers] == pytest.approx([70, 20, 90])
    assert "no prefetches" in [text.get_text() for text in axes.texts]


def test_no_prefetches_at_all_are_explained():
    figure = prefetch_quality([("lru", None), ("belady", None)])
    assert figure.texts[0].get_text() == NONE
    assert not figure.axes


def test_link_in_bins():
    recording = fake_recording(steps=40, prefetch=True)
    series = bin_link("run", recording.steps, bins=10)
    assert len(series.edges_s) == 11
    assert series.utilisation == pytest.approx([0.4] * 10)
    assert series.demand_bytes_per_s == pytest.approx([10 * 2**20 / 0.01] * 10)
    assert series.prefetch_bytes_per_s.sum() * 0.04 == pytest.approx(40 * 5 * 2**20)
    assert not series.queue_moves.any()


def test_queue_is_a_mean_over_time():
    recording = fake_recording(steps=4)
    samples = [(0.0, 2), (0.01, 0), (0.02, 4), (0.03, 0)]
    series = bin_link("run", recording.steps, samples, bins=2)
    assert series.queue_moves == pytest.approx([1.0, 2.0])


def test_link_panels():
    still, busy = fake_recording(), fake_recording(prefetch=True)
    assert len(link_over_time([bin_link("a", still.steps)]).axes) == 2
    assert len(link_over_time([bin_link("a", busy.steps, busy.queue)]).axes) == 3
    both = link_over_time([bin_link("a", still.steps), bin_link("b", busy.steps, busy.queue)])
    tops = [axes.get_ylim()[1] for axes in (both.axes[1], both.axes[4])]
    assert tops == pytest.approx([1.05 * 15 * 2**20 / 0.01 / 1e9] * 2)


def test_idle_link_is_said():
    recording = fake_recording()
    for row in recording.steps:
        row.link_busy_s = 0.0
    figure = link_over_time([bin_link("a", recording.steps)])
    assert "Nothing crossed the link" in figure.texts[0].get_text()


def test_distribution_reaches_its_quantiles():
    line = tpot_distribution({"lru": np.linspace(0.01, 0.02, 101)}).axes[0].lines[0]
    x, y = line.get_data()
    assert np.interp(50, y, x) == pytest.approx(15)
    assert np.interp(99, y, x) == pytest.approx(19.9)


def test_distribution_of_nothing_is_said():
    figure = tpot_distribution({"lru": np.array([])})
    assert "No decode steps" in figure.texts[0].get_text()


def test_heat_maps_show_the_grids():
    popularity, held = np.arange(32).reshape(4, 8) / 40, np.eye(4, 8)
    figure = heat_maps(popularity, {"lru": held})
    images = [axes.images[0] for axes in figure.get_axes() if axes.images]
    assert np.allclose(images[0].get_array(), 100 * popularity)
    assert np.allclose(images[1].get_array(), 100 * held)
    assert images[1].get_clim() == (0, 100)


def luminance(colour):
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_causes_survive_greyscale():
    fills = sorted(luminance(fill) for fill, _ in CAUSE_FILLS.values())
    assert min(np.diff(fills)) > 0.03
    stalls = {CAUSE_FILLS[cause][1] for cause in ("stall_demand", "stall_late", "idle")}
    assert len(stalls) == 3
    assert "" not in stalls


def test_twelve_lines_differ_without_colour():
    looks = {(line_style(i)["marker"], str(line_style(i)["linestyle"])) for i in range(12)}
    assert len(looks) == 12


def test_numbers_stay_beside_their_sign():
    assert wrap("predictive (ahead), 25 %", 23).splitlines()[-1] == "25\u00a0%"


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_figure_gives_the_same_bytes(kind):
    first, second = (to_bytes(time_per_token([("lru", PARTS)]), kind) for _ in range(2))
    assert first == second
    assert b"matplotlib" not in first.lower().split(b"<defs", 1)[0]


def test_a_users_settings_do_not_matter(monkeypatch):
    import matplotlib as mpl

    usual = to_bytes(time_per_token([("lru", PARTS)]), "png")
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "figure.facecolor": "red"}):
        assert to_bytes(time_per_token([("lru", PARTS)]), "png") == usual


def test_gallery_without_recordings_has_what_results_allow():
    found = charts([fake_result("lru"), fake_result("belady")])
    assert [c.name for c in found] == ["token-time", "bounds", "miss-ratio", "memory", "prefetch"]
    assert all(len(chart.caption) > 80 for chart in found)


def test_gallery_with_recordings():
    results = [fake_result("lru"), fake_result("predictive")]
    found = charts(results, {0: fake_recording(), 1: fake_recording(prefetch=True)})
    assert {c.name for c in found} >= {"distribution", "link", "heat-maps"}
    assert len(found) == 8


def test_gallery_draws_no_single_curve_for_different_models():
    other = {**fake_result().model, "layers": 9}
    found = charts([fake_result(), fake_result(model=other)])
    assert "miss-ratio" not in [chart.name for chart in found]


def test_no_limit_is_drawn_over_different_settings():
    runs = [fake_result(), fake_result(batch=4)]
    memory = next(chart for chart in charts(runs) if chart.name == "memory")
    assert "limit" not in memory.caption
    assert len(memory.figure.axes[0].lines) == 2
    assert not memory.figure.axes[0].collections
