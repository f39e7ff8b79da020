"""What an evaluation asks, of whom, and how: the options of `evaluate` and of the command line. Imports no torch."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_longalign.evaluation.longbench import expand_tasks
from hf_longalign.evaluation.needles import TASKS as NEEDLES
from hf_longalign.evaluation.ruler_data import TASKS as RULER
from hf_longalign.options import DTYPES, check_rules, json_object, option
from hf_longalign.puzzles import TASKS as PUZZLES
from hf_longalign.records.training import is_hub_id


SUITES = ("needle", "puzzles", "ruler", "longbench", "short", "perplexity")
# Whether alignment to long contexts has cost what the model knew: knowledge, reasoning, following instructions.
SHORT = ("mmlu_pro", "gsm8k", "ifeval")


@dataclass
class ModelOptions:
    """What is evaluated, and how it is loaded or reached."""

    model: str = field(metadata={"help": "Directory or Hub id of the model; of an adapter, its base."})
    adapter: str | None = option(None, "Directory or Hub id of the adapter.")
    model_revision: str | None = option(None, "Revision of the model.")
    adapter_revision: str | None = option(None, "Revision of the adapter.")
    tokenizer: str | None = option(None, "Tokenizer for all; unset: the model's, if the adapter's is the same.")
    dtype: str = option("auto", "Precision of the weights.", choices=DTYPES)
    attn_implementation: str | None = option(None, "Attention, as in transformers.")
    load_in_4bit: bool = option(False, "Quantise the base with bitsandbytes.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    endpoint: str | None = option(
        None, "Base URL of an OpenAI-compatible server that generates; it serves `adapter` by that name."
    )
    generator: str = option(
        "transformers",
        "What answers here: transformers, or vllm (extra [vllm]; all suites but short and perplexity).",
        choices=["transformers", "vllm"],
    )
    vllm_options: dict[str, Any] | str | None = option(
        None, "Arguments of `vllm.LLM`, as JSON or YAML: tensor_parallel_size, max_model_len …"
    )
    check_served: str = option(
        "stored",
        "Whether the endpoint must answer fixed prompts as the model that was trained: stored (by the answers that "
        "`merge` keeps; without them a model of scaled RoPE is refused), local (without them it is loaded here and "
        "asked) or off (the report says so).",
        choices=["stored", "local", "off"],
    )
    api_key_env: str = option("OPENAI_API_KEY", "The environment variable that holds the key; the key itself never.")
    max_concurrency: int = option(16, "The most requests at once to the endpoint.", least=1)
    batch_tokens: int = option(65536, "Tokens of a batch, answers included.", least=1)

    def check(self) -> None:
        """Refuse, before anything is loaded, what would fail later."""
        check_rules(self)
        # vLLM would ignore these, and loads an adapter of the Hub at its newest revision alone.
        ignored = ("endpoint", "load_in_4bit", "attn_implementation", "adapter_revision")
        remedies = {"adapter_revision": "Download it and give the folder.", "vllm_options": "Set `generator` to vllm."}
        for name in ignored if self.generator == "vllm" else ["vllm_options"]:
            if value := getattr(self, name):
                told = f"`{name}` must be unset with `generator` {self.generator}, got {value!r}."
                raise ValueError(f"{told} {remedies.get(name, 'Leave it out.')}")
        json_object("vllm_options", self.vllm_options)

    def check_suites(self, suites: Sequence[str]) -> None:
        """Refuse suites for which a model must be loaded here, where a server or vLLM answers."""
        if self.endpoint is not None and "perplexity" in suites:
            raise ValueError(
                "`suites` must be what a server can answer where `endpoint` is set, got 'perplexity', for which the "
                "model itself is needed. Leave `endpoint` out, or that suite."
            )
        for suite in ("perplexity", "short"):
            if self.generator == "vllm" and suite in suites:
                raise ValueError(
                    f"`suites` must be what vLLM answers here where `generator` is vllm, got {suite!r}. Leave it out, "
                    "set `generator` to transformers, or for short serve the model and set `endpoint`."
                )


@dataclass
class SuiteOptions:
    """What is asked."""

    suites: list[str] = option(["needle", "puzzles"], f"Any of {', '.join(SUITES)}.", choices=SUITES)
    output_dir: str = option("outputs/report", "Folder of the report and of all answers.")
    chat: bool | None = option(None, "Ask through the chat template; unset: if the tokenizer has one.")
    seed: int = option(0, "Seed of keys, values, places and puzzles; RULER has its own, 42.")
    lengths: list[int] = option(
        [], "Context lengths in tokens; unset: 1,024 and its doubles in the model's range.", least=1
    )
    depths: list[float] = option([0.0, 0.25, 0.5, 0.75, 1.0], "Depths of the needle, 0 to 1.", least=0, most=1)
    samples: int | None = option(
        None, "Samples of each task at each length, a needle's at all depths; unset: what `minutes` allow.", least=1
    )
    minutes: float = option(15.0, "Time for reading, where `samples` is unset.")
    needle_tasks: list[str] = option(list(NEEDLES), f"Any of {', '.join(NEEDLES)}.", choices=NEEDLES)
    puzzles: list[str] = option(list(PUZZLES), f"Any of {', '.join(PUZZLES)}.", choices=PUZZLES)
    diagnose: bool = option(
        False,
        "Ask needles, puzzles and RULER at the longest length over their evidence alone and closed-book, too, to tell "
        "why answers are wrong.",
    )
    ruler_tasks: list[str] = option(list(RULER), f"Any of {', '.join(RULER)}.", choices=RULER)
    ruler_questions: str | None = option(
        None, "Questions for RULER: SQuAD's or HotpotQA's JSON, or JSONL; unset: invented ones."
    )
    max_new_tokens: int = option(128, "Room for an answer, in tokens.", least=1)
    haystack: str | None = option(
        None,
        "A text file, a folder of them, or rows with a column text or context: JSONL, CSV, Parquet or "
        "user/name[:config][@split]; unset: built-in sentences.",
    )
    longbench_tasks: list[str] = option(
        ["context_synthesis"],
        "LongBench tasks; `context_synthesis`: that paper's eight; `all`: those of v1; `even`: those of "
        "LongBench-E; `v2`: the multiple choice of v2.",
    )
    longbench_source: str | None = option(
        None, "Hub id, data.zip, v2's data.json or a folder of `<task>.jsonl`; unset: LongBench's own."
    )
    longbench_length: int | None = option(
        None, "Tokens that longer LongBench prompts are cut to, as published: 3500, 7500, 31500.", least=1
    )
    short_tasks: list[str] = option(list(SHORT), "lm-eval tasks of short contexts.")
    limit: int | None = option(
        None, "Questions per task of longbench and short (unset: all), documents of perplexity (unset: 20).", least=1
    )
    perplexity_documents: str | None = option(
        None, "Long documents for perplexity, as `haystack`; unset: the haystack's."
    )
    perplexity_window: int | None = option(
        None, "Tokens of a perplexity window; unset: the largest of `lengths`.", least=1
    )

    def check(self) -> None:
        """Refuse, before anything is loaded, what would fail later.

        Raises:
            ValueError: names the option, its value and what to set.
        """
        check_rules(self)
        for name in ("suites", "needle_tasks", "puzzles", "ruler_tasks", "lengths", "depths"):
            given = getattr(self, name)
            if len(set(given)) < len(given):  # it would count double
                raise ValueError(f"`{name}` must be all different, got {given}. Name each once.")
            if not given and name != "lengths":
                raise ValueError(f"`{name}` must hold something, got {given}. Leave it out for the usual ones.")
        if self.minutes <= 0:
            raise ValueError(f"`minutes` must be above 0, got {self.minutes}. Set more, or `samples`.")
        if self.ruler_questions is not None and not Path(self.ruler_questions).is_file():
            raise ValueError(f"`ruler_questions` must be a file, got {self.ruler_questions!r}. Correct the path.")
        if "longbench" in self.suites:
            expand_tasks(self.longbench_tasks)
        source = self.longbench_source
        is_id = source and is_hub_id(source) and "/" in source
        if "longbench" in self.suites and source and not is_id and not Path(source).exists():
            raise ValueError(
                f"`longbench_source` must be a Hub id, data.zip or a folder, got {source!r}, which is not there. "
                "Correct the path."
            )
        try:
            # A folder that is full or read-only is told now: the report is written when hours of answers are there.
            Path(self.output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output_dir):
                pass
        except OSError as error:
            raise ValueError(
                f"`output_dir` must be a folder to write to, got {self.output_dir!r} ({error}). Set another."
            ) from None
