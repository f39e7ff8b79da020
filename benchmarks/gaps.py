"""Where may positions skip? The loss of an untrained model on short rows with one gap at one of their boundaries.

    python benchmarks/gaps.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output benchmarks/results/smollm2/gaps.json

The rows are those that `recipes/study.py` trains on with `study_smallest.yaml`; `--seeds` as there.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer
from hf_longalign.blocks import blocks_from_column


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from study_data import HUB_DATA, compose_rows, composed_rows, read_pairs, split_pairs


# The boundary of a row by its number among them: the contexts begin, the question, the response.
PLACES = {"contexts": 0, "question": -2, "response": -1}


@torch.no_grad()
def loss(model, row, token, gap):
    """Sum of the losses of the targets, and their number, with so many positions left out before a token."""
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    places = torch.arange(ids.shape[1])[None]
    places[:, token:] += gap
    logits = model(input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits
    kept = labels[0, 1:] != -100
    found = torch.nn.functional.cross_entropy(logits[0, :-1][kept].float(), labels[0, 1:][kept], reduction="sum")
    return np.array([found.item(), kept.sum().item()])


def main():
    """Measure every gap at every place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", default=HUB_DATA)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 256, 1024, 4096, 7800])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = read_pairs(args.seeds, most=20_000)
    with tempfile.TemporaryDirectory() as folder:
        train = split_pairs(pairs, lambda text: len(tokenizer(text)["input_ids"]), rows=72, gold_tokens=200)["train"]
        compose_rows(train, Path(folder), tokenizer=args.model, tokens=320)
        # The trainer prepares the rows; nothing is trained.
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16").eval()
        options = {"skip_target_length": 8192, "max_length": 320, "assistant_only_loss": True, "preflight": False}
        config = LongAlignSFTConfig(folder, use_cpu=True, report_to="none", **options)
        dataset = composed_rows(Path(folder)).select(range(args.rows))
        rows = list(LongAlignSFTTrainer(model, config, train_dataset=dataset).train_dataset)
    found = {place: [] for place in PLACES}
    for place, number in PLACES.items():
        for gap in args.gaps:
            sums = np.zeros(2)
            for row in rows:
                begins = np.cumsum(blocks_from_column(np.asarray(row["blocks"])).lengths)[:-1]
                sums += loss(model, row, begins[number], gap)
            found[place].append(round(sums[0] / sums[1], 3))
            print(place, gap, found[place][-1], flush=True)
    args.output.write_text(json.dumps({"gaps": args.gaps, "rows": len(rows), "losses": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
