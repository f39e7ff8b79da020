"""Do losses at a distance tell which checkpoint finds needles there? All of every checkpoint of a few trainings.

    python benchmarks/distances.py --output benchmarks/results/smollm2/distances.json

The rows and needles are those of `recipes/study.py` (`--model` and `--seeds` as there). Checkpoints are asked about
the same texts; what is in `--folder` is kept. Spearman -1 would be a loss that ranks checkpoints as needles do: that
of text at a distance (`loss`), or that of copying from there (`copy_loss`).
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer, load_adapter
from hf_longalign.distances import copy_rows, stretched_positions
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.needles import score_needle
from hf_longalign.run_record import versions


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from study_data import HUB_DATA, compose_rows, composed_rows, questions, read_pairs, split_pairs


def train(args, strategy, folder):
    """Train with checkpoints, each evaluated at all distances."""
    config = LongAlignSFTConfig(
        str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_length=320,
        assistant_only_loss=True,
        loss_weighting="sequence",
        skip_strategy=strategy,
        skip_target_length=args.target_length,
        skip_probability=0.5,
        rope_type=args.rope_type,
        eval_distances=[length for length, _ in args.texts],
        eval_strategy="steps",
        eval_steps=args.steps // args.checkpoints,
        save_steps=args.steps // args.checkpoints,
        model_init_kwargs={"dtype": args.dtype},
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = LongAlignSFTTrainer(
        args.model,
        config,
        train_dataset=composed_rows(args.folder / "train"),
        eval_dataset=composed_rows(args.folder / "development"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    trainer.train()
    trainer.save_state()


def losses(state, step):
    """Return the loss at each distance of a checkpoint, from what the trainer logged."""
    found = {}
    for entry in json.loads(state.read_text())["log_history"]:
        if entry["step"] == step:
            found |= {name.rpartition("_")[2]: loss for name, loss in entry.items() if "eval_loss_at_" in name}
    return {int(length): loss for length, loss in found.items()}


def found_needles(model, tokenizer, prompts):
    """Return the share of the needles that a model finds: one key, and several at once, weighing the same."""
    scores = {"multi_key": [], "multi_query": []}
    for prompt, reply in LocalGenerator(model, tokenizer).generate(prompts):
        metric = "exact_match" if prompt.task == "multi_key" else "recall"
        scores[prompt.task].append(score_needle(prompt, reply.text)[metric])
    return float(np.mean([np.mean(own) for own in scores.values()]))


@torch.no_grad()
def copy_loss(model, rows, distance):
    """Return the mean loss of copies, each by itself at its positions."""
    lost = []
    for row in rows:
        sizes = np.unique(row["blocks"], return_counts=True)[1]
        places = stretched_positions(sizes, distance, np.random.default_rng())  # of two blocks nothing is drawn
        ids, labels, places = (torch.tensor(part)[None] for part in (row["input_ids"], row["labels"], places))
        logits = model(input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits.float()
        lost.append(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).item())
    return float(np.mean(lost))


def agreement(frame):
    """Return Spearman's rank correlation of losses and needles by training, and over all, for each length."""
    found = []
    for name, rows in [("all", frame), *frame.groupby("strategy")]:
        for length, own in rows.groupby("length"):
            ranks = own[["loss", "copy_loss", "needles"]].corr("spearman")["needles"].round(2)
            found.append({"strategy": name, "length": int(length), "models": len(own), **ranks[:2].to_dict()})
    return found


def main():
    """Train, ask every checkpoint, correlate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", default=HUB_DATA)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--strategies", nargs="+", default=["none", "skip_all"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--target_length", type=int, default=16384)
    parser.add_argument("--rope_type", default="yarn", help="linear by a large factor breaks what training then mends")
    parser.add_argument("--texts", nargs="+", default=["2048:2", "4096:2"], help="length:texts")
    parser.add_argument("--folder", type=Path, default=Path("outputs/distances"), help="of adapters and answers")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.texts = [tuple(map(int, cell.split(":"))) for cell in args.texts]
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def count(text):
        message = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])

    pairs = split_pairs(read_pairs(args.seeds, most=20_000), count, rows=4 * args.steps, gold_tokens=200)
    for split in ("train", "development"):
        if not (args.folder / split / "dataset").exists():
            compose_rows(pairs[split], args.folder / split, tokenizer=args.model, tokens=320)
    texts = {
        length: [
            prompt
            for text in range(number)
            for prompt in questions(
                pairs["report"], count, length=length, text=text, seed=2, needles=8, keys_at_once=2, most_golds=1
            )
            if prompt.task != "passages"
        ]
        for length, number in args.texts
    }
    development = composed_rows(args.folder / "development")["messages"]
    ids = tokenizer.apply_chat_template(list(development), return_dict=True)["input_ids"]
    copies = copy_rows([{"input_ids": np.array(row)} for row in ids])
    rows = []
    for strategy in args.strategies:
        folder = args.folder / strategy
        if not (folder / "trainer_state.json").exists():
            train(args, strategy, folder)
        stride = args.steps // args.checkpoints
        for step in range(stride, args.steps + 1, stride):
            result = folder / f"needles-{step}.json"
            if not result.exists():
                model = load_adapter(folder / f"checkpoint-{step}", base_model=args.model, dtype=args.dtype).eval()
                asked = {
                    "needles": {length: found_needles(model, tokenizer, own) for length, own in texts.items()},
                    "copy_loss": {length: copy_loss(model, copies, length) for length in texts},
                }
                result.write_text(json.dumps(asked))
            asked = json.loads(result.read_text())
            own = losses(folder / "trainer_state.json", step)
            rows += [
                {"strategy": strategy, "step": step, "length": length, "loss": own[length]}
                | {name: found[str(length)] for name, found in asked.items()}
                for length in texts
            ]
            print(*rows[-len(texts) :], sep="\n", flush=True)
    frame = pd.DataFrame(rows)
    told = ("strategies", "steps", "checkpoints", "rope_type", "target_length", "dtype", "texts")
    found = {
        "settings": {name: getattr(args, name) for name in told},
        "rows": rows,
        "spearman": agreement(frame),
        "versions": versions(),
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    for strategy, own in groupby(found["spearman"], key=lambda one: one["strategy"]):
        print(strategy, *own)


if __name__ == "__main__":
    main()
