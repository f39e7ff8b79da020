"""Write a base model and the adapter trained on it as one model, with the RoPE it was trained with."""

import argparse
from collections.abc import Sequence


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Return adapter, output and what they are loaded with."""
    parser = argparse.ArgumentParser(
        prog="hf-longalign merge",
        description=f"{__doc__} Servers that know nothing of adapters or of scaled RoPE read the result as it is.",
    )
    parser.add_argument("adapter", help="directory or Hub id of the adapter")
    parser.add_argument("output", help="folder of the whole model")
    parser.add_argument("--base_model", help="directory or Hub id of the base; unset: the one the adapter names")
    parser.add_argument("--adapter_revision", help="revision of the adapter")
    parser.add_argument("--dtype", default="auto", help="precision of the weights, such as bfloat16")
    parser.add_argument("--max_shard_size", default="5GB", help="size of a file of weights at most")
    parser.add_argument(
        "--no_known_answers",
        action="store_true",
        help="ask no fixed prompts, by whose answers `evaluate --endpoint` checks a server",
    )
    return (parser.parse_args(arguments),)


def run(args: argparse.Namespace) -> int:
    """Merge and save."""
    from hf_longalign.adapter import merge_adapter

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
    return 0
