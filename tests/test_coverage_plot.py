import numpy as np
import pytest

from hf_longalign.coverage import DistanceCoverage
from hf_longalign.coverage_plot import plot_coverage
from hf_longalign.records.training import CoverageRecord


def coverage(target=256, jump=100):
    counted = DistanceCoverage(target)
    counted.add(np.concatenate([np.arange(20), np.arange(20 + jump, 40 + jump)]))
    return counted.record()


def test_the_picture_follows_the_numbers_and_the_lengths(tmp_path):
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
