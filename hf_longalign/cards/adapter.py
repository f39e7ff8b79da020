"""The card of a trained adapter or whole model: what it is, how to load it, how good it is, and how it was made."""

import json
from collections.abc import Mapping
from typing import Any

from hf_longalign.cards.citations import cite
from hf_longalign.cards.edits import REPOSITORY, assemble
from hf_longalign.cards.facts import AdapterFacts, Data, data_link, model_link, show_image
from hf_longalign.cards.markdown import code, fenced, join, plain
from hf_longalign.cards.scores import SUITES, failures, headline, metric_note, model_index, scores_table
from hf_longalign.cards.training import positions_section, training_section, versions_section


def adapter_card(facts: AdapterFacts) -> str:
    """Return the README.md of an adapter or a whole model.

    Example:

    >>> card = adapter_card(AdapterFacts({"positions": {"strategy": "skip_all", "target_length": 32768}}))
    >>> "| target length | 32,768 positions |" in card, "library_name: peft" in card
    (True, True)
    """
    return assemble(
        _metadata(facts),
        {
            "intro": _intro(facts),
            "use": _use(facts),
            "evaluation": _evaluation(facts),
            "positions": positions_section(facts),
            "training": training_section(facts),
            "versions": versions_section(facts),
            "citation": _citation(facts),
        },
    )


def _metadata(facts: AdapterFacts) -> dict[str, Any]:
    method = ["lora"] if facts.adapter_config.get("peft_type") == "LORA" else []
    skipped = facts.record.get("positions", {}).get("strategy", "none").startswith("skip_")
    name = facts.repo_id or REPOSITORY
    metadata = {
        "library_name": "transformers" if facts.whole else "peft",
        "pipeline_tag": "text-generation",
        "base_model": facts.base_model,
        "base_model_relation": ("finetune" if facts.whole else "adapter") if facts.base_model else None,
        "datasets": [facts.data.name] if facts.data else None,
        "license": facts.license,
        "language": list(facts.languages),
        "tags": ["hf_longalign", "long-context", *(["skipalign"] if skipped else []), *method, "trl", "sft"],
        "model-index": model_index(facts.report, name) if facts.report else None,
    }
    return {key: value for key, value in metadata.items() if value}


def _intro(facts: AdapterFacts) -> str:
    kind = "A LoRA adapter" if facts.adapter_config.get("peft_type") == "LORA" else "An adapter"
    if facts.whole:
        kind = "A fine-tuned version" if facts.base_model else "A model"
    base = f" of {model_link(facts.base_model)}" if facts.base_model else ""
    title = f"Long-context {'model' if facts.whole else 'adapter'}"
    if facts.base_model:
        title = facts.base_model.split("/")[-1] + (" for long contexts" if facts.record else "")
    positions = facts.record.get("positions", {})
    target, most = positions.get("target_length"), facts.record.get("training", {}).get("max_length")
    trained = ", trained for long contexts" if facts.record and kind != "An adapter" else ""
    sentences = [f"{kind}{base}{trained}."]
    if facts.data:
        sentences[0] = sentences[0].removesuffix(".") + f" on {data_link(Data(facts.data.name))}."
    if target and positions.get("strategy") != "none":
        length = f" of at most {most:,} tokens" if most else ""
        sentences.append(
            f"Short samples{length} were spread over {target:,} positions, so that the model learned long distances "
            "at the cost of short sequences."
        )
    sentences.append("Made with hf_longalign, an extension of [TRL](https://github.com/huggingface/trl).")
    return join(f"# {title}", " ".join(sentences), headline(facts.report) if facts.report else "")


