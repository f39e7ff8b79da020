"""How an adapter was trained, as sections of its card: positions, everything else, versions."""

from collections.abc import Mapping
from typing import Any

from hf_longalign.cards.facts import AdapterFacts, data_link, model_link, show_image
from hf_longalign.cards.markdown import code, join, listed, table


STRATEGIES = {
    "none": "Positions are ordinary.",
    "skip_inner": "Positions jump inside a turn, between instruction and response.",
    "skip_outer": "Positions jump between the turns.",
    "skip_all": "Positions jump at every boundary between blocks: turns, and where the data tells them, contexts and "
    "question.",
    "pose": "Positions jump once, at a random token (PoSE).",
    "randpos": "Positions are a random increasing subset of the target length (RandPos).",
    "cream": "Head and tail of a sample lie at the two ends of the target length, its middle between them (CREAM).",
}


def positions_section(facts: AdapterFacts) -> str:
    """Return the section of the strategy, what was asked of it and what it covered; empty where nothing is known."""
    positions = facts.record.get("positions", {})
    strategy = positions.get("strategy")
    if strategy is None:
        return ""
    share = positions.get("skip_probability")
    rows = [
        ("strategy", code(strategy)),
        ("target length", f"{positions['target_length']:,} positions" if "target_length" in positions else ""),
        ("share of skipped samples", f"{share:g}" if share is not None else ""),
        ("seed", positions.get("seed", "")),
        *_covered(facts.record.get("coverage", {})),
    ]
    note = STRATEGIES.get(strategy, "Positions are drawn by a function of the author's own.")
    if strategy in ("skip_inner", "skip_outer", "skip_all"):
        note += " Tokens inside a block keep contiguous positions, and attention sees the whole sample."
    shown = [row for row in rows if row[1] != ""] if strategy != "none" else []
    return join("## Positions", note, table(("setting", "value"), shown), show_image(facts, "coverage"))


def _covered(coverage: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not coverage:
        return []
    rows = [
        ("samples seen, all epochs", f"{coverage['documents']:,}, {coverage['skip_share']:.1%} of them skipped"),
        ("relative distances covered", f"{coverage['skip_distance_coverage']:.1%} of all below the target length"),
        ("largest distance", f"{coverage['skip_distance_max']:,}"),
        ("mean span of a sample", f"{coverage['skip_span_mean']:,.0f} positions"),
    ]
    return rows


def training_section(facts: AdapterFacts) -> str:
    """Return the section of base, data, parameters, hardware and time; empty where nothing is known."""
    record = facts.record
    training, run = record.get("training", {}), record.get("run", {})
    rope = record.get("rope", {})
    packing = {True: "packed rows", False: "padded batches"}.get(training.get("packing"), "")
    weighting = {"sequence": "every sequence the same (LongAlign)", "token": "every token the same"}
    rows: list[tuple[str, Any]] = [
        ("base model", model_link(facts.base_model, facts.base_revision) if facts.base_model else ""),
        ("data", data_link(facts.data) if facts.data else ""),
        ("adapter", _lora(facts.adapter_config)),
        ("RoPE", _rope(rope)),
        ("longest sample", f"{training['max_length']:,} tokens" if training.get("max_length") else ""),
        ("batches", packing),
        ("loss weighting", weighting.get(str(training.get("loss_weighting")), "")),
        ("attention", code(training["attention"]) if training.get("attention") else ""),
        *_run(run),
        ("seed", record.get("seed", "")),
        ("hardware", record.get("hardware", "")),
    ]
    shown = [row for row in rows if row[1] not in ("", None)]
    return f"## Training\n\n{table(('setting', 'value'), shown)}" if shown else ""


def _lora(config: Mapping[str, Any]) -> str:
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type") or "")
    targets = config.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else sorted({name.rsplit(".", 1)[-1] for name in targets})
    parts = [f"LoRA of rank {config['r']}" if "r" in config else "LoRA"]
    parts += [f"alpha {config['lora_alpha']}" if config.get("lora_alpha") is not None else ""]
    parts += [f"dropout {config['lora_dropout']:g}" if config.get("lora_dropout") else ""]
    modules = "" if isinstance(targets, str) or len(targets) == len(names) else f" ({len(targets):,} modules)"
    parts += [f"on {listed([code(name) for name in names])}{modules}" if names else ""]
    return ", ".join(part for part in parts if part)


def _rope(rope: Mapping[str, Any]) -> str:
    parameters = rope.get("rope_parameters") or {}
    kind = parameters.get("rope_type")
    if kind is None:
        return ""
    text = "not scaled" if kind == "default" else str(kind)
    text += f", factor {parameters['factor']:g}" if "factor" in parameters else ""
    theta = parameters.get("rope_theta")
    most = rope.get("max_position_embeddings")
    text += f", theta {theta:,.0f}" if theta else ""
    return text + (f", {most:,} positions" if most else "")


def _run(run: Mapping[str, Any]) -> list[tuple[str, Any]]:
    steps, epochs = run.get("steps"), run.get("epochs")
    length = f"{steps:,} steps" if steps else ""
    if length and epochs:
        length += f", {epochs:.3g} epochs"
    rate = f"{run['learning_rate']:g}, {run['schedule']}" if "learning_rate" in run else ""
    seconds = run.get("seconds")
    return [
        ("length", length),
        ("batch", _rows(run.get("batch_size"))),
        ("optimiser", code(run["optimizer"]) if run.get("optimizer") else ""),
        ("learning rate", rate),
        ("precision", run.get("precision", "")),
        ("time", duration(seconds) if seconds and seconds >= 1 else ""),
    ]


def _rows(number: int | None) -> str:
    return "" if not number else "1 row a step" if number == 1 else f"{number:,} rows a step"


def duration(seconds: float) -> str:
    """Return a time as a person says it.

    >>> duration(59.4), duration(754), duration(9000)
    ('59 s', '12 min 34 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def versions_section(facts: AdapterFacts) -> str:
    """Return the section of the versions of the libraries; empty where nothing is known."""
    versions = dict(facts.record.get("versions") or {})
    if facts.record.get("hf_longalign"):
        versions = {"hf_longalign": facts.record["hf_longalign"], **versions}
    lines = "\n".join(f"- {name} {version}" for name, version in versions.items())
    return f"## Versions\n\n{lines}" if lines else ""
