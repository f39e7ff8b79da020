"""Pictures: what they show follows the numbers, and every name on them can be read."""

import sys

import numpy as np
import pytest

from hf_longalign.coverage import DistanceCoverage
from hf_longalign.evaluation.report import draw_pictures
from hf_longalign.plots import (
    plot_accuracy_by_length,
    plot_coverage,
    plot_distances,
    plot_heatmap,
    plot_lengths,
    plot_perplexity,
    spread,
)
from hf_longalign.records.report import EvaluatedModel, Grid, PerplexityResult, Report, Score, SuiteResult, TaskResult
from hf_longalign.records.training import CoverageRecord


LENGTHS, DEPTHS = (64, 256, 1024), (0.0, 0.5, 1.0)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is written, by the stem of its file."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed (extra: plot)").Figure
    found, save = {}, figure.savefig

    def keep(self, path, **options):
        found[path.stem] = self
        save(self, path, **options)

    monkeypatch.setattr(figure, "savefig", keep)
    return found


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def report(labels, tasks=("single",), lengths=LENGTHS, depths=DEPTHS, suite="needle", **others):
    """Task number i has i / 10 in every cell of the first model, and 0.1 more for each model after it."""
    results = []
    for number, task in enumerate(tasks):
        value = {label: number / 10 + index / 10 for index, label in enumerate(labels)}
        cells = {label: [[value[label]] * len(lengths)] * len(depths) for label in labels}
        scores = {
            label: [Score(value[label], value[label] - 0.1, value[label] + 0.1)] * len(lengths) for label in labels
        }
        grid = Grid(list(lengths), list(depths), cells, scores)
        results.append(TaskResult(task, "exact_match", 4, {label: Score(value[label]) for label in labels}, grid=grid))
    return Report([EvaluatedModel(label, "org/model") for label in labels], [SuiteResult(suite, results)], **others)


def coverage(target=256, jump=100):
    counted = DistanceCoverage(target)
    counted.add(np.concatenate([np.arange(20), np.arange(20 + jump, 40 + jump)]))
    return counted.record()


def test_pictures_are_written_and_follow_the_numbers(tmp_path):
    curves = {"base": [1.0, 0.5, 0.1], "skip_all": [1.0, 1.0, 0.99]}
    first = plot_accuracy_by_length(curves, LENGTHS, tmp_path / "new" / "a.png", title="T", train_length=64)
    again = plot_accuracy_by_length(curves, LENGTHS, tmp_path / "b.png", title="T", train_length=64)
    other = plot_accuracy_by_length(
        {**curves, "base": [1.0, 0.5, 0.9]}, LENGTHS, tmp_path / "c.png", title="T", train_length=64
    )
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_heatmap_has_a_panel_per_model(tmp_path):
    grid = np.linspace(0, 1, 9).reshape(3, 3)
    one = plot_heatmap({"base": grid}, LENGTHS, DEPTHS, tmp_path / "one.png", title="T")
    two = plot_heatmap({"base": grid, "skip_all": grid}, LENGTHS, DEPTHS, tmp_path / "two.png", title="T")
    assert two.stat().st_size > one.stat().st_size


@pytest.mark.parametrize("values", [[1.0, 0.5], [1.0, 0.5, 1.2], [1.0, 0.5, float("nan")], [[1.0, 0.5, 0.2]]])
def test_bad_accuracies_are_named(tmp_path, values):
    with pytest.raises(ValueError, match="`base` must hold accuracies from 0 to 1"):
        plot_accuracy_by_length({"base": values}, LENGTHS, tmp_path / "a.png", title="T")


def test_labels_keep_their_order_and_their_distance():
    heights = {"a": 0.98, "b": 0.98, "c": 0.95, "d": 0.5, "e": 0.47, "f": 0.99}
    placed = spread(heights, gap=0.06, top=1.06)
    by_place = sorted(placed, key=placed.get)
    assert [heights[name] for name in by_place] == sorted(heights.values())
    assert np.diff(sorted(placed.values())).min() > 0.06 - 1e-9
    assert max(placed.values()) <= 1.06


def test_coverage_follows_the_numbers_and_the_lengths(tmp_path):
    first = plot_coverage(coverage(), tmp_path / "new" / "a.png", evaluated_lengths=[64, 256, 512])
    again = plot_coverage(coverage(), tmp_path / "b.png", evaluated_lengths=[64, 256, 512])
    others = [
        plot_coverage(coverage(jump=150), tmp_path / "c.png", evaluated_lengths=[64, 256, 512]),
        plot_coverage(coverage(), tmp_path / "d.png"),
    ]
    assert first.read_bytes().startswith(b"\x89PNG") and first.read_bytes() == again.read_bytes()
    assert all(other.read_bytes() != first.read_bytes() for other in others)
    assert b"Software" not in first.read_bytes()


def test_a_record_without_histogram_is_named(tmp_path):
    with pytest.raises(ValueError, match="`coverage` must hold a histogram"):
        plot_coverage(CoverageRecord(8), tmp_path / "a.png")


