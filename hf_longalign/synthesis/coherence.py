"""The paper's coherence tool: the same data with and without its contexts, and what the difference says.

Fine-tune one model on each and evaluate both alike. A small gap between the scores means that the instructions did not
need their contexts, so that the contexts taught nothing. It is a statement about a data set, not about a row
(https://arxiv.org/abs/2502.15592); rows have `answerable_with` and `answerable_without`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset


def without_contexts(chat: Dataset) -> Dataset:
    """Return `chat` with every context taken out: the instruction alone, then the answer; rows stay aligned.

    Rows of general data, which have no context, stay as they are.
    """

    def strip(row: dict[str, Any]) -> dict[str, Any]:
        if not row["n_contexts"]:
            return row
        question = {"role": "user", "content": row["instruction"]}
        part = {"message": 0, "start": 0, "end": len(row["instruction"]), "kind": "question"}
        empty: dict[str, Any] = dict.fromkeys(
            ("gold_index", "gold_depth", "context_tokens", "total_tokens", "reference")
        )
        bare = {"messages": [question, row["messages"][-1]], "parts": [part], "n_contexts": 0, "context_ids": []}
        return {**row, **empty, **bare}

    return chat.map(strip, features=chat.features)


@dataclass(frozen=True)
class Comparison:
    """Scores of the same evaluations for the two models, and the gap, in the unit of the scores."""

    rows: dict[str, tuple[float, float]]

    @property
    def gap(self) -> float:
        """The mean of the scores with contexts minus the mean of those without."""
        return sum(score - other for score, other in self.rows.values()) / len(self.rows)

    def to_markdown(self) -> str:
        """Return the report."""
        lines = [f"| {name} | {a:.2f} | {b:.2f} | {a - b:+.2f} |" for name, (a, b) in self.rows.items()]
        means = [sum(pair[side] for pair in self.rows.values()) / len(self.rows) for side in (0, 1)]
        return "\n".join(
            [
                "| evaluation | with contexts | without | gap |",
                "| --- | --- | --- | --- |",
                *lines,
                f"| mean | {means[0]:.2f} | {means[1]:.2f} | {self.gap:+.2f} |",
                "",
                "A gap near zero means that the instructions did not need their contexts.",
            ]
        )


def compare(with_contexts: Mapping[str, Any], without: Mapping[str, Any]) -> Comparison:
    """Compare two evaluation results, each a mapping of names to scores, nested or not.

    Raises:
        ValueError: the results do not name the same evaluations, or none.

    Example:

    >>> compare({"qasper": 30.0, "niah": {"single": 90}}, {"qasper": 20.0, "niah": {"single": 70}}).gap
    15.0
    """
    first, second = _flat(with_contexts), _flat(without)
    if not first or set(first) != set(second):
        only = sorted(set(first) ^ set(second))
        raise ValueError(f"The two results must name the same evaluations, got differences in {only or 'both: none'}.")
    return Comparison({name: (first[name], second[name]) for name in sorted(first)})


def _flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found
