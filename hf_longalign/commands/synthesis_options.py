"""The options of `synthesize`, and what is wrong with them before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_longalign.cards.page import check_license
from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import CardOptions, HubOptions, PublishOptions
from hf_longalign.synthesis.config import SynthesisOptions


DESCRIPTION = """Turn short instruction-answer pairs into long-context chat data.

    hf-longalign synthesize --config recipes/synthesis/openai.yaml --seeds hotpotqa=pairs.jsonl \\
        --output_dir outputs/contexts

--dry_run prints the plan, three prompts and what the run would cost. A run that was interrupted, for whatever reason,
goes on where it stopped when it is started again. On several GPUs: accelerate launch -m hf_longalign synthesize …"""


@dataclass
class SynthesizeArguments:
    """Who writes, what it may cost, and where everything goes."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the Parquet files and the card."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for the journal and prepared data; unset: the cache of datasets."}
    )
    journal: str | None = field(default=None, metadata={"help": "The journal's file; unset: one in `cache_dir`."})
    seeds_license: str | None = field(default=None, metadata={"help": "Licence of the seeds, as the Hub names it."})
    generator: str = field(
        default="documents",
        metadata={
            "help": "Who writes: an endpoint, the Batch API of the first endpoint (half the price), a local model, or "
            "nobody, where the seeds have their contexts.",
            "choices": ["openai", "batch", "transformers", "documents"],
        },
    )
    model: str | None = field(default=None, metadata={"help": "The model that writes."})
    endpoints: list[str] = field(
        default_factory=lambda: ["http://localhost:8000/v1"],
        metadata={"help": "Base URLs of OpenAI-compatible endpoints that serve the model."},
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "The environment variable that holds the key; the key itself never."},
    )
    max_concurrency: int = field(default=64, metadata={"help": "The most requests at once to one endpoint."})
    batch_command: str | None = field(
        default=None,
        metadata={
            "help": 'With generator "batch", a command in place of a Batch API: '
            "'vllm run-batch -i {input} -o {output} --model MODEL'."
        },
    )
    batch_size: int = field(default=16, metadata={"help": 'Rows at once with generator "transformers".'})
    judge_model: str | None = field(
        default=None, metadata={"help": "A model that judges and answers in place of the one that writes."}
    )
    judge_endpoints: list[str] = field(
        default_factory=list, metadata={"help": "Base URLs of its endpoints; unset: a local model."}
    )
    prompt_price: float = field(default=0.0, metadata={"help": "Dollars per million prompt tokens."})
    completion_price: float = field(default=0.0, metadata={"help": "Dollars per million completion tokens."})
    budget_tokens: int | None = field(default=None, metadata={"help": "Stop before more tokens are spent."})
    budget_usd: float | None = field(default=None, metadata={"help": "Stop before more dollars are spent."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that compose rows."})
    num_shards: int = field(
        default=1,
        metadata={
            "help": "Ask for one of so many parts of the seeds, compose nothing; merge the journals afterwards."
        },
    )
    shard_index: int = field(default=0, metadata={"help": "Which part, from 0."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan, three prompts and the cost; ask nothing."})

    @property
    def price_share(self) -> float:
        """The share of the prices that is billed."""
        return 0.5 if self.generator == "batch" and self.batch_command is None else 1.0

    def check(self) -> None:
        """Refuse what is missing or makes no sense."""
        check_license(seeds_license=self.seeds_license)
        if self.output_dir is None and not self.dry_run and self.num_shards == 1:
            raise ValueError("`output_dir` must be given, got None. Name the folder to write to.")
        if self.model is None and self.generator != "documents":
            raise ValueError(
                f"`model` must be given with generator {self.generator!r}, got None. Name the one that writes."
            )
        if self.batch_command is not None and self.generator != "batch":
            raise ValueError(
                f"`batch_command` must come with `generator` 'batch', got {self.generator!r}. Set it, or leave out "
                "the command."
            )
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(
                f"`shard_index` must be from 0 to below `num_shards`, got {self.shard_index} of {self.num_shards}. "
                "Count the parts from 0."
            )


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return the options of the run, of the data, of the Hub, of publishing and of the card."""
    parser = OptionParser(
        "synthesize", (SynthesizeArguments, SynthesisOptions, HubOptions, PublishOptions, CardOptions), DESCRIPTION
    )
    args, options, hub, publish, card = parser.read(arguments)
    try:
        options.validate()
        publish.check_idle(push_to_hub=hub.push_to_hub)
        if hub.push_to_hub and not args.dry_run and args.output_dir is not None:
            publish.check_push(hub, args.output_dir)
    except ValueError as error:
        parser.error(str(error))
    return args, options, hub, publish, card
