"""Print the command that serves an adapter, or a merged model, with the RoPE it was trained with."""

import argparse
from collections.abc import Sequence

from hf_longalign.serving import ENGINES, serve_command


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Return what is served by which engine."""
    parser = argparse.ArgumentParser(
        prog="hf-longalign serve-command",
        description=f"{__doc__} A server gives an adapter the base's own RoPE unless it is told.",
    )
    parser.add_argument("model", help="directory or Hub id of an adapter or a merged model")
    parser.add_argument("--engine", choices=list(ENGINES), default="vllm", help="the server (default: vllm)")
    parser.add_argument("--base_model", help="what the adapter is served on; unset: the base it names")
    return (parser.parse_args(arguments),)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    print(serve_command(args.model, args.engine, base_model=args.base_model))
    return 0
