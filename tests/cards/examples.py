"""Realistic facts, one set per golden file. The numbers are made up; nothing here is a result."""

from hf_longalign.cards.adapter import AdapterFacts
from hf_longalign.cards.dataset import DatasetFacts, Source
from hf_longalign.cards.facts import adapter_facts


CONTEXT = (
    "The dam below the village of Thornwick was finished in the autumn of 1912, two years after the first stone. Ada "
    "Lovell, who had drawn the plans, stood on the crest and watched the valley fill with water. "
)
OTHER = (
    "The lighthouse at Cape Merrow was begun in 1908 and lit for the first time in the winter of 1911. Its keeper, "
    "Tobias Hale, wrote down every ship that passed. "
)
HEAD = "You are given a story, which can be either a novel or a movie script, and a question.\n\nStory: "
QUESTION = (
    "Now, answer the question based on the story as concisely as you can.\n\nQuestion: Who drew the plans of the dam?"
    "\n\nAnswer:"
)


def _row():
    texts = [OTHER * 9, CONTEXT * 8, OTHER.replace("Merrow", "Farrow") * 10]
    content, parts = HEAD, []
    for text in texts:
        parts.append({"message": 0, "start": len(content), "end": len(content) + len(text), "kind": "context"})
        content += text + "\n\n"
    parts.append({"message": 0, "start": len(content), "end": len(content) + len(QUESTION), "kind": "question"})
    return {
        "messages": [
            {"role": "user", "content": content + QUESTION},
            {"role": "assistant", "content": "Ada Lovell"},
        ],
        "parts": parts,
        "task": "narrativeqa",
        "instruction": "Who drew the plans of the dam?",
        "answer": "Ada Lovell",
        "reference": None,
        "gold_index": 1,
        "gold_depth": 0.4739,
        "n_contexts": 3,
        "context_tokens": 1043,
        "total_tokens": 1104,
        "context_ids": ["5a1f0c2e9d3b7a64", "0d9c3a1b2e4f5a68", "77b1e0c9d2a3f485"],
        "seed_id": "0d9c3a1b2e4f5a68",
        "generator": "openai",
        "model": "Qwen/Qwen2.5-72B-Instruct",
        "prompt_hash": "c0ffee1234567890",
        "journal_keys": ["9f2d6c1ab37e4458"],
        "attempts": 1,
        "checks": [{"name": "support", "outcome": "passed", "detail": ""}],
        "closed_book": None,
    }


TASKS = {
    "2wikimqa": 198,
    "gov_report": 200,
    "hotpotqa": 197,
    "multi_news": 200,
    "musique": 171,
    "narrativeqa": 196,
    "qasper": 193,
    "qmsum": 199,
}
WRITTEN = DatasetFacts(
    method="context",
    splits={
        "chat": {"train": 1476, "test": 78},
        "contexts": {"train": 1476, "test": 78},
        "rejected": {"train": 46},
    },
    tasks=TASKS,
    rejected={"support": 29, "contaminated": 9, "duplicate": 6, "refusal": 2},
    generator="openai",
    model="Qwen/Qwen2.5-72B-Instruct",
    judge_model="Qwen/Qwen3-32B",
    sampling={"temperature": 0.8, "top_p": 1.0, "max_tokens": 4096, "sampling_seed": 0, "retries": 2},
    prompts=(1554, "4be1f09a77c3d215"),
    checks=("complete", "refusal", "meta", "length", "support", "leak", "duplicate", "conflict"),
    lengths=[7_900 + 13 * (index * 37 % 401) for index in range(1554)],
    depths=[(index * 61 % 997) / 996 for index in range(1554)],
    contexts=(10, 10),
    seeds=[Source(f"{task}.jsonl", 200, task) for task in TASKS],
    seeds_license="each task's own; see LongBench",
    decontaminated=("longbench-qa.jsonl", "longbench-summaries.jsonl"),
    ngram=13,
    cost={"replies": 1689, "prompt_tokens": 905_304, "completion_tokens": 2_027_911, "usd": 1.76},
    settings={
        "context_words": 2000,
        "facts_first": False,
        "n_distractors": 9,
        "target_tokens": None,
        "distractor_sources": ["same_task"],
        "test_share": 0.05,
        "seed": 0,
    },
    sample=_row(),
    picture="assets/lengths.png",
    license="cc-by-4.0",
    languages=("en",),
    version="0.1.0",
    repo_id="longalign-lab/context-synthesis-8x200",
)
GIVEN = DatasetFacts(
    method="given",
    splits={"chat": {"train": 24}, "contexts": {"train": 24}},
    tasks={"narrativeqa": 24},
    generator="documents",
    lengths=[412 + 9 * index for index in range(24)],
    unit="words",
    contexts=(5, 5),
    seeds=[Source("pairs.jsonl", 24)],
    settings={"n_distractors": 4, "seed": 0},
)
INSTRUCTION = DatasetFacts(
    method="instruction",
    splits={"chat": {"train": 5000}, "contexts": {"train": 5000}, "rejected": {"train": 1}},
    tasks={"general": 5000},
    rejected={"parse": 1},
    generator="transformers",
    model="meta-llama/Llama-3.1-8B-Instruct",
    sampling={"temperature": 0.8, "max_tokens": 4096},
    prompts=(5000, "00aa11bb22cc33dd"),
    checks=("complete", "support"),
    lengths=[31_000 + index % 1700 for index in range(5000)],
    contexts=(7, 12),
    seeds=[Source("deepmind/pg19", 5000, on_hub=True)],
    seeds_license="apache-2.0",
    languages=("en", "no"),
    version="0.1.0",
)

