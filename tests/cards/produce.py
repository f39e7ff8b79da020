"""Real cards: a tiny training, its evaluation and three syntheses, as a user runs them.

`python tests/cards/produce.py` writes the golden files anew; look at what changed before you commit it.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path


TESTS = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
# What differs between two machines or two days.
VOLATILE = (
    (r"(hf_longalign|torch|transformers|trl|peft|datasets|accelerate) \d+\.\d[\w.+]*\b", r"\1 VERSION"),
    (r"\b[0-9a-f]{16,64}\b", "DIGEST"),
    (r"\d{4}-\d\d-\d\d", "DATE"),
    (r"\| time \| .* \|\n", ""),  # not told below a second
    (r"(value: )\d+\.\d+", r"\1SCORE"),
    (r"(?m)^(\| [`*A-Z].*)$", lambda line: re.sub(r"[+−]?\b\d{1,3}\.\d\b", "SCORE", line[0])),
)


def normalised(text: str) -> str:
    for pattern, name in VOLATILE:
        text = re.sub(pattern, name, text)
    return text


def run(name: str, *arguments: object) -> None:
    """A command in this process."""
    from hf_longalign.cli import main

    assert main([name, *map(str, arguments)]) == 0


def produce(folder: Path) -> dict[str, str]:
    """Return the text of every golden file, made in an empty folder."""
    return {**adapters(folder / "training"), **data_sets(folder / "synthesis")}


def adapters(folder: Path) -> dict[str, str]:
    from tiny import chats, tiny_llama, tiny_tokenizer

    base = folder / "base"
    tiny_llama(initializer_range=0.3).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats(16)))
    common = ("--model_name_or_path", base, "--dataset_name", folder / "rows.jsonl", "--max_length", 256)
    common += ("--dtype", "float32", "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--max_steps", 2)
    common += ("--base_name", "org/base", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", 1)
    lora = ("--use_peft", "true", "--lora_target_modules", "all-linear", "--packing", "true")
    scaled = ("--rope_type", "yarn", "--skip_target_length", 4096, "--loss_weighting", "sequence")
    run("sft", *common, *lora, *scaled, "--license", "mit", "--languages", "en", "--output_dir", folder / "adapter")
    pose = ("--skip_strategy", "pose", "--skip_target_length", 1024)
    run("sft", *common, *lora, *pose, "--output_dir", folder / "pose")
    run("sft", *common, "--skip_strategy", "none", "--output_dir", folder / "whole")
    rows = [{"context": "Ardel sold salt. " * 40, "input": "Who sold salt?", "answers": ["Ardel"], "length": 120}] * 4
    for task in ("qasper", "gov_report"):
        lines = (json.dumps({**row, "all_classes": None, "language": "en", "dataset": task}) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text("".join(lines))
    questions = ("--suites", "needle", "longbench", "perplexity", "--lengths", 512, 1024, "--depths", 0, 1)
    questions += ("--longbench_source", folder, "--longbench_tasks", "qasper", "gov_report", "multi_news")
    questions += ("--samples", 2, "--max_new_tokens", 16, "--limit", 4, "--dtype", "float32")
    look = folder / "look"
    publish = ("--push_to_hub", "--hub_model_id", "user/adapter", "--base_name", "org/base", "--push_dry_run", look)
    models = ("--model", base, "--adapter", folder / "adapter")
    run("evaluate", *models, *questions, *publish, "--output_dir", folder / "report")
    return {
        "adapter_evaluated.md": (look / "README.md").read_text(),
        "adapter_evaluated.eval_results.yaml": (look / ".eval_results" / "longbench.yaml").read_text(),
        "adapter_pose.md": (folder / "pose" / "README.md").read_text(),
        "model_whole.md": (folder / "whole" / "README.md").read_text(),
    }


def data_sets(folder: Path) -> dict[str, str]:
    from fake_endpoint import FakeEndpoint
    from synthesis.fakes import make_pairs, make_text

    def lines(name, rows):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def card(name, *arguments):
        options = ("--cache_dir", folder / f"{name}-cache", "--output_dir", folder / name, "--n_distractors", 3)
        run("synthesize", *options, *arguments)
        return (folder / name / "README.md").read_text()

    given = [row | ({} if n % 8 else {"answer": "Rome"}) for n, row in enumerate(make_pairs(24, context=make_text))]
    seeds = [*make_pairs(6, "qasper"), *make_pairs(6, "gov_report"), *make_pairs(4, "general")]
    with FakeEndpoint() as server:
        writer = ("--generator", "openai", "--model", "tiny", "--endpoints", server.url, "--checks", "duplicate")
        prices = ("--prompt_price", 1, "--completion_price", 2, "--license", "cc-by-4.0", "--seeds_license", "cc0-1.0")
        return {
            "dataset_given.md": card("given", "--seeds", lines("pairs.jsonl", given), "--min_words", 20),
            "dataset_context.md": card(
                *("context", "--seeds", lines("seeds.jsonl", seeds), *writer, *prices, "--test_share", 0.2)
            ),
        }


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    sys.path[:0] = [str(TESTS)]
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in produce(Path(scratch)).items():
            (GOLDEN / name).write_text(normalised(text), encoding="utf-8")
