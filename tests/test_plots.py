import numpy as np
import pytest

from hf_longalign.evaluation.plots import plot_accuracy_by_length, plot_heatmap, spread


LENGTHS, DEPTHS = (64, 256, 1024), (0.0, 0.5, 1.0)


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
