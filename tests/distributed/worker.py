"""One process of a run: trains settings of engines one after the other and leaves what it logged and saved.

    RANK=0 WORLD_SIZE=2 ... python worker.py jobs.json
    accelerate launch ... worker.py sft ...      # the command line, on CPUs

The process that a test compares with calls `train` itself.
"""

import gc
import json
import os
import sys
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from zlib import crc32

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl.kernels import chunked_logprob

import hf_longalign.cli
from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer


sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import chat_dataset, tiny_tokenizer


STEPS = 3
WEIGHED = {"lora": 512, "full": 1024}  # tokens, by which a fifth of the bytes at least are told
RESUMABLE = {"packing": True, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps"}
# What PEFT can train where the model is cut over the processes.
COLUMN_WISE = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
SETTINGS = {
    "full-packed-sequence": {"packing": True, "loss_weighting": "sequence"},
    "full-padded-token": {"accumulate": 2, "eval_strategy": "steps", "eval_steps": STEPS},
    "lora-packed-token": {"packing": True, "accumulate": 2, "eval_strategy": "steps", "eval_steps": STEPS},
    "lora-padded-sequence": {"loss_weighting": "sequence", "targets": COLUMN_WISE},
    # Its adapter is trained in bfloat16, whose rounding a second step would show.
    "qlora-packed-sequence": {"packing": True, "loss_weighting": "sequence", "accumulate": 2, "max_steps": 1},
    "full-streamed": {"packing": True, "loss_weighting": "sequence", "streamed": True},
    "lora-resumed": RESUMABLE,
    "full-resumed": RESUMABLE,
}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def zero(stage):
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }


def cut_rows(kind):
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", f"PARALLELISM_CONFIG_{kind}_SIZE": "2"}


# What `accelerate launch` sets for each of them.
ENVIRONMENTS = {
    "one": {},
    "ddp": {},
    "tensor": {},
    "fsdp2": FSDP2,
    "zero2": zero(2),
    "zero3": zero(3),
    "context": FSDP2 | cut_rows("CP"),
    "ulysses": zero(2) | cut_rows("SP") | {"PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION": "sdpa"},
}


def allow_sharding_on_cpus():
    """accelerate takes `fsdp` for DDP on CPUs without a word, and refuses every parallelism: go on."""
    made = AcceleratorState.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = make
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None


def fill(name, weight):
    """Give a weight of an adapter numbers that do not depend on how it is cut."""
    shape = getattr(weight, "ds_shape", weight.shape)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) / 10
    if isinstance(weight, DTensor):
        numbers = distribute_tensor(numbers, weight.device_mesh, weight.placements)
    whole = nullcontext()
    if hasattr(weight, "ds_shape"):
        from deepspeed.zero import GatheredParameters

        whole = GatheredParameters([weight], modifier_rank=0)
    with whole:
        weight.data.copy_(numbers)


def train(base, engine, name, *, processes=1, batch=2, checkpoint=None, output=None):
    """Train one setting of the model in `base/model`, into `base/engine/name`.

    Args:
        base: folder of all runs.
        engine: key of ENVIRONMENTS.
        name: key of SETTINGS.
        processes: how many processes share a batch, 1 also where they cut the model.
        batch: how many rows (packed) or pairs of rows (padded) a step has.
        checkpoint: where to go on from, in `base`.
        output: folder in `base`, if another.
    """
    options = dict(SETTINGS[name])
    kind, streamed = name.partition("-")[0], options.pop("streamed", False)
    accumulated = options.pop("accumulate", 1) * batch // processes
    train_set, held_out = chat_dataset(24), chat_dataset(5, turns=1)
    folder = Path(base) / (output or f"{engine}/{name}")
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=options.pop("targets", "all-linear"), init_lora_weights=False
    )
    # DeepSpeed finds the CPU by its own variable, and accelerate would leave it out.
    by_deepspeed = "ACCELERATE_USE_DEEPSPEED" in ENVIRONMENTS[engine]
    args = LongAlignSFTConfig(**{
        "output_dir": str(folder), "bf16": False, "report_to": "none", "disable_tqdm": True,
        "use_cpu": not by_deepspeed, "ddp_backend": "gloo" if by_deepspeed else None,
        "gradient_checkpointing": False, "max_length": 256, "skip_target_length": 1024, "skip_probability": 0.75,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e6,
        "max_steps": STEPS, "logging_steps": 1, "save_steps": 2, "save_strategy": "no", "eval_packing": False,
        "per_device_train_batch_size": 1 if options.get("packing") else 2, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": accumulated, "assistant_only_loss": True,
        "model_init_kwargs": {"dtype": "float32", **({"tp_plan": "auto"} if engine == "tensor" else {})}, **options,
    })  # fmt: skip
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    torch.manual_seed(0)
    trainer = LongAlignSFTTrainer(
        str(Path(base) / "model"),
        args=args,
        train_dataset=train_set.to_iterable_dataset() if streamed else train_set,
        eval_dataset=held_out if "eval_strategy" in options else None,
        processing_class=tiny_tokenizer(),
        peft_config=None if kind == "full" else lora,
        quantization_config=quantisation if kind == "qlora" else None,
    )
    for weight_name, weight in trainer.model.named_parameters():
        if kind == "lora" and "lora_" in weight_name:
            fill(weight_name, weight)
    trainer.train(resume_from_checkpoint=checkpoint and str(Path(base) / checkpoint))
    trainer.save_model()
    if trainer.is_world_process_zero():
        told = {"engine": type(trainer.model_wrapped).__name__, "log": trainer.state.log_history}
        (folder / "told.json").write_text(json.dumps(told))


