"""A packed training step of `LongAlignSFTTrainer` against TRL's packed `SFTTrainer`: step time and peak memory.

    python benchmarks/packed_step.py    # on the GPU if there is one, else on the CPU

Both trainers take the same model, rows and optimiser step in turn in one process, so that noise meets both; times are
medians, and what counts is the ratio. On a CPU peak memory is the largest resident set of a process of its own for
each side, without what the imports take; on CUDA it is what torch allocated at most.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer
from hf_longalign.attention import ATTENTION_NAME, register_attention


RESULTS = Path(__file__).parent / "results"
CPU_MODEL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
GPU_MODEL = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}


@dataclass
class Case:
    """One side of a comparison."""

    name: str
    ours: bool
    attention: str
    documents: int
    length: int
    target_length: int = 131_072


def build_model(attention: str, device: str) -> Qwen2ForCausalLM:
    """Make a Qwen2 from config: about 0.5B parameters on CUDA, 20 million on a CPU."""
    torch.manual_seed(0)
    shape = GPU_MODEL if device == "cuda" else CPU_MODEL
    config = Qwen2Config(
        **shape,
        num_key_value_heads=2,
        vocab_size=151_936 if device == "cuda" else 8_192,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    register_attention()
    return Qwen2ForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)


def build_rows(case: Case, vocabulary: int) -> Dataset:
    """Tokenised rows that fill one packed row: half of each document is prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(case.documents):
        input_ids = torch.randint(3, vocabulary, (case.length,), generator=generator).tolist()
        half = case.length // 2
        rows.append({"input_ids": input_ids, "labels": [-100] * half + input_ids[half:]})
    return Dataset.from_list(rows)


class Step:
    """A trainer with one packed batch, ready to be stepped."""

    def __init__(self, case: Case, device: str, folder: str) -> None:
        model = build_model(case.attention, device)
        options = {
            "output_dir": folder,
            "packing": True,
            "max_length": case.documents * case.length,
            "per_device_train_batch_size": 1,
            "bf16": device == "cuda",
            "use_cpu": device == "cpu",
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "max_steps": 1,
        }
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
        )
        if case.ours:
            args = LongAlignSFTConfig(
                **options, skip_target_length=case.target_length, skip_probability=1.0, preflight=False
            )
        else:
            args = SFTConfig(**options)
        self.trainer = (LongAlignSFTTrainer if case.ours else SFTTrainer)(
            model,
            args=args,
            train_dataset=build_rows(case, model.config.vocab_size),
            processing_class=tokenizer,
        )
        self.trainer.current_gradient_accumulation_steps = 1  # `train()` sets it
        self.device = device
        self.model = self.trainer.model.to(device)
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.tokens = case.documents * case.length
        self.times: list[float] = []
        self.peak = 0

    def __call__(self) -> None:
        """Take one step and note its time and, on CUDA, its peak memory."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.trainer.training_step(self.model, dict(self.batch))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.times.append(time.perf_counter() - start)


def compare(cases: list[Case], device: str, repeats: int) -> list[dict]:
    """Step the cases in turn; every row is compared with the first case."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        steps = []
        for case in cases:
            steps.append(Step(case, device, folder))
            steps[-1]()  # warm-up
            steps[-1].times.clear()
        for _ in range(repeats):
            for step in steps:
                step()
        reference = steps[0]
        for case, step in zip(cases, steps, strict=True):
            peak = step.peak or resident_of(case)
            rows.append(
                {
                    **asdict(case),
                    "step_s": statistics.median(step.times),
                    "tokens_per_s": step.tokens / statistics.median(step.times),
                    "peak_mib": peak / 2**20,
                    "time_ratio": statistics.median(a / b for a, b in zip(step.times, reference.times, strict=True)),
                }
            )
    for row in rows:
        row["memory_ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
    return rows


def resident_of(case: Case) -> int:
    """Return the bytes that one step adds to the largest resident set of a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__, "--resident", json.dumps(asdict(case))], capture_output=True, text=True, check=True
    )
    return int(output.stdout.strip().splitlines()[-1])


def print_resident(case: Case) -> None:
    """Step twice and print what the second step's peak adds to the memory the process had before it was built."""
    before = peak_resident()
    with tempfile.TemporaryDirectory() as folder:
        step = Step(case, "cpu", folder)
        step()
        step()
    print(peak_resident() - before)


def peak_resident() -> int:
    """Return the largest resident set of this process in bytes (Linux; `getrusage` counts the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def cpu_cases() -> list[list[Case]]:
    """Return the comparison a laptop can run."""
    return [
        [
            Case("TRL, sdpa", False, "sdpa", 8, 512),
            Case("ours, longalign_varlen", True, ATTENTION_NAME, 8, 512),
        ]
    ]


def gpu_cases() -> list[list[Case]]:
    """Return packs of 8k to 32k, the same attention on both sides, and 4k tokens at 64k positions against 64k."""
    flash = ["flash_attention_2"] if find_spec("flash_attn") else []
    flash += ["flash_attention_3"] if find_spec("flash_attn_interface") else []
    comparisons = []
    for documents in (8, 16, 32):
        for attention in [ATTENTION_NAME, *flash]:
            comparisons.append(
                [
                    Case(f"TRL, {attention}", False, attention, documents, 1024),
                    Case(f"ours, {attention}", True, attention, documents, 1024),
                ]
            )
        if flash:
            comparisons.append([Case(f"ours, {a}", True, a, documents, 1024) for a in [flash[0], ATTENTION_NAME]])
    comparisons.append(
        [
            Case("full 64k sample", True, ATTENTION_NAME, 1, 65_536, 65_536),
            Case("4k sample, positions to 64k", True, ATTENTION_NAME, 1, 4_096, 65_536),
        ]
    )
    return comparisons


def main() -> None:
    """Run every comparison this machine can, print one table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        print_resident(Case(**json.loads(options.resident)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for cases in gpu_cases() if device == "cuda" else cpu_cases():
        rows += compare(cases, device, options.repeats)
        torch.cuda.empty_cache()
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "date": date.today().isoformat(),
    }
    print(f"{'case':<34}{'tokens':>8}{'step ms':>10}{'tokens/s':>11}{'peak MiB':>10}{'time x':>8}{'memory x':>10}")
    for row in rows:
        print(
            f"{row['name']:<34}{row['documents'] * row['length']:>8}{row['step_s'] * 1e3:>10.1f}"
            f"{row['tokens_per_s']:>11.0f}{row['peak_mib']:>10.0f}{row['time_ratio']:>8.2f}{row['memory_ratio']:>10.2f}"
        )
    output = options.output or RESULTS / f"packed_step_{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": machine, "repeats": options.repeats, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
