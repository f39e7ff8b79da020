"""What a study compares and asks: its arms, which differ in one thing each, and its options."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from study_data import HUB_DATA

from hf_longalign.options import option
from hf_longalign.run_record import versions


# Seeds of what is asked: choices are made by the answers to one set, and reported are those to another.
QUESTION_SEEDS = {"development": 1, "report": 2}


class Arm(NamedTuple):
    """What makes an arm: its title, whether RoPE is scaled, how it is trained (`None`: not), its blocks and rows.

    `share` is how many of its rows are skipped; `None`: as many as the option `skip_probability` says.
    """

    title: str
    scaled: bool = True
    strategy: str | None = None
    parts: bool = True
    rows: str = "data"
    share: float | None = None

    @property
    def long(self) -> bool:
        """Whether rows are as long as the target: one in a forward, recomputed in the backward pass."""
        return self.rows in ("data_long", "needles_long", *WRITTEN)

    @property
    def timed(self) -> bool:
        """Whether it is trained for the seconds that ordinary positions took, not for as many steps."""
        return self.rows == "data_long"


# Rows that a language model has written, as one context or as the gold one of several.
WRITTEN_FOR = {"instructions": "pairs written for texts", "contexts": "texts written for pairs"}
WRITTEN = {f"{kind}_{number}": (kind, number) for kind in WRITTEN_FOR for number in (1, 5, 10)}
ARMS = {
    "plain": Arm("plain model", scaled=False),
    "scaled": Arm("RoPE scaled, not trained"),
    "ordinary": Arm("ordinary positions", strategy="none"),
    "pose": Arm("pose", strategy="pose"),
    "cream": Arm("cream", strategy="cream"),
    "skip_turns": Arm("skip_all, turns alone", strategy="skip_all", parts=False),
    "skip_parts": Arm("skip_all, parts", strategy="skip_all"),
    "skip_context": Arm("skip_context", strategy="skip_context"),
    "skip_context_20": Arm("skip_context, 20 % of the rows", strategy="skip_context", share=0.2),
    "skip_context_100": Arm("skip_context, all rows", strategy="skip_context", share=1.0),
    "long_rows": Arm("long rows in the same seconds", strategy="none", rows="data_long"),
    # The pilot study of Context Synthesis: what must stand around a needle, so that it is learned to be found?
    "general": Arm("general data alone", strategy="none", parts=False, rows="general"),
    "needles_bare": Arm("and needles without a text", strategy="none", parts=False, rows="needles_bare"),
    "needles_short": Arm("and needles in short texts", strategy="none", parts=False, rows="needles_short"),
    "needles_long": Arm("and needles in long texts", strategy="none", parts=False, rows="needles_long"),
    # Context Synthesis against its baseline, pairs written for given texts.
    **{
        name: Arm(f"and {WRITTEN_FOR[kind]}, {number} in a row", strategy="none", parts=False, rows=name)
        for name, (kind, number) in WRITTEN.items()
    },
}
PILOT = ("general", "needles_bare", "needles_short", "needles_long")


@dataclass
class StudyOptions:
    """What is trained, on what, and what is asked."""

    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", "Hub id or folder.")
    base_name: str | None = option(None, "What report and cards call a model that is a folder: its Hub id.")
    seeds: str = option(HUB_DATA, "Hub id with HotpotQA's columns, or a folder of seeds.")
    most_pairs: int = option(20_000, "Read at most so many rows of a data set.")
    output_dir: str = option("outputs/study", "Folder of everything.")
    arms: list[str] = option(
        [arm for arm, what in ARMS.items() if what.rows == "data" and what.share is None],
        f"Some of {', '.join(ARMS)}, in the order of importance.",
    )
    training_seeds: list[int] = option([0], "Seeds; the first of all first.")
    general: str | None = option(None, "Hub id of the chats in the pilot's arms; unset: pairs with their passages.")
    writer: str = option("Qwen/Qwen2.5-7B-Instruct", "Model that writes rows, where arms have them written.")
    writer_endpoints: list[str] = option([], "Servers of it; none: it is loaded here.")
    context_words: int = option(300, "Words of a written context.")
    rows: int = option(128, "Rows to train on; in the pilot so many of each kind.")
    row_tokens: int = option(768, "The most tokens of a row.")
    gold_tokens: int = option(
        300, "The most tokens of gold passages in a row; twice that in a text that is asked about."
    )
    epochs: float = option(1.0, "Times each row is trained on.")
    batch_size: int = option(8, "Rows of a step.")
    micro_batch_size: int = option(8, "Rows of a forward.")
    learning_rate: float = option(3e-4, "Of AdamW, cosine.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_target_modules: list[str] = option(["q_proj", "k_proj", "v_proj", "o_proj"], "Layers it changes.")
    target_length: int = option(16384, "Positions that RoPE is scaled and skips go to.")
    rope_type: str = option("yarn", "How RoPE is scaled.")
    distances: list[int] = option([], "Distances that the loss of short rows is watched at while training.")
    skip_probability: float = option(0.5, "Share of the rows that are skipped.")
    dtype: str = option("bfloat16", "Precision of the weights.")
    split: str = option("report", "Whose questions: development (for choices) or report.")
    cells: list[str] = option(
        ["512:4", "2048:4", "4096:3", "8192:2", "16384:2"], "length:texts, in the order in which they are asked."
    )
    needles: int = option(16, "Needles in a text, a multiple of `keys_at_once`.")
    keys_at_once: int = option(4, "Keys of a question for several.")
    most_golds: int = option(24, "The most questions about passages per text.")
    perplexity_texts: str | None = option(None, "Folder of .txt files; unset: the passages of the questions.")
    perplexity_documents: int = option(8, "Documents of 2,048 tokens.")
    position_documents: int = option(2, "Documents of `target_length`, whose perplexity is told by position.")
    batch_tokens: int = option(65_536, "Tokens of texts and answers kept at once on asking.")
    models_kept: int = option(1, "Models of arms kept in memory between texts.")
    minutes: float | None = option(None, "Begin nothing new after so many, but report.")

    def __post_init__(self) -> None:
        for name, allowed in (("arms", ARMS), ("split", QUESTION_SEEDS)):
            value = getattr(self, name)
            for word in value if isinstance(value, list) else [value]:
                if word not in allowed:
                    raise ValueError(f"`{name}` must be among {', '.join(allowed)}, got {word!r}. Correct it.")
        if "long_rows" in self.arms and "ordinary" not in self.arms:
            raise ValueError("`arms` must hold ordinary beside long_rows, which trains for its seconds. Add it.")

    @property
    def grid(self) -> list[tuple[int, int]]:
        """Length and number of every text, in the order in which they are asked."""
        found = [tuple(map(int, cell.split(":"))) for cell in self.cells]
        return [(length, number) for length, texts in found for number in range(texts)]


def settings(options: StudyOptions) -> dict[str, Any]:
    """Return what a reader must know to do the same again; of folders only the last part of their path."""
    told = {name: value for name, value in asdict(options).items() if value is not None}
    hidden = ["output_dir", "minutes", "base_name", "models_kept", "batch_tokens", "writer_endpoints"]
    hidden += [] if set(options.arms) & set(WRITTEN) else ["writer", "context_words"]
    for name in hidden:
        told.pop(name, None)
    for name in ("model", "seeds", "perplexity_texts", "writer"):
        if Path(told.get(name, "")).is_dir() and name in told:
            told[name] = Path(told[name]).resolve().name
    told["model"] = options.base_name or told["model"]
    cpu = f"{os.cpu_count()} CPU cores, threads used: {torch.get_num_threads()}"
    told["machine"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return told | versions()