def weigh(base, engine, name, sizes):
    """Write down the bytes of this process at the peak of a step in bf16, with AdamW and checkpointing."""
    layers, hidden, heads, key_heads, width, ffn, vocabulary = sizes
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=key_heads,
        head_dim=width, intermediate_size=ffn, vocab_size=vocabulary, max_position_embeddings=4 * WEIGHED[name],
    )  # fmt: skip
    full, tokens = name == "full", WEIGHED[name]
    args = LongAlignSFTConfig(
        output_dir=str(Path(base) / engine / name), use_cpu=True, bf16=True, report_to="none", disable_tqdm=True,
        packing=True, max_length=tokens, skip_target_length=4 * tokens, per_device_train_batch_size=1, max_steps=2,
        save_strategy="no", optim="adamw_torch", preflight=False,
    )  # fmt: skip
    chunked_logprob.TOKEN_CHUNK_SIZE = 64  # on CPUs a tile of the loss is copied several times
    ids = list(range(4, 132))
    trainer = LongAlignSFTTrainer(
        LlamaForCausalLM(config).to(torch.float32 if full else torch.bfloat16),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": [-100] * 64 + ids[64:]}] * (tokens // 16)),
        processing_class=tiny_tokenizer(),
        peft_config=None if full else LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16),
    )
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    standing = {}

    class SecondStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:  # by now the optimiser has its state
                moments = [value for known in trainer.optimizer.state.values() for value in known.values()]
                for weight in (*trainer.model_wrapped.parameters(), *moments):
                    storage = (weight.to_local() if isinstance(weight, DTensor) else weight).untyped_storage()
                    standing[storage.data_ptr()] = storage.nbytes()
                profiler.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                profiler.stop()

    trainer.add_callback(SecondStep())
    trainer.train()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in changes))
    if trainer.is_world_process_zero():
        (Path(base) / f"{engine}-{name}.bytes").write_text(str(sum(standing.values()) + peak))


def upstream(base, engine, name):
    """Train one step of rows of one length with transformers' own trainer, nothing of this package in it."""
    tokens = torch.arange(96).reshape(2, 48) + 4
    row = {"position_ids": torch.arange(48)}
    args = TrainingArguments(
        output_dir=str(Path(base) / engine / name), use_cpu=engine == "one", report_to="none", disable_tqdm=True,
        ddp_backend=None if engine == "one" else "gloo", optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=1e6, max_steps=1, logging_steps=1, per_device_train_batch_size=1,
    )  # fmt: skip
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(Path(base) / "model", dtype=torch.float32),
        args=args,
        train_dataset=[{"input_ids": ids, "labels": ids, **row} for ids in tokens],
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(args.output_dir) / "told.json").write_text(json.dumps({"log": trainer.state.log_history}))


def main(path):
    gc.freeze()  # as the tests do, see conftest.py
    torch.set_num_threads(1)
    allow_sharding_on_cpus()
    before = dict(os.environ)
    for job in json.loads(Path(path).read_text()):
        os.environ |= ENVIRONMENTS[job["engine"]]
        try:
            (weigh if "sizes" in job else upstream if job["name"] == "upstream" else train)(**job)
        except ValueError as refusal:
            (Path(job["base"]) / f"{job['engine']}-{job['name']}.txt").write_text(str(refusal))
        AcceleratorState._reset_state()
        GradientState._reset_state()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        main(sys.argv[1])
    else:
        allow_sharding_on_cpus()
        status = hf_longalign.cli.main(sys.argv[1:])
        state = AcceleratorState()
        sys.stdout.write(f"ran on {state.distributed_type} {state.num_processes}\n")
        sys.exit(status)
