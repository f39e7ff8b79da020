"""Does a data set need its contexts? Write it with and without them, train on both, and compare the evaluations.

hf-longalign coherence split outputs/contexts outputs/coherence
hf-longalign sft … --dataset_name outputs/coherence/with          # and once more with …/without
hf-longalign evaluate …                                           # of both
hf-longalign coherence compare outputs/report-with outputs/report-without --output coherence.md
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_longalign.records import Report


def split(args: argparse.Namespace) -> None:
    """Write the two aligned data sets."""
    from datasets import load_dataset

    from hf_longalign.synthesis.coherence import without_contexts

    for split_name, chat in load_dataset(args.data, "chat").items():
        for kind, data in (("with", chat), ("without", without_contexts(chat))):
            folder = Path(args.output) / kind
            folder.mkdir(parents=True, exist_ok=True)
            data.to_parquet(folder / f"{split_name}.parquet")
            print(f"{folder / f'{split_name}.parquet'}: {len(data):,} rows")


def report(args: argparse.Namespace) -> None:
    """Print, and write where asked, the comparison of two evaluations."""
    from hf_longalign.synthesis.coherence import compare

    text = compare(read_scores(args.with_contexts), read_scores(args.without)).to_markdown()
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
