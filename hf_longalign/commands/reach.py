"""Draw how far a model reaches on your own data: the loss of short rows, moved apart to longer distances."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_longalign.options import DTYPES


MOST_ROWS, BATCH = 16, 4
SECONDS = 60.0


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Return model, data and distances."""
    parser = argparse.ArgumentParser(
        prog="hf-longalign reach",
        description=f"{__doc__} Nothing is trained: each row costs one short forward pass at each distance.",
    )
    parser.add_argument("model", help="directory or Hub id")
    parser.add_argument("--dataset", required=True, help="Hub id, folder, JSONL or Parquet, in a format of TRL")
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--split", help="split of the data; unset: test where there is one, else train")
    parser.add_argument("--distances", type=int, nargs="+", help="in positions; unset: doubles up to the range")
    parser.add_argument("--rope_type", help="measure with RoPE scaled to the largest distance: yarn, linear …")
    parser.add_argument(
        "--rows", type=int, help=f"how many rows are measured; unset: {BATCH} to {MOST_ROWS}, as a minute allows"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="tokens that longer rows are cut to")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of the weights, such as bfloat16")
    parser.add_argument("--output_dir", default="outputs/reach", help="folder of reach.json and reach.png")
    args = parser.parse_args(arguments)
    if args.rope_type is not None and not args.distances:
        parser.error("`rope_type` scales RoPE to the largest of `distances`, got none. Set them.")
    if args.rows is not None and args.rows < 1:
        parser.error(f"`rows` must be at least 1, got {args.rows}. Leave it out if in doubt.")
    return (args,)


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw."""
    from time import perf_counter

    import torch
    from transformers import AutoConfig

    from hf_longalign.commands.sft import DataOptions, check_columns
    from hf_longalign.config import LongAlignSFTConfig
    from hf_longalign.rope import check_range, doubles, model_range
    from hf_longalign.run_record import check_place
    from hf_longalign.trainer import LongAlignSFTTrainer

    check_place("model", args.model, "config.json")
    config = AutoConfig.from_pretrained(args.model)
    if args.distances and not args.rope_type:
        check_range(config, max(args.distances), "distances")
    found = DataOptions(args.dataset, args.dataset_config).load()
    split = args.split or ("test" if "test" in found else "train")
    if split not in found:
        raise ValueError(f"`split` must be one of {sorted(found)}, got {split!r}. Set one of them.")
    dataset: Any = found[split]
    check_columns(dataset, "text")
    # A few more, for some may hold no target.
    dataset = dataset.select(range(min(2 * (args.rows or MOST_ROWS), len(dataset))))
    distances = args.distances or doubles(args.max_length, model_range(config))
    on_gpu = torch.cuda.is_available()

    # How many rows are watched is a class attribute, as no training needs another number.
    class Reaching(LongAlignSFTTrainer):
        watched_rows = args.rows or MOST_ROWS

    trainer = Reaching(
        args.model,
        args=LongAlignSFTConfig(
            args.output_dir,
            # Only the measured rows are stretched; nothing else is drawn.
            skip_strategy="none",
            skip_target_length=max(distances) if args.rope_type else None,
            rope_type=args.rope_type,
            eval_distances=distances,
            max_length=args.max_length,
            assistant_only_loss="messages" in dataset.column_names,
            model_init_kwargs={"dtype": args.dtype},
            per_device_eval_batch_size=BATCH,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to="none",
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    watch: Any = trainer.distances
    rows = watch.rows["eval"]
    trainer.model.eval()
    if args.rows is None:
        # Each batch is read once as it is and once at each distance; the first one tells how long that takes.
        start = perf_counter()
        watch.loss(rows[:BATCH], None)
        batches = int(SECONDS / (perf_counter() - start) / (1 + len(distances)))
        rows = rows[: BATCH * max(1, batches)]
    ordinary, found = watch.loss(rows, None), watch.measure("reach", rows)
    losses, copies = ([found[f"reach_{name}_at_{n}"] for n in watch.distances] for name in ("loss", "copy_loss"))
    told = {"rows": len(rows), "as_they_are": ordinary, "lengths": watch.distances}
    write(Path(args.output_dir), Path(args.model).name, {**told, "losses": losses, "copy_losses": copies})
    return 0


def write(folder: Path, model: str, found: dict[str, Any]) -> None:
    """Print the curves and write them as `reach.json` and, with matplotlib, `reach.png`."""
    import json

    from hf_longalign.plots import plot_distances

    lengths, ordinary = found["lengths"], found["as_they_are"]
    print(
        f"Loss of {found['rows']} rows, their blocks moved apart to a distance in positions, and of copying from it:"
    )
    print(f"{'as they are':>12}  {ordinary:7.4f}")
    for length, loss, copied in zip(lengths, found["losses"], found["copy_losses"], strict=True):
        print(f"{length:>12,}  {loss:7.4f}  {loss - ordinary:+8.4f}   copying {copied:7.4f}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reach.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    try:
        curves = {"rows moved apart": found["losses"], "copying from there": found["copy_losses"]}
        title = f"How far {model} reaches, {found['rows']} rows"
        plot_distances(curves, lengths, folder / "reach.png", title=title, ordinary=ordinary)
    except ImportError as error:
        print(error)
    print(f"Wrote {folder}")
