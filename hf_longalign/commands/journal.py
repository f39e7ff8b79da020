"""Look into the journal of a synthesis: what was asked, what came back, what it cost.

hf-longalign journal list journal.sqlite --purpose context
hf-longalign journal show journal.sqlite 3f9a
hf-longalign journal export journal.sqlite replies.jsonl
hf-longalign journal merge journal.sqlite shards/
hf-longalign journal drop journal.sqlite --reason empty
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hf_longalign.synthesis.journal import Entry, Journal
from hf_longalign.synthesis.prompts import ReplyError, read_context, read_facts, read_pair, read_verdict


READERS = {
    **dict.fromkeys(("context", "section"), read_context),
    "facts": read_facts,
    "pair": read_pair,
    "judge": read_verdict,
}


def is_unreadable(entry: Entry) -> bool:
    """Return whether the reply does not hold what it was asked for."""
    try:
        READERS.get(entry.purpose, str)(entry.text)
    except ReplyError:
        return True
    return False


# Why a reply may be unwanted.
REASONS = {
    "empty": lambda entry: not entry.text.strip() and entry.finish_reason != "content_filter",
    "error": lambda entry: entry.finish_reason == "error",
    "filtered": lambda entry: entry.finish_reason == "content_filter",
    "cut": lambda entry: entry.finish_reason == "length",
    # A proxy or a login page that answered in the server's place with status 200.
    "page": lambda entry: entry.text.lstrip()[:9].lower().startswith(("<html", "<!doctype")),
    "unreadable": is_unreadable,
}


def open_journal(path: str) -> Journal:
    """Open a journal that is there; to look must not make one."""
    # `Journal` makes the file where it is not there, and an empty one would answer for the right one.
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such journal.")
    return Journal(path)


def list_replies(args: argparse.Namespace) -> None:
    """Print a line per reply, then the totals."""
    purposes: Counter[str] = Counter()
    with open_journal(args.journal) as journal:
        for entry in journal.entries():
            if args.purpose in (None, entry.purpose):
                purposes[entry.purpose] += 1
                start = " ".join(entry.text.split())[:60]
                tokens = f"{entry.prompt_tokens:>6} + {entry.completion_tokens:<6}"
                print(f"{entry.key[:12]}  {entry.purpose:<12} {entry.model:<24} {tokens} {start}")
        totals = journal.totals()
    listed = ", ".join(f"{number:,} {purpose}" for purpose, number in purposes.most_common())
    print(f"{listed or 'no replies'}; in all {totals.replies:,} replies, {totals.faults:,} faults, "
          f"{totals.spend.tokens:,} tokens, ${totals.spend.usd:,.2f}")  # fmt: skip


def show(args: argparse.Namespace) -> None:
    """Print the prompt and the reply of every key that begins so."""
    with open_journal(args.journal) as journal:
        entries = [entry for entry in journal.entries() if entry.key.startswith(args.key)]
    if not entries:
        raise SystemExit(f"No key begins with {args.key}.")
    for entry in entries:
        print(f"{entry.key}  {entry.purpose}  {entry.model}  {entry.sampling}  {entry.finish_reason}")
        for role, content in entry.messages:
            print(f"\n[{role}]\n{content}")
        print(f"\n[reply]\n{entry.text}\n")


def export(args: argparse.Namespace) -> None:
    """Write every reply as a line of JSON."""
    with open_journal(args.journal) as journal:
        print(f"{args.output}: {journal.export(args.output):,} replies")


def merge(args: argparse.Namespace) -> None:
    """Take over the replies of other journals, or of every shard in a folder."""
    from hf_longalign.synthesis.shards import finished_shards

    # All of them are looked for before the journal is made.
    others = [path for name in args.others for path in (finished_shards(name) if Path(name).is_dir() else [name])]
    with Journal(args.journal) as journal:
        for other in others:
            print(f"{other}: {journal.merge(other):,} new replies")


def drop(args: argparse.Namespace) -> None:
    """Forget the replies that are unwanted for a reason, so that the next run asks for them again."""
    from datasets import config

    from hf_longalign.synthesis.files import forget_outcomes

    with open_journal(args.journal) as journal:
        keys = {entry.key for entry in journal.entries()}
        number = journal.drop(REASONS[args.reason])
    print(f"{number:,} replies dropped; what they have cost stays counted.")
    # A finished run would otherwise find its outcomes and rows on disk and ask for nothing.
    data = Path(args.cache_dir or config.HF_DATASETS_CACHE) / "context_synthesis"
    for folder in {Path(args.journal).resolve().parent, data.resolve()} if number else ():
        for name in forget_outcomes(folder, keys):
            print(f"Removed {folder / name}: the next run makes it anew.")


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Return what is to be done, and to what."""
    parser = argparse.ArgumentParser(
        prog="hf-longalign journal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    acts = {"list": list_replies, "show": show, "export": export, "merge": merge, "drop": drop}
    parsers = {name: commands.add_parser(name, help=act.__doc__) for name, act in acts.items()}
    for name, command in parsers.items():
        command.set_defaults(act=acts[name])
        command.add_argument("journal")
    parsers["list"].add_argument("--purpose", help="only replies asked for this purpose")
    parsers["show"].add_argument("key", help="of a reply, or its beginning")
    parsers["export"].add_argument("output", help="the file to write")
    parsers["merge"].add_argument("others", nargs="+", help="journals, or folders of shards")
    drops = parsers["drop"]
    drops.add_argument("--reason", required=True, choices=REASONS, help="which replies")
    drops.add_argument("--cache_dir", help="that of the run, if the journal lies elsewhere; unset: the default")
    return (parser.parse_args(arguments),)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with suppress(BrokenPipeError):  # `| head`
        args.act(args)
    return 0
