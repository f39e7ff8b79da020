"""The options of `evaluate`, and what is wrong with them before anything is loaded."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import AdapterCardOptions, HubOptions, PublishOptions
from hf_longalign.hub import check_base_name


DESCRIPTION = """Ask a model, and the adapter trained on it, the same questions, and write a report of what changed.

    hf-longalign evaluate --model Qwen/Qwen2.5-0.5B-Instruct --adapter outputs/qwen2.5-0.5b \\
        --suites needle longbench ruler short --output_dir outputs/report

Every answer is on disk as soon as it is there: the same command goes on where a killed one stopped. Several processes
(accelerate launch -m hf_longalign evaluate …) share the questions."""

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

    suites: list[str] = field(default_factory=lambda: ["needle"], metadata={"help": f"Any of {', '.join(SUITES)}."})
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

    def check(self) -> None:
        """Refuse what cannot be asked."""
        for name in self.suites:
            if name not in SUITES:
                raise ValueError(f"`suites` must be among {', '.join(SUITES)}, got {name!r}. Correct it.")
        source = Path(self.longbench_source)
        if "longbench" in self.suites and not source.exists() and (source.is_absolute() or len(source.parts) != 2):
            raise ValueError(
                f"`longbench_source` must be a Hub id, data.zip or a folder, got {str(source)!r}, which is not there. "
                "Correct the path."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}. Leave it out to ask all.")


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return model, suite, Hub, publishing and card options."""
    parser = OptionParser(
        "evaluate", (ModelArguments, SuiteArguments, HubOptions, PublishOptions, AdapterCardOptions), DESCRIPTION
    )
    model, args, hub, publish, card = parser.read(arguments)
    try:
        check(model, args, hub, publish, card)
    except ValueError as error:
        parser.error(str(error))
    return model, args, hub, publish, card


def check(
    model: ModelArguments, args: SuiteArguments, hub: HubOptions, publish: PublishOptions, card: AdapterCardOptions
) -> None:
    """Refuse what is wrong with several of the options together, and a folder that cannot be written to."""
    for name in args.suites:
        if model.endpoint is not None and name not in ("needle", "longbench"):
            raise ValueError(
                f"`suites` {name!r} needs the model itself, got an endpoint, which has needle and longbench alone. "
                "Leave `endpoint` out."
            )
    if hub.push_to_hub:
        if model.adapter is None:
            raise ValueError("`push_to_hub` adds the report to the card of an adapter, got none. Set `adapter`.")
        if not Path(model.adapter).is_dir():
            hub.hub_model_id = hub.hub_model_id or model.adapter
        publish.check_push(hub, model.adapter)
        if Path(model.adapter).is_dir():
            check_base_name(card.base_name, model.model)
    check_output(args.output_dir)


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
