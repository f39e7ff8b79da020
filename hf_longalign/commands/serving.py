"""An adapter as servers take it, with the RoPE it was trained with: merged into its base, or by the right command."""

import argparse
from collections.abc import Sequence

from hf_longalign.options import DTYPES
from hf_longalign.serving import ENGINES, serve_command


def read_merge(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Return adapter, output and what they are loaded with."""
    parser = argparse.ArgumentParser(
        prog="hf-longalign merge",
        description="Write a base model and the adapter trained on it as one, with the RoPE it was trained with. "
        "Servers that know nothing of adapters or of scaled RoPE read the result as it is.",
    )
    parser.add_argument("adapter", help="directory or Hub id of the adapter")
    parser.add_argument("output", help="folder of the whole model")
    parser.add_argument("--base_model", help="directory or Hub id of the base; unset: the one the adapter names")
    parser.add_argument("--adapter_revision", help="revision of the adapter")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of the weights, such as bfloat16")
    parser.add_argument("--max_shard_size", default="5GB", help="size of a file of weights at most")
    parser.add_argument(
        "--no_known_answers",
        action="store_true",
        help="ask no fixed prompts, by whose answers `evaluate --endpoint` checks a server",
    )
    parser.set_defaults(act=merge)
    return (parser.parse_args(arguments),)


def merge(args: argparse.Namespace) -> None:
    """Merge and save."""
    from hf_longalign.merge import merge_adapter

    merge_adapter(
        args.adapter,
        args.output,
        base_model=args.base_model,
        revision=args.adapter_revision,
        max_shard_size=args.max_shard_size,
        known_answers=not args.no_known_answers,
        dtype=args.dtype,
    )
    print(f"Wrote {args.output}")


def read_serve(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Return what is served by which engine."""
    parser = argparse.ArgumentParser(
        prog="hf-longalign serve-command",
        description="Print the command that serves an adapter, or a merged model, with the RoPE it was trained with. "
        "A server gives an adapter the base's own RoPE unless it is told.",
    )
    parser.add_argument("model", help="directory or Hub id of an adapter or a merged model")
    parser.add_argument("--engine", choices=list(ENGINES), default="vllm", help="the server (default: vllm)")
    parser.add_argument("--base_model", help="what the adapter is served on; unset: the base it names")
    parser.set_defaults(act=lambda args: print(serve_command(args.model, args.engine, base_model=args.base_model)))
    return (parser.parse_args(arguments),)


def run(args: argparse.Namespace) -> int:
    """Do what the command says."""
    args.act(args)
    return 0
