"""The quickstart's model: a tiny Llama from scratch, its training by the package's trainer, and its exam."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from quickstart_task import EXAM_LENGTHS, TRAIN_TOKENS
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.needles import score_needle
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.evaluation.results import suite_result


TARGET_TOKENS = EXAM_LENGTHS[-1]
BATCH = 32
WARMUP_STEPS = 50


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
    """Calls a function after every step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it."""
        self.function()


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Make a random Llama of 2 layers whose RoPE reaches 16 times the training length."""
    set_seed(seed)
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
    rows: Dataset,
    folder: Path,
    *,
    steps: int,
    seed: int,
    on_step: Callable[[], None],
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
        callbacks=[OnStep(on_step)],
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
