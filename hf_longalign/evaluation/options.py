"""What an evaluation asks, of whom, and how: the options of `evaluate` and of the command line. Imports no torch."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from hf_longalign.evaluation.longbench import expand_tasks
from hf_longalign.evaluation.needles import TASKS as NEEDLES
from hf_longalign.evaluation.ruler_data import TASKS as RULER
from hf_longalign.options import DTYPES, option
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
    vllm_options: str | None = option(None, "Arguments of `vllm.LLM` as JSON: tensor_parallel_size, max_model_len …")
    check_served: str = option(
        "stored",
        "Whether the endpoint must answer fixed prompts as the model that was trained: stored (by the answers that "
        "`merge` keeps; without them a model of scaled RoPE is refused), local (without them it is loaded here and "
        "asked) or off (the report says so).",
        choices=["stored", "local", "off"],
    )
    api_key_env: str = option("OPENAI_API_KEY", "The environment variable that holds the key; the key itself never.")
    max_concurrency: int = option(16, "The most requests at once to the endpoint.")
    batch_tokens: int = option(65536, "Tokens of a batch, answers included.")

    def check(self) -> None:
        """Refuse, before anything is loaded, what would fail later."""
        for one in fields(self):
            choices = one.metadata.get("choices")  # which a command line has looked at already
            if choices and getattr(self, one.name) not in choices:
                told = " or ".join([", ".join(choices[:-1]), choices[-1]])
                raise ValueError(f"`{one.name}` must be {told}, got {getattr(self, one.name)!r}. Set {choices[0]}.")
        # vLLM would ignore these, and loads an adapter of the Hub at its newest revision alone.
        ignored = ("endpoint", "load_in_4bit", "attn_implementation", "adapter_revision")
        for name in ignored if self.generator == "vllm" else ():
            if getattr(self, name):
                remedy = "Download it and give the folder." if name == "adapter_revision" else "Leave it out."
                raise ValueError(
                    f"`{name}` must be unset with `generator` vllm, got {getattr(self, name)!r}. {remedy}"
                )
        if self.vllm_options is not None:
            try:
                fits = self.generator == "vllm" and isinstance(json.loads(self.vllm_options), dict)
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(
                    f"`vllm_options` must be a JSON object beside `generator` vllm, got {self.vllm_options!r}. Set "
                    "`--generator vllm --vllm_options '{\"max_model_len\": 32768}'`, for instance."
                )
        for name in ("max_concurrency", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}. Set a larger number.")

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

    suites: list[str] = option(["needle", "puzzles"], f"Any of {', '.join(SUITES)}.")
    output_dir: str = option("outputs/report", "Folder of the report and of all answers.")
    chat: bool | None = option(None, "Ask through the chat template; unset: if the tokenizer has one.")
    seed: int = option(0, "Seed of keys, values, places and puzzles; RULER has its own, 42.")
    lengths: list[int] = option([], "Context lengths in tokens; unset: 1,024 and its doubles in the model's range.")
    depths: list[float] = option([0.0, 0.25, 0.5, 0.75, 1.0], "Depths of the needle, 0 to 1.")
    samples: int | None = option(
        None, "Samples of each task at each length, a needle's at all depths; unset: what `minutes` allow."
    )
    minutes: float = option(15.0, "Time for reading, where `samples` is unset.")
    needle_tasks: list[str] = option(list(NEEDLES), f"Any of {', '.join(NEEDLES)}.")
    puzzles: list[str] = option(list(PUZZLES), f"Any of {', '.join(PUZZLES)}.")
    diagnose: bool = option(
        False,
        "Ask needles, puzzles and RULER at the longest length over their evidence alone and closed-book, too, to tell "
        "why answers are wrong.",
    )
    ruler_tasks: list[str] = option(list(RULER), f"Any of {', '.join(RULER)}.")
    ruler_questions: str | None = option(
        None, "Questions for RULER: SQuAD's or HotpotQA's JSON, or JSONL; unset: invented ones."
    )
    max_new_tokens: int = option(128, "Room for an answer, in tokens.")
    haystack: str | None = option(
        None, "A text file, a folder of them or user/name[:config][@split]; unset: built-in sentences."
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
        None, "Tokens that longer LongBench prompts are cut to, as published: 3500, 7500, 31500."
    )
    short_tasks: list[str] = option(list(SHORT), "lm-eval tasks of short contexts.")
    limit: int | None = option(
        None, "Questions per task of longbench and short (unset: all), documents of perplexity (unset: 20)."
    )
    perplexity_documents: str | None = option(
        None, "Long documents for perplexity, as `haystack`; unset: the haystack's."
    )
    perplexity_window: int | None = option(None, "Tokens of a perplexity window; unset: the largest of `lengths`.")

    def check(self) -> None:
        """Refuse, before anything is loaded, what would fail later.

        Raises:
            ValueError: names the option, its value and what to set.
        """
        for name, allowed in (
            ("suites", SUITES),
            ("needle_tasks", NEEDLES),
            ("puzzles", PUZZLES),
            ("ruler_tasks", RULER),
        ):
            for word in getattr(self, name) or [""]:
                if word not in allowed:
                    raise ValueError(f"`{name}` must be among {', '.join(allowed)}, got {word!r}. Set some of them.")
        for name in ("suites", "needle_tasks", "puzzles", "ruler_tasks", "lengths", "depths"):
            given = getattr(self, name)
            if len(set(given)) < len(given):  # it would count double
                raise ValueError(f"`{name}` must be all different, got {given}. Name each once.")
        for name in ("samples", "max_new_tokens", "limit", "longbench_length", "perplexity_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}. Set a larger number, or leave it out.")
        if min(self.lengths, default=1) < 1:
            raise ValueError(f"`lengths` must be at least 1, got {min(self.lengths)}. Set numbers of tokens.")
        depth = next((depth for depth in self.depths if not 0 <= depth <= 1), None)
        if depth is not None or not self.depths:
            raise ValueError(f"`depths` must be 0 to 1, got {depth}. Set shares of the text.")
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