RECORD = {
    "hf_longalign": "0.1.0",
    "base": {"name": "Qwen/Qwen2.5-0.5B-Instruct", "revision": "7ae557604adf67be50417f59c2c2f167def9a775"},
    "data": {
        "name": "longalign-lab/context-synthesis-8x200",
        "revision": "1c9f0de0a8f14fd6b0e7f1f0a7a1a4f8c1f3e5d7",
        "config": "chat",
        "split": "train",
    },
    "rope": {
        "model_type": "qwen2",
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "seed": 42,
    "positions": {"strategy": "skip_all", "target_length": 131072, "skip_probability": 0.5, "seed": 42},
    "coverage": {
        "target_length": 131072,
        "documents": 2952,
        "skip_share": 0.4966,
        "skip_span_mean": 43811.4,
        "skip_span_max": 131070,
        "skip_distance_max": 131069,
        "skip_distance_coverage": 0.9987,
        "histogram": {"edges": [], "pairs": [], "covered": []},
    },
    "training": {
        "loss_weighting": "sequence",
        "packing": True,
        "padding_free": True,
        "max_length": 16384,
        "attention": "longalign_varlen",
    },
    "run": {
        "steps": 184,
        "epochs": 2.0,
        "batch_size": 16,
        "learning_rate": 0.0002,
        "schedule": "cosine",
        "optimizer": "adamw_torch_fused",
        "precision": "bfloat16",
        "seconds": 6731.2,
    },
    "hardware": "1 x NVIDIA H100 80GB HBM3",
    "versions": {
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "trl": "1.16.0",
        "peft": "0.21.2",
        "datasets": "5.2.0",
        "accelerate": "1.15.0",
    },
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "revision": None,
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["v_proj", "q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def _task(task, metric, samples, base, adapter, spread, **more):
    scores = {
        name: {"value": value, "low": max(0.0, value - spread), "high": min(1.0, value + spread)}
        for name, value in (("base", base), ("adapter", adapter))
    }
    change = adapter - base
    difference = {"value": change, "low": change - spread, "high": change + spread}
    return {"task": task, "metric": metric, "samples": samples, "scores": scores, "difference": difference, **more}


REPORT = {
    "hf_longalign": "0.1.0",
    "date": "2026-11-21",
    "prompts": "8f4e2b0c9a7d6e5f4c3b2a190807f6e5d4c3b2a1f0e9d8c7b6a5f4e3d2c1b0a9",
    "models": [
        {"label": "base", "name": "/home/ada/models/qwen", "revision": None},
        {"label": "adapter", "name": "outputs/qwen2.5-0.5b", "revision": None},
    ],
    "suites": [
        {
            "suite": "needle",
            "metric": "exact_match",
            "tasks": [
                _task("single", "exact_match", 500, 0.918, 0.996, 0.02),
                _task("multi_key", "exact_match", 500, 0.412, 0.934, 0.03),
                _task("multi_value", "exact_match", 500, 0.388, 0.876, 0.03),
                _task("multi_query", "exact_match", 500, 0.451, 0.902, 0.03),
            ],
            "groups": [{"group": "average", "scores": {"base": 0.54225, "adapter": 0.927}}],
        },
        {
            "suite": "longbench",
            "metric": "",
            "tasks": [
                _task("qasper", "qa_f1", 200, 0.271, 0.334, 0.045),
                _task("hotpotqa", "qa_f1", 200, 0.302, 0.391, 0.05),
                _task("gov_report", "rouge", 200, 0.243, 0.262, 0.008),
                {"task": "multi_news", "metric": "rouge", "samples": 0, "scores": {}, "error": "/home/ada/x: no file"},
            ],
            "groups": [{"group": "average", "scores": {"base": 0.272, "adapter": 0.329}}],
        },
        {
            "suite": "short",
            "metric": "acc",
            "tasks": [
                _task("hellaswag", "acc_norm", 10042, 0.4996, 0.4981, 0.009),
                _task("arc_challenge", "acc_norm", 1172, 0.3353, 0.3353, 0.026),
            ],
            "groups": [],
        },
    ],
    "images": ["needle_accuracy.png", "needle_heatmap.png", "needle_single.png", "coverage.png"],
}

EXAMPLES = {
    "adapter_complete": adapter_facts(
        RECORD,
        ADAPTER_CONFIG,
        REPORT,
        repo_id="longalign-lab/qwen2.5-0.5b-128k",
        license="apache-2.0",
        languages=("en",),
        images=[f"assets/{name}" for name in REPORT["images"]],
    ),
    "adapter_record_alone": AdapterFacts(
        {name: RECORD[name] for name in ("hf_longalign", "rope", "seed", "positions", "training")}
    ),
    "adapter_whole_model": adapter_facts(
        RECORD, base_model="Qwen/Qwen2.5-0.5B-Instruct", images=["assets/coverage.png"]
    ),
    "dataset_context": WRITTEN,
    "dataset_given": GIVEN,
    "dataset_instruction": INSTRUCTION,
}