def test_a_report_is_drawn_for_three_models(tmp_path, figures):
    labels = ["base", "base, scaled", "adapter"]
    perplexity = PerplexityResult([0, 8, 16], 16, 1, {label: [9.0, None] for label in labels})
    names = draw_pictures(
        report(labels, ("multi_key", "single"), perplexity=perplexity), tmp_path, coverage=coverage(target=2048)
    )
    assert names == [
        "needle_accuracy.png",
        "needle_heatmap.png",
        "needle_multi_key.png",
        "needle_single.png",
        "perplexity.png",
        "coverage.png",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert texts(figures["needle_accuracy"]) == ["0.25  adapter", "0.15  base, scaled", "0.05  base"]
    heatmap = figures["needle_single"]
    assert [axes.get_title() for axes in heatmap.axes[:3]] == labels
    assert texts(heatmap) == ["0.10"] * 9 + ["0.20"] * 9 + ["0.30"] * 9
    assert figures["needle_heatmap"].get_suptitle() == "Needle in a haystack, mean of 2 tasks"
    assert heatmap.get_suptitle() == "Needle in a haystack, single"
    assert figures["perplexity"].get_suptitle() == "Perplexity by position, 1 document"
    assert sorted(texts(figures["coverage"])) == sorted(["16", "64", "256", "1,024"])
    colours = [[line.get_color() for line in figures["needle_accuracy"].axes[0].lines[:3]]]
    colours += [[steps.get_edgecolor() for steps in figures["perplexity"].axes[0].patches]]
    from matplotlib.colors import to_hex

    assert len({tuple(to_hex(colour) for colour in some) for some in colours}) == 1


def test_the_band_of_a_mean_is_that_of_independent_tasks(tmp_path, figures):
    draw_pictures(report(["base"], ("a", "b", "c", "d")), tmp_path)
    band = figures["needle_accuracy"].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    # Four tasks with the mean 0.15, each known to 0.1: the mean is known to 0.1 / sqrt(4).
    assert (band.min(), band.max()) == pytest.approx((0.1, 0.2))


def test_only_tasks_of_one_grid_are_averaged_and_one_depth_has_no_heatmap(tmp_path, figures):
    both = report(["base"], ("a",), depths=(0.5,), suite="ruler")
    (suite,) = report(["base"], ("b", "c"), lengths=(64, 128), suite="ruler").suites
    both.suites[0].tasks.extend([*suite.tasks, TaskResult("d", error="not measured")])
    assert draw_pictures(both, tmp_path) == ["ruler_accuracy.png"]
    assert figures["ruler_accuracy"].get_suptitle() == "RULER, a"
    both.suites[0].tasks.reverse()
    assert draw_pictures(both, tmp_path) == [f"ruler_{name}.png" for name in ("accuracy", "heatmap", "c", "b", "a")]
    assert figures["ruler_heatmap"].get_suptitle() == "RULER, mean of 2 tasks"
    assert draw_pictures(Report([], []), tmp_path) == []


@pytest.mark.parametrize("count", [1, 6, 8, 11])
def test_every_evaluated_length_is_named_and_no_names_meet(tmp_path, figures, count):
    lengths = [1024 << power for power in range(count)]
    plot_coverage(coverage(target=65536, jump=60000), tmp_path / "a.png", evaluated_lengths=lengths)
    figure = figures["a"]
    assert texts(figure) == [f"{length:,}" for length in reversed(lengths)]
    names = figure.axes[0].texts
    boxes = [text.get_window_extent() for text in names]
    assert all(not one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    frame = figure.axes[0].get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 for box in boxes)


def test_bins_without_a_token_are_gaps(tmp_path, figures):
    plot_perplexity({"base": [4.0, None, 3.0]}, [0, 8, 16, 32], tmp_path / "p.png", title="T")
    (steps,) = figures["p"].axes[0].patches
    np.testing.assert_array_equal(steps.get_data().values, [4.0, np.nan, 3.0])
    with pytest.raises(ValueError, match="`base` must hold 3 values"):
        plot_perplexity({"base": [4.0]}, [0, 8, 16, 32], tmp_path / "q.png", title="T")
    assert not (tmp_path / "q.png").exists()


def test_rows_without_distractors_have_lengths_alone(tmp_path, figures):
    plot_lengths([10, 20, 20], [], tmp_path / "one.png", unit="words")
    plot_lengths([10, 20, 20], [0.0, 1.0], tmp_path / "two.png")
    (axes,) = figures["one"].axes
    assert axes.get_xlabel() == "length of a row in words" and len(figures["two"].axes) == 2
    assert sum(bar.get_height() for bar in axes.patches) == 3


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "hf_longalign\[plot\]"'):
        plot_coverage(coverage(), tmp_path / "a.png")


def test_distances_are_drawn_as_they_are(tmp_path, figures):
    curves = {"before training": [2.0, 3.0], "after training": [1.5, 1.6]}
    plot_distances(curves, [256, 1024], tmp_path / "distances.png", title="Loss", ordinary=1.4)
    (axes,) = figures["distances"].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {**curves, "rows as they are": [1.4, 1.4]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "1,024"]
