"""What crosses the borders between the parts of the package: dataclasses that are JSON on disk and hold no logic."""

from hf_longalign.records.report import Report
from hf_longalign.records.training import TrainingRecord


__all__ = ["Report", "TrainingRecord"]
