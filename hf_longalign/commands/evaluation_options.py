"""The options of `evaluate.py`, and what is wrong with them before anything is loaded."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path


SUITES = ("needle", "longbench", "ruler", "short", "perplexity")


@dataclass
class ModelArguments:
    """What is evaluated, and how it is loaded or reached."""

    model: str = field(metadata={"help": "Directory or Hub id of the model; of an adapter, its base."})
    adapter: str | None = field(default=None, metadata={"help": "Directory or Hub id of the adapter."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model."})
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the adapter."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer for both; unset: the model's, if the adapter's is the same."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention, as in transformers."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base with bitsandbytes."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    endpoint: str | None = field(
        default=None,
        metadata={"help": "Base URL of an OpenAI-compatible server that generates; it serves `adapter` by that name."},
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "The environment variable that holds the key; the key itself never."},
    )
    concurrency: int = field(default=16, metadata={"help": "Requests at once to the endpoint."})
    batch_tokens: int = field(default=65536, metadata={"help": "Tokens of a batch, answers included."})


@dataclass
class SuiteArguments:
    """What is asked."""

    suite: str = field(default="needle", metadata={"help": f"Any of {', '.join(SUITES)}, joined by commas."})
    output_dir: str = field(default="outputs/report", metadata={"help": "Folder of the report and of all answers."})
    chat: bool | None = field(
        default=None, metadata={"help": "Ask through the chat template; unset: if the tokenizer has one."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of keys, values and places of needles."})
    lengths: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Lengths of needle and RULER, in tokens; unset: 1,024 and its doubles in the model's range."
        },
    )
    depths: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0], metadata={"help": "Depths of the needle, 0 to 1."}
    )
    samples: int = field(default=10, metadata={"help": "Needle questions per task, length and depth."})
    needle_tasks: list[str] = field(
        default_factory=lambda: ["single", "multi_key", "multi_value", "multi_query"],
        metadata={"help": "Needle tasks."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Room for the answer to a needle question, in tokens."})
    haystack: str | None = field(
        default=None, metadata={"help": "A text file, a folder of them or a data set; unset: the built-in noise."}
    )
    haystack_column: str = field(default="text", metadata={"help": "Column of the data set."})
    haystack_split: str = field(default="train", metadata={"help": "Split of the data set."})
    longbench_tasks: list[str] = field(
        default_factory=lambda: ["context_synthesis"],
        metadata={"help": "LongBench tasks; `context_synthesis`: that paper's eight; `all`: all of them."},
    )
    longbench_source: str = field(
        default="zai-org/LongBench", metadata={"help": "Hub id, data.zip or a folder of `<task>.jsonl`."}
    )
    short_tasks: list[str] = field(
        default_factory=lambda: ["mmlu_pro", "gsm8k", "ifeval"], metadata={"help": "lm-eval tasks of short contexts."}
    )
    limit: int | None = field(default=None, metadata={"help": "Questions per task of longbench, ruler and short."})
    perplexity_documents: str | None = field(
        default=None, metadata={"help": "Long documents for perplexity, as `haystack`; unset: the haystack's."}
    )
    perplexity_window: int | None = field(
        default=None, metadata={"help": "Tokens of a perplexity window; unset: the largest of `lengths`."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Publish in this repository of the adapter."})
    private: bool = field(default=False, metadata={"help": "Whether a repository that is new on the Hub is private."})


def check_suites(args: SuiteArguments, endpoint: str | None) -> list[str]:
    """Return the names of the suites; refuse unknown ones, and those that cannot be had from an endpoint."""
    names = [name.strip() for name in args.suite.split(",") if name.strip()]
    for name in names or [args.suite]:
        if name not in SUITES:
            raise ValueError(f"`suite` must be among {', '.join(SUITES)}, joined by commas, got {name!r}. Correct it.")
        if endpoint is not None and name not in ("needle", "longbench"):
            raise ValueError(
                f"`suite` {name!r} needs the model itself, got an endpoint, which has needle and longbench alone. "
                "Leave `endpoint` out."
            )
    source = Path(args.longbench_source)
    if "longbench" in names and not source.exists() and (source.is_absolute() or len(source.parts) != 2):
        raise ValueError(
            f"`longbench_source` must be a Hub id, data.zip or a folder, got {str(source)!r}, which is not there. "
            "Correct the path."
        )
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {args.limit}. Leave it out to ask all.")
    return names


def check_output(output_dir: str) -> None:
    """Refuse a folder that cannot be written to, before models are loaded."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder to write to, got {output_dir!r} ({error}). Set another."
        ) from None
