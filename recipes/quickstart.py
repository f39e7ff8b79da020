# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_longalign[plot]"]
#
# [tool.uv.sources]
# hf_longalign = { git = "https://github.com/hf-longalign/hf_longalign" }
# ///
"""Train a tiny model on short samples, align it once per skip strategy, and ask it for facts at 16 times the length.

    python recipes/quickstart.py                 # under 4 minutes on 2 CPU cores, nothing is downloaded
    python recipes/quickstart.py --seeds 3       # the same for seeds 0, 1 and 2

A base is trained from scratch with ordinary positions. Then the very same data, steps and seed align it with ordinary
positions (`none`) and with each strategy. Everything is asked with ordinary positions over real long texts.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers
import trl
from quickstart_task import EXAM_DEPTHS, EXAM_LENGTHS, TRAIN_TOKENS, make_chats, make_prompts, make_tokenizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer, SkipPositionDataCollator
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.needles import score_needle
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.evaluation.results import suite_result
from hf_longalign.plots import plot_accuracy_by_length, plot_heatmap
from hf_longalign.positions import STRATEGIES


DEFAULT_STRATEGY = SkipPositionDataCollator.strategy
ORDINARY = "none"
BASE = "base"
# The base first meets short samples, a third as many: a curriculum that makes every seed learn to look a code up.
EASY = {"tokens": 20, "turns": 4}
TARGET_TOKENS = EXAM_LENGTHS[-1]
BATCH = 32
WARMUP_STEPS = 50


class Plan(NamedTuple):
    """What one run does."""

    folder: Path
    base_steps: int
    steps: int
    samples: int
    rows: int


def main() -> None:
    """Run, print the table, draw the pictures, write the JSON."""
    options = parse()
    quiet()
    start = time.perf_counter()
    plan = Plan(options.output, options.base_steps, options.steps, options.samples, options.rows)
    plan.folder.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + options.seeds)
    results = {seed: {} for seed in seeds}
    with workers(options.workers) as run:
        run("base models", train_base, [(plan, seed) for seed in seeds], plan.base_steps, results)
        jobs = [(plan, seed, strategy) for seed in seeds for strategy in options.strategies]
        run("alignment", align, jobs, plan.steps, results)
    for seed in seeds:
        (plan.folder / f"base-{seed}.pt").unlink()
    report(plan, results, options.strategies, time.perf_counter() - start)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--base_steps", type=int, default=400, help="steps that make the base")
    parser.add_argument("--steps", type=int, default=600, help="steps of each alignment")
    parser.add_argument("--samples", type=int, default=64, help="questions per length and depth")
    parser.add_argument("--rows", type=int, default=9600, help="conversations to train on")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    return parser.parse_args()


def quiet() -> None:
    """One torch thread per process, and only the quickstart's own progress bars."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("hf_longalign").setLevel(logging.ERROR)


@contextmanager
def workers(count: int) -> Iterator[Callable]:
    """Processes that run jobs and tell of every training step."""
    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    with ProcessPoolExecutor(count, context, initializer=set_up_worker, initargs=(steps,)) as pool:

        def run(title: str, job: Callable, arguments: list[tuple], steps_each: int, results: dict) -> None:
            pending = [pool.submit(job, *args) for args in arguments]
            with tqdm(total=steps_each * len(arguments), desc=f"{title:<12}", unit="step") as bar:
                bar.set_postfix_str("preparing the rows")
                while not all(result.done() for result in pending):
                    time.sleep(0.1)
                    while not steps.empty():
                        bar.set_postfix_str("", refresh=False)
                        bar.update(steps.get())
                while not steps.empty():
                    bar.update(steps.get())
            for result in pending:
                seed, name, accuracy = result.result()
                results[seed][name] = accuracy

        yield run


def set_up_worker(steps: Any) -> None:
    """Keep the queue of steps where the jobs find it."""
    global _steps
    _steps = steps
    quiet()


def one_step() -> None:
    """Tell the parent of a step."""
    _steps.put(1)


class TwoOptimizers(torch.optim.Optimizer):
    """Steps Muon on the layers' matrices and AdamW on the rest as one optimizer; plain AdamW needs more steps."""

    def __init__(self, model: torch.nn.Module) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        taken = set(map(id, matrices))
        rest = [p for p in model.parameters() if id(p) not in taken]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=0.02, weight_decay=0.0),
        )
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable | None = None) -> None:
        """Take one step of each."""
        # Accelerate replaces the groups of an optimizer by copies, and the scheduler writes into those.
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = next(groups)["lr"]
            optimizer.step()


class OnStep(TrainerCallback):
    """Tells the parent of every step."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell it."""
        one_step()


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Make a random Llama of 2 layers whose RoPE reaches 16 times the training length."""
    transformers.set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=False,
        max_position_embeddings=TARGET_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_trainer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: datasets.Dataset,
    folder: Path,
    *,
    steps: int,
    seed: int,
    **options: Any,
) -> LongAlignSFTTrainer:
    """Set up the package's trainer; `options` are fields of `LongAlignSFTConfig`."""
    optimizer = TwoOptimizers(model)
    arguments = LongAlignSFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        skip_target_length=TARGET_TOKENS,
        assistant_only_loss="messages" in rows.column_names,
        max_length=TRAIN_TOKENS,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        seed=seed,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = LongAlignSFTTrainer(
        model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[OnStep()],
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def learning_rate_factor(step: int, steps: int) -> float:
    """A linear warm-up, then a cosine to a tenth."""
    cosine = (1 + np.cos(np.pi * min(1.0, step / steps))) / 2
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.1 + 0.9 * cosine)


