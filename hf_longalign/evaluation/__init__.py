"""Evaluation of long-context models: the same questions for base and adapter, and a report of what changed."""

from typing import TYPE_CHECKING

from hf_longalign.lazy import lazy_exports


if TYPE_CHECKING:
    from hf_longalign.evaluation.evaluator import evaluate

_EXPORTS = {"evaluate": "evaluator"}

__all__, __getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
