"""Does a data set need its contexts? Write it with and without them, train on both, and compare the evaluations.

python recipes/coherence.py split outputs/contexts outputs/coherence
accelerate launch recipes/sft.py … --dataset_name outputs/coherence/with       # and once more with .../without
python recipes/coherence.py compare with.json without.json --output report.md
"""

import argparse
import json
from pathlib import Path

from datasets import load_dataset

from hf_longalign.synthesis.coherence import compare, without_contexts


def split(args: argparse.Namespace) -> None:
    """Write the two aligned data sets."""
    for split_name, chat in load_dataset(args.data, "chat").items():
        for kind, data in (("with", chat), ("without", without_contexts(chat))):
            folder = Path(args.output) / kind
            folder.mkdir(parents=True, exist_ok=True)
            data.to_parquet(folder / f"{split_name}.parquet")
            print(f"{folder / f'{split_name}.parquet'}: {len(data):,} rows")


def report(args: argparse.Namespace) -> None:
    """Print, and write where asked, the comparison of two evaluation results (JSON, names to scores)."""
    with_contexts, without = (json.loads(Path(path).read_text()) for path in (args.with_contexts, args.without))
    text = compare(with_contexts, without).to_markdown()
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n")


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("split", help="write the data with and without its contexts")
    command.add_argument("data", help="a folder that recipes/synthesize.py wrote, or a Hub data set")
    command.add_argument("output", help="folder for the two data sets")
    command.set_defaults(run=split)
    command = commands.add_parser("compare", help="compare the evaluations of the two models")
    command.add_argument("with_contexts", help="JSON of the model trained with contexts")
    command.add_argument("without", help="JSON of the model trained without")
    command.add_argument("--output", help="also write the report to this file")
    command.set_defaults(run=report)
    args = parser.parse_args()
    args.run(args)
    return 0