def _use(facts: AdapterFacts) -> str:
    name = facts.repo_id or REPOSITORY
    if facts.whole:
        head = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")"""
    else:
        head = f"""\
from hf_longalign.adapter import load_adapter
from transformers import AutoTokenizer

model = load_adapter("{name}", dtype="auto", device_map="auto")"""
    load = f"""\
{head}
tokenizer = AutoTokenizer.from_pretrained("{name}")

messages = [{{"role": "user", "content": "Your long text, then your question."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
    if facts.whole:
        return join("## How to use it", "The RoPE it was trained with stands in its config:", fenced("python", load))
    return join(
        "## How to use it",
        "The adapter needs the RoPE it was trained with, set before the base model is loaded; set afterwards it does "
        "nothing. `load_adapter` does that, and checks that the base model is the one trained on:",
        fenced("python", load),
        *_without_package(facts, name),
    )


def _without_package(facts: AdapterFacts, adapter: str) -> list[str]:
    """The same with transformers and PEFT alone, where base model and RoPE are known."""
    rope = facts.record.get("rope", {})
    if not facts.base_model or not rope.get("rope_parameters"):
        return []
    lines = ["from peft import PeftModel", "from transformers import AutoConfig, AutoModelForCausalLM", ""]
    named = [f'name = "{facts.base_model}"']
    if facts.base_revision:
        named = [f'name, revision = "{facts.base_model}", "{facts.base_revision}"']
    revision = ", revision=revision" if facts.base_revision else ""
    lines += [
        *named,
        f"config = AutoConfig.from_pretrained(name{revision})",
        f"config.rope_parameters = {_literal(rope['rope_parameters'])}",
    ]
    if rope.get("max_position_embeddings"):
        lines.append(f"config.max_position_embeddings = {rope['max_position_embeddings']}")
    lines += [
        "model = AutoModelForCausalLM.from_pretrained(",
        "    name,",
        *(["    revision=revision,"] if revision else []),
        "    config=config,",
        '    dtype="auto",',
        '    device_map="auto",',
        ")",
        f'model = PeftModel.from_pretrained(model, "{adapter}")',
    ]
    return ["The same without hf_longalign:", fenced("python", "\n".join(lines))]


def _literal(value: Any, indent: str = "") -> str:
    """JSON data as Python, a line per key."""
    if not isinstance(value, Mapping):
        return json.dumps(value) if isinstance(value, str) else repr(value)
    inner = indent + "    "
    lines = "".join(f"{inner}{json.dumps(key)}: {_literal(item, inner)},\n" for key, item in value.items())
    return f"{{\n{lines}{indent}}}"


def _evaluation(facts: AdapterFacts) -> str:
    report = facts.report
    if report is None:
        return ""
    parts = []
    for suite in report["suites"]:
        title = SUITES.get(suite["suite"], (plain(suite["suite"]), ""))[0]
        shown = scores_table(report, suite)
        if not shown and not failures(suite):
            continue
        parts.append(f"### {title}")
        if suite["suite"] == "short":
            parts.append("What the training for long contexts costs on short ones.")
        parts += [shown, f"{metric_note(suite)}." if shown else "", failures(suite)]
        if suite["suite"] == "needle":
            parts += [show_image(facts, stem) for stem in ("needle_accuracy", "needle_heatmap")]
    if show_image(facts, "perplexity"):
        parts += ["### Perplexity by position", show_image(facts, "perplexity")]
    if not parts:
        return ""
    return join("## Evaluation", _protocol(report), *parts)


def _protocol(report: Mapping[str, Any]) -> str:
    # Not by the names of the report: they may be folders of the machine that evaluated.
    text = "The base model and this adapter were asked the same prompts." if len(report["models"]) > 1 else ""
    intervals = any(
        score.get("low") is not None
        for suite in report["suites"]
        for task in suite["tasks"]
        for score in (task.get("scores") or {}).values()
    )
    notes = ["In brackets: 95 % intervals; a change in bold is larger than chance at that level." if intervals else ""]
    notes += [f"Evaluated on {report['date']}." if report.get("date") else ""]
    notes += [f"Fingerprint of the prompts: {code(report['prompts'][:16])}." if report.get("prompts") else ""]
    return " ".join(filter(None, [text, *notes]))


def _citation(facts: AdapterFacts) -> str:
    strategy = facts.record.get("positions", {}).get("strategy", "none")
    suites = [suite["suite"] for suite in (facts.report or {}).get("suites", [])]
    names = ["skipalign"] if strategy.startswith("skip_") else ["pose"] if strategy == "pose" else []
    names += ["longalign"] if facts.record.get("training", {}).get("loss_weighting") == "sequence" else []
    names += ["longbench"] if "longbench" in suites else []
    return f"## Citation\n\n{cite([*names, 'trl'])}"
