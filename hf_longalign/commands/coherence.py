"""Does a data set need its contexts? Write it with and without them, train on both, and compare the evaluations.

hf-longalign coherence split outputs/contexts outputs/coherence
hf-longalign sft … --dataset_name outputs/coherence/with          # and once more with …/without
hf-longalign evaluate …                                           # of both
hf-longalign coherence compare outputs/report-with outputs/report-without --output coherence.md
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hf_longalign.cards.page import table
from hf_longalign.records import Report


if TYPE_CHECKING:
    from datasets import Dataset


def split(args: argparse.Namespace) -> None:
    """Write the two aligned data sets."""
    from datasets import load_dataset

    for split_name, chat in load_dataset(args.data, "chat").items():
        for kind, data in (("with", chat), ("without", without_contexts(chat))):
            folder = Path(args.output) / kind
            # A folder each, which `sft --dataset_name` takes as a data set of its own.
            folder.mkdir(parents=True, exist_ok=True)
            data.to_parquet(folder / f"{split_name}.parquet")
            print(f"{folder / f'{split_name}.parquet'}: {len(data):,} rows")


def report(args: argparse.Namespace) -> None:
    """Print, and write where asked, the comparison of two evaluations."""
    text = compare(read_scores(args.with_contexts), read_scores(args.without))
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n")


def read_scores(path: str) -> dict[str, Any]:
    """Return the scores of an evaluation: those of its last model, in percent, or what a JSON of scores holds."""
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"{path} must be a folder with report.json, or a JSON of scores, got neither. Evaluate first."
        )
    found = json.loads(file.read_text("utf-8"))
    if "suites" not in found:
        return found
    report = Report.from_json(found)
    # The model of interest comes last: the adapter, not its base.
    label = report.labels[-1]
    return {
        f"{suite.suite}: {task.task}": 100 * task.scores[label].value
        for suite in report.suites
        for task in suite.tasks
        if label in task.scores
    }


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Return which of the two is to be done, and to what."""
    parser = argparse.ArgumentParser(
        prog="hf-longalign coherence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("split", help="write the data with and without its contexts")
    command.add_argument("data", help="a folder that synthesize wrote, or a Hub data set")
    command.add_argument("output", help="folder for the two data sets")
    command.set_defaults(act=split)
    command = commands.add_parser("compare", help="compare the evaluations of the two models")
    command.add_argument("with_contexts", help="report of the model trained with contexts: its folder or a JSON")
    command.add_argument("without", help="report of the model trained without")
    command.add_argument("--output", help="also write the comparison to this file")
    command.set_defaults(act=report)
    return (parser.parse_args(arguments),)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    args.act(args)
    return 0


def without_contexts(chat: "Dataset") -> "Dataset":
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

    # With its features: a column that is null in every row would lose its type.
    return chat.map(strip, features=chat.features)


def compare(with_contexts: Mapping[str, Any], without: Mapping[str, Any]) -> str:
    """Return a table of two evaluation results, each a mapping of names to scores, nested or not, and of their gap.

    Raises:
        ValueError: the results do not name the same evaluations, or none.

    >>> print(compare({"qasper": 30.0, "niah": {"single": 90}}, {"qasper": 20.0, "niah": {"single": 70}}))
    | evaluation | with contexts | without | gap |
    | --- | ---: | ---: | ---: |
    | niah/single | 90.00 | 70.00 | +20.00 |
    | qasper | 30.00 | 20.00 | +10.00 |
    | mean | 60.00 | 45.00 | +15.00 |
    <BLANKLINE>
    A gap near zero means that the instructions did not need their contexts.
    """
    first, second = _flat(with_contexts), _flat(without)
    if not first or set(first) != set(second):
        only = sorted(set(first) ^ set(second))
        raise ValueError(f"The two results must name the same evaluations, got differences in {only or 'both: none'}.")
    pairs = {name: (first[name], second[name]) for name in sorted(first)}
    pairs["mean"] = (fmean(first.values()), fmean(second.values()))
    rows = [(name, f"{a:.2f}", f"{b:.2f}", f"{a - b:+.2f}") for name, (a, b) in pairs.items()]
    scores = table(("evaluation", "with contexts", "without", "gap"), rows, right=(1, 2, 3))
    return f"{scores}\n\nA gap near zero means that the instructions did not need their contexts."


def _flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found