def examine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]) -> np.ndarray:
    """Ask for facts in ordinary long texts, all with ordinary positions.

    Returns:
        float `(lengths, depths)`: share of right answers.
    """
    answers = {prompt.key: answer for prompt, answer in LocalGenerator(model, tokenizer).generate(prompts)}
    found = suite_result("needle", prompts, {"model": [answers[prompt.key] for prompt in prompts]}, score_needle)
    grid = found.tasks[0].grid
    return np.array(grid.cells["model"]).T


def train_base(plan: Plan, seed: int) -> tuple[int, str, np.ndarray]:
    """Train a base from scratch with ordinary positions, keep it and its prepared rows, and examine it."""
    tokenizer, rng = make_tokenizer(), np.random.default_rng(seed)
    rows = datasets.Dataset.from_list(make_chats(plan.rows // 3, rng, **EASY) + make_chats(plan.rows, rng))
    model = make_model(tokenizer, seed)
    trainer = make_trainer(
        model,
        tokenizer,
        rows,
        plan.folder / "trainer",
        steps=plan.base_steps,
        seed=seed,
        skip_strategy=DEFAULT_STRATEGY,  # so that the preparation finds the blocks; none of them is skipped at
        skip_probability=0.0,
        train_sampling_strategy="sequential",
        dataset_num_proc=2,
    )
    trainer.train()
    prepared = trainer.train_dataset.select(range(plan.rows // 3, len(rows)))
    prepared = prepared.select_columns(["input_ids", "labels", "blocks"]).to_dict()
    torch.save({"model": model.state_dict(), "rows": prepared}, plan.folder / f"base-{seed}.pt")
    return seed, BASE, examine(model, tokenizer, make_prompts(seed, plan.samples))


def align(plan: Plan, seed: int, strategy: str) -> tuple[int, str, np.ndarray]:
    """Go on from the base with one strategy and examine the result."""
    tokenizer = make_tokenizer()
    saved = torch.load(plan.folder / f"base-{seed}.pt", weights_only=True)
    model = make_model(tokenizer, seed)
    model.load_state_dict(saved["model"])
    trainer = make_trainer(
        model,
        tokenizer,
        datasets.Dataset.from_dict(saved["rows"]),
        plan.folder / "trainer",
        steps=plan.steps,
        seed=seed,
        skip_strategy=strategy,
    )
    trainer.train()
    return seed, strategy, examine(model, tokenizer, make_prompts(seed, plan.samples))


def report(plan: Plan, results: dict[int, dict[str, np.ndarray]], strategies: list[str], seconds: float) -> None:
    """Print one table, draw the two pictures and write the JSON."""
    names = [BASE, *strategies]
    grids = {name: np.stack([results[seed][name] for seed in results]) for name in names}  # (seeds, lengths, depths)
    curves = {label(name): grid.mean((0, 2)) for name, grid in grids.items()}
    print(f"\nAccuracy by length, mean of {len(results)} seed(s); trained on {TRAIN_TOKENS} tokens\n")
    print(
        f"{'':<20}"
        + "".join(f"{length:>8,}" for length in EXAM_LENGTHS)
        + f"{'minimum at ' + f'{EXAM_LENGTHS[-1]:,}':>20}"
    )
    for name, grid in grids.items():
        row = "".join(f"{value:>8.2f}" for value in grid.mean((0, 2)))
        print(f"{label(name):<20}{row}{grid[:, -1].mean(-1).min():>20.2f}")
    shown = [name for name in (ORDINARY, DEFAULT_STRATEGY) if name in grids]
    pictures = [
        plot_accuracy_by_length(
            curves,
            EXAM_LENGTHS,
            plan.folder / "accuracy_by_length.png",
            title=f"Trained on {TRAIN_TOKENS} tokens, asked over {EXAM_LENGTHS[-1]:,}",
            train_length=TRAIN_TOKENS,
            highlight=[label(name) for name in shown],
        ),
        plot_heatmap(
            {label(name): grids[name].mean(0).T for name in shown or [BASE]},
            EXAM_LENGTHS,
            EXAM_DEPTHS,
            plan.folder / "heatmap.png",
            title="Where the fact stands, and how long the context is",
        ),
    ]
    summary = plan.folder / "quickstart.json"
    summary.write_text(json.dumps(as_json(plan, grids, list(results), seconds), indent=1) + "\n")
    print(f"\n{seconds:.0f} s. Written: {', '.join(str(path) for path in [*pictures, summary])}")


def label(name: str) -> str:
    """Say what a model is."""
    return {BASE: "base, no alignment", ORDINARY: "ordinary positions"}.get(name, name)


def as_json(plan: Plan, grids: dict[str, np.ndarray], seeds: list[int], seconds: float) -> dict[str, Any]:
    """Gather what was measured and on what."""
    return {
        "machine": {
            "cpu_count": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "date": date.today().isoformat(),
        },
        "seconds": round(seconds, 1),
        "seeds": seeds,
        "base_steps": plan.base_steps,
        "steps": plan.steps,
        "samples_per_cell": plan.samples,
        "lengths": EXAM_LENGTHS,
        "depths": EXAM_DEPTHS,
        "accuracy": {name: np.round(grid, 4).tolist() for name, grid in grids.items()},
        "axes": ["seed", "length", "depth"],
    }


if __name__ == "__main__":
    main()
