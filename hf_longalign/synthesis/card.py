"""The card of a written data set: what it holds, what it was made from and how; pure text, the same for equal data."""

from collections.abc import Mapping, Sequence
from typing import Any


_COLUMNS = """\
| column | what it is |
| --- | --- |
| `messages` | the conversation: the task's prompt with all contexts, then the answer |
| `parts` | start and end (characters of `messages[message]["content"]`) of every context and of the question |
| `task`, `instruction`, `answer` | the seed |
| `reference` | what the prompt calls the context that is meant, where it has to say so |
| `gold_index`, `gold_depth` | which context holds the evidence; the share of the distractors before it |
| `n_contexts`, `context_tokens`, `total_tokens` | the length |
| `context_ids` | the seed or document each context comes from |
| `seed_id`, `generator`, `model`, `prompt_hash`, `journal_keys`, `attempts` | where the gold context comes from |
| `checks` | what was checked, with outcome ("passed", "failed", "open") and detail |
| `closed_book`, `answer_loss`, `answerable_with`, `answerable_without` | measured difficulty; null: not measured |
"""
_METHOD = {
    "context": (
        "Instructions and answers were written by people. The contexts were written by a language model so that they "
        "lead to the answer ([Context Synthesis](https://arxiv.org/abs/2502.15592)): they are input, never target."
    ),
    "given": "Instructions, answers and contexts come with the seeds; no model wrote any of it.",
    "instruction": (
        "Instructions and answers were written by a language model about given texts (instruction synthesis, the "
        "baseline of [Context Synthesis](https://arxiv.org/abs/2502.15592)): the targets are synthetic."
    ),
}


def dataset_card(
    *,
    method: str,
    model: str,
    splits: Mapping[str, Mapping[str, int]],
    tasks: Mapping[str, int],
    rejected: Mapping[str, int],
    tokens: Sequence[int],
    settings: Mapping[str, Any],
) -> str:
    """Return the README.md of a data set.

    Args:
        method: "context", "given" or "instruction".
        model: the model that wrote; empty for none.
        splits: rows by configuration and split.
        tasks: rows of `chat` by task.
        rejected: rejected seeds by reason.
        tokens: tokens of every row of `chat`; empty where none were counted.
        settings: the settings worth knowing, by name.

    Example:

    >>> card = dataset_card(method="given", model="", splits={"chat": {"train": 2}}, tasks={"qasper": 2}, rejected={},
    ...                     tokens=[100, 300], settings={"seed": 0})
    >>> "path: chat/train-*.parquet" in card, "100 to 300 tokens, 200 on average" in card
    (True, True)
    """
    length = ""
    if tokens:
        length = f"Rows have {min(tokens):,} to {max(tokens):,} tokens, {sum(tokens) // len(tokens):,} on average.\n\n"
    written = f"Model: `{model}`.\n\n" if model else ""
    dropped = "No seed was rejected.\n"
    if rejected:
        number = sum(rejected.values())
        dropped = f"{number:,} seeds were rejected, with the reason.\n\n{_table('reason', rejected)}"
    return (
        f"{_front_matter(splits, synthetic=method != 'given')}\n"
        "# Long-context instruction data\n\n"
        f"{_METHOD[method]} Each row holds one context that answers among others that distract.\n\n{written}{length}"
        f'```python\nfrom datasets import load_dataset\n\nchat = load_dataset("<this data set>", "chat")\n```\n\n'
        f"{_table('task', tasks)}\n## Columns of `chat`\n\n{_COLUMNS}\n"
        f"## Rejected\n\n{dropped}\n"
        f"## Settings\n\n{_table('setting', settings)}\n"
        "The prompts are LongBench's (https://github.com/THUDM/LongBench). Made with hf_longalign.\n"
    )


def _front_matter(splits: Mapping[str, Mapping[str, int]], *, synthetic: bool) -> str:
    lines = ["---", "configs:"]
    for config, by_split in splits.items():
        lines += [f"- config_name: {config}", *(["  default: true"] if config == "chat" else []), "  data_files:"]
        for split in by_split:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*.parquet"]
    tags = ["long-context", "context-synthesis", *(["synthetic"] if synthetic else [])]
    return "\n".join(
        [*lines, "task_categories:", "- question-answering", "tags:", *(f"- {tag}" for tag in tags), "---"]
    )


def _table(name: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return "\n".join([f"| {name} | |", "| --- | --- |", *rows]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
