"""The command line: `hf-longalign sft …`, `python -m hf_longalign sft …` or a script of `recipes/`: the same code."""

import logging
import sys
from collections.abc import Sequence
from dis import opmap
from importlib import import_module
from typing import NamedTuple

from hf_longalign import __version__


class Command(NamedTuple):
    """A command and its module of `hf_longalign.commands`: `read` its options, then `run` with them."""

    help: str
    module: str
    read: str = "read"


COMMANDS = {
    "sft": Command("train on short data with skipped positions", "sft"),
    "synthesize": Command("turn short pairs into long-context chat data", "synthesize"),
    "reach": Command("how far does a model reach on your data, without training?", "reach"),
    "evaluate": Command("ask base and adapter the same questions", "evaluate"),
    "coherence": Command("does a data set need its contexts?", "coherence"),
    "journal": Command("look into the replies that a synthesis has paid for", "journal"),
    "merge": Command("write base and adapter as one model", "serving", "read_merge"),
    "serve-command": Command("how to serve an adapter with its RoPE", "serving", "read_serve"),
    "push": Command("publish a data set or an adapter", "publishing"),
}

HELP = """usage: hf-longalign COMMAND …

Long-context instruction tuning from short data.

{commands}

Each command has its own --help. Options of sft, synthesize, evaluate and push may also stand in a YAML: --config FILE;
those of the command line win.
hf-longalign runs in one process. On several, start sft, synthesize and evaluate through accelerate:
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m hf_longalign sft …
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 where it stopped and a rerun goes on, 2 for a wrong option.

    Args:
        arguments: the command and its options; `None`: those of the process.

    Example:

    >>> status = main(["--version"])  # doctest: +ELLIPSIS
    hf_longalign ...
    >>> status
    0
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name == "--version":
        sys.stdout.write(f"hf_longalign {__version__}\n")
        return 0
    commands = "\n".join(f"    {known:<13} {command.help}" for known, command in COMMANDS.items())
    if name in ("--help", "-h"):
        sys.stdout.write(HELP.format(commands=commands))
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"hf-longalign: error: unknown command {name!r}, known are {', '.join(COMMANDS)}\n")
        return 2
    command = COMMANDS[name]
    # `read` imports no torch, so that a wrong option is refused at once; what `run` needs it imports itself.
    module = import_module(f"hf_longalign.commands.{command.module}")
    options = getattr(module, command.read)(rest)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for talker in ("httpx", "httpx2", "matplotlib"):  # every request, every font
        logging.getLogger(talker).setLevel(logging.WARNING)
    for library in ("datasets", "huggingface_hub"):  # which write to stderr themselves
        logging.getLogger(library).propagate = False
    try:
        return int(module.run(*options))
    except (ValueError, RuntimeError, ImportError, ConnectionError) as error:
        if not is_refusal(error):
            raise
        sys.stderr.write(f"hf-longalign {name}: {error}\n")
        return 1


def is_refusal(error: Exception) -> bool:
    """Whether the package itself raised the error: its message says all that is needed, and its place would be noise.

    >>> from hf_longalign.synthesis.seeds import read_seeds
    >>> try:
    ...     read_seeds([{"instruction": "Who?"}])
    ... except ValueError as error:
    ...     print(is_refusal(error))
    True
    """
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or not place.tb_frame.f_globals.get("__name__", "").startswith("hf_longalign."):
        return False
    # Only what a `raise` wrote: `int(text)` fails in a frame of this package too, and is a fault whose place matters.
    return place.tb_frame.f_code.co_code[place.tb_lasti] == opmap["RAISE_VARARGS"]
