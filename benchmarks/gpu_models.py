"""What the parts of `gpu.py` measure: models of a shape with random weights, batches of random tokens, a step."""

import gc
import statistics
import tempfile
import time
from typing import Any

import memory_formula
import numpy as np
import torch
import transformers
from memory_formula import Shape

from hf_longalign import SkipPositionDataCollator
from hf_longalign.attention import ATTENTION_NAME, register_attention


SEED = 0


def build(shape: Shape, device: str, attention: str, dtype: torch.dtype, lora: bool = False, **options: Any) -> Any:
    """Make a model of a shape with random weights, on its device from the first."""
    register_attention()
    torch.manual_seed(SEED)
    kind = "Qwen2" if shape.name.startswith("Qwen2") else "Llama"
    sizes = {"head_dim": shape.width} if kind == "Llama" else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=131_072, tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=None, **sizes,
        **options,
    )  # fmt: skip
    with torch.device(device):
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(
            config, attn_implementation=attention, dtype=dtype
        )
    if lora:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=memory_formula.LORA_RANK)
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    return model


def documents(count: int, length: int, vocabulary: int, uneven: bool = True) -> list[dict]:
    """Make rows of random tokens, half of each prompt."""
    rng = np.random.default_rng(SEED)
    rows = []
    for index in range(count):
        tokens = max(4, length * (index % 3 + 1) // 2) if uneven else length
        ids = rng.integers(3, vocabulary, tokens).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (tokens // 2) + ids[tokens // 2 :]})
    return rows


def collate(rows: list[dict], packed: bool, skipped: bool, target: int, device: str) -> dict:
    """Make a batch on a device."""
    collator = SkipPositionDataCollator(
        0, target, strategy="skip_all" if skipped else "none", skip_probability=1.0, padding_free=packed
    )
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in collator(rows).items()}
    if not packed:
        batch.pop("seq_idx", None)
    return batch


def run(model: Any, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return loss and gradients in float32."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach().float(), [
        # Copies: a model that is moved takes its gradients along.
        weight.grad.float().clone()
        for weight in model.parameters()
        if weight.grad is not None
    ]


class Step:
    """A trainer with one packed batch, ready to be stepped.

    With `recomputed`, layers keep only their input for the backward pass, as `gradient_checkpointing` has it.
    """

    def __init__(
        self, shape: Shape, device: str, length: int, *, ours: bool, skipped: bool, recomputed: bool, **options: Any
    ) -> None:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from trl import SFTConfig, SFTTrainer

        from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer

        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        attention = options.pop("attention", ATTENTION_NAME)
        model = build(shape, device, attention, dtype, lora=True)
        count = options.pop("count", 8)
        given = {
            "output_dir": tempfile.mkdtemp(), "packing": True, "max_length": length, "per_device_train_batch_size": 1,
            "bf16": device == "cuda", "use_cpu": device == "cpu", "gradient_checkpointing": recomputed,
            "report_to": "none", "disable_tqdm": True, "max_steps": 1, **options,
        }  # fmt: skip
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
        )
        if ours:
            positions = {"skip_strategy": "skip_all" if skipped else "none", "skip_target_length": 131_072}
            args = LongAlignSFTConfig(**given, **positions, skip_probability=1.0, preflight=False)
        else:
            args = SFTConfig(**given)
        self.trainer = (LongAlignSFTTrainer if ours else SFTTrainer)(
            model,
            args=args,
            train_dataset=Dataset.from_list(documents(count, length // count, shape.vocabulary, uneven=False)),
            processing_class=tokenizer,
        )
        # What `train()` would do.
        self.trainer.current_gradient_accumulation_steps = 1
        if recomputed:
            self.trainer.model.activation_checkpointing_enable()
        self.device, self.model = device, self.trainer.model.to(device).train()
        self.optimizer = torch.optim.AdamW((w for w in self.model.parameters() if w.requires_grad), lr=1e-4)
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.tokens = self.batch["input_ids"].numel()

    def __call__(self) -> float:
        """Take one step and return its seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        self.trainer.training_step(self.model, dict(self.batch))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Give memory back between models."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(step: Step, repeats: int, warm_up: int = 2) -> float:
    """Return the median seconds of a step after some of warm-up."""
    for _ in range(warm_up):
        step()
    return statistics.median(step() for _ in range(repeats))
