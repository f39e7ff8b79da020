"""What the parts of `gpu.py` are made of: models of a shape with random weights, batches of random tokens, a step."""

import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import memory_formula
import numpy as np
import torch
import transformers
from memory_formula import Shape

from hf_longalign import SkipPositionDataCollator
from hf_longalign.attention import ATTENTION_NAME, register_attention


SEED = 0
TINY = Shape("tiny", 2, 128, 4, 2, 32, 256, 512)
# What `accelerate launch --dynamo_use_regional_compilation` sets.
BY_LAYER = {"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}

CouldNot = Callable[[str], None]
T = TypeVar("T")


class Place(NamedTuple):
    """Where a part runs, and whether in the sizes of real models or in those that a CPU can do."""

    device: str
    large: bool


def compiler(device: str) -> str:
    """Return the backend of `torch.compile` that is measured: on a CPU one that is soon ready, and no faster."""
    return "inductor" if device == "cuda" else "aot_eager"


def attempt(name: str, could_not: CouldNot, make: Callable[[], T]) -> list[T]:
    """Return what is made, mostly a row, in a list; an empty one where it could not be, having said why."""
    try:
        return [make()]
    except Exception as error:  # noqa: BLE001 # want of memory or of a package is an answer
        could_not(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        return []


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


def twin(model: Any, attention: str) -> Any:
    """Make a second model of the same weights, with an attention of its own: a card has no room for two 8B models."""
    copied = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    copied.get_base_model().set_attn_implementation(attention)
    return copied


def documents(count: int, length: int, vocabulary: int, uneven: bool = True) -> list[dict]:
    """Make rows of random tokens, half of each prompt."""
    rng = np.random.default_rng(SEED)
    rows = []
    for index in range(count):
        tokens = max(4, length * (index % 3 + 1) // 2) if uneven else length
        ids = rng.integers(3, vocabulary, tokens).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (tokens // 2) + ids[tokens // 2 :]})
    return rows


def collate(
    rows: list[dict], packed: bool, skipped: bool, target: int, device: str, multiple: int | None = None
) -> dict:
    """Make a batch on a device."""
    collator = SkipPositionDataCollator(
        0, target, strategy="skip_all" if skipped else "none", skip_probability=1.0, padding_free=packed,
        pad_to_multiple_of=multiple,
    )  # fmt: skip
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in collator(rows).items()}
    if not packed:
        batch.pop("seq_idx", None)
    return batch


class Step:
    """A trainer with one packed row, ready to be stepped as `train()` steps it, but for the learning rate's schedule.

    A step collates the row, with new positions each time where they skip, trains it, and counts what it covered: as
    often as the trainer logs, by default every tenth step, the counts are added up.
    With `recomputed`, layers keep only their input for the backward pass, as `gradient_checkpointing` has it; with
    `compiled`, one layer is compiled and serves all. Without a `model` it builds one.
    """

    def __init__(
        self,
        shape: Shape,
        device: str,
        length: int,
        *,
        ours: bool,
        skipped: bool,
        recomputed: bool,
        compiled: bool = False,
        model: Any = None,
        count: int = 8,
    ) -> None:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from trl import SFTConfig, SFTTrainer

        from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer

        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = build(shape, device, ATTENTION_NAME, dtype, lora=True) if model is None else model
        given = {
            "output_dir": tempfile.mkdtemp(), "packing": True, "max_length": length, "per_device_train_batch_size": 1,
            "bf16": device == "cuda", "use_cpu": device == "cpu", "gradient_checkpointing": recomputed,
            "report_to": "none", "disable_tqdm": True, "max_steps": 1,
        }  # fmt: skip
        if compiled:
            given |= {"torch_compile": True, "torch_compile_backend": compiler(device)}
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
        )
        # `torch_compile` sets variables too, for whatever is made after it.
        with mock.patch.dict(os.environ, BY_LAYER if compiled else {}):
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
        self.model, self.optimizer = self.trainer.accelerator.prepare(
            self.trainer.model.train(), self.trainer.create_optimizer()
        )
        # As accelerate made it, with the columns that the collator is given.
        loader = self.trainer.get_train_dataloader()
        self.row, self.collator = loader.dataset[0], loader.collate_fn
        self.tokens, self.taken, self.device = len(self.row["input_ids"]), 0, device
        self.coverage = self.trainer.coverage if ours else None
        self.attention = self.model.get_base_model().config._attn_implementation

    def __call__(self) -> float:
        """Take one step and return its seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        if self.coverage is not None:
            self.collator.set_epoch(self.taken)
        self.trainer.training_step(self.model, self.collator([self.row]))
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        if self.coverage is not None and self.taken % self.trainer.args.logging_steps == 0:
            self.coverage.gather()
            self.coverage.metrics()
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


def in_turn(steps: dict[str, Any], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Return the seconds of every side, (rounds,): each steps once a round, in the other order every second round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-warm_up, rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            seconds = steps[name]()
            if number >= 0:
                times[name].append(seconds)
    return times


def ratio(times: list[float], reference: list[float]) -> dict[str, float]:
    """Return how many times as long as another a side took, and the 95 % interval of that.

    Sums are compared, so that what comes every tenth step counts. The interval is a bootstrap over pairs of rounds,
    in which both sides came first once.

    >>> ratio([2.0, 4.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0])
    {'ratio': 2.0, 'low': 2.0, 'high': 2.0}
    """
    pairs = np.array([times, reference]).reshape(2, -1, 2).sum(-1)
    drawn = np.random.default_rng(SEED).integers(0, pairs.shape[1], (10_000, pairs.shape[1]))
    some, others = pairs[:, drawn].sum(-1)
    low, high = np.quantile(some / others, [0.025, 0.975])
    return {"ratio": float(sum(times) / sum(reference)), "low": float(low), "high": float(high)}
