"""Turn short instruction-answer pairs into long-context chat data.

    accelerate launch recipes/synthesize.py --config recipes/synthesis/openai.yaml --output_dir outputs/contexts

Every field of `SynthesizeArguments` and of `SynthesisOptions` can stand in the YAML or on the command line, which
wins. `--dry_run` prints the plan, three prompts and what the run would cost. A run that was interrupted, for whatever
reason, goes on where it stopped when it is started again.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from trl import TrlParser

from hf_longalign.cards.page import check_license
from hf_longalign.commands.publishing import PublishArguments, start_logging
from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.endpoint.protocol import Generator, RunStopped
from hf_longalign.hub import PublishError, publish_command, publish_dataset
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.estimate import estimate, planned_requests
from hf_longalign.synthesis.local import TransformersGenerator
from hf_longalign.synthesis.team import join_team


@dataclass
class SynthesizeArguments:
    """Who writes, what it may cost, and where everything goes."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the Parquet files and the card."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Publish as this data set, `user/name`."})
    private: bool = field(default=False, metadata={"help": "Whether a data set that is new on the Hub is private."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for the journal and prepared data; unset: the cache of datasets."}
    )
    journal: str | None = field(default=None, metadata={"help": "The journal's file; unset: one in `cache_dir`."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the data set, as the Hub names it: cc-by-4.0, apache-2.0 …"}
    )
    seeds_license: str | None = field(default=None, metadata={"help": "Licence of the seeds, as the Hub names it."})
    generator: str = field(
        default="documents",
        metadata={
            "help": "Who writes: an endpoint, a local model, or nobody, where the seeds have their contexts.",
            "choices": ["openai", "transformers", "documents"],
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


def make_generators(args: SynthesizeArguments, rank: int) -> tuple[Generator | str, Generator | None]:
    """Return who writes and who judges."""
    judge = None
    if args.judge_model is not None:
        judge = make_generator(args, args.judge_model, args.judge_endpoints, rank)
    if args.generator == "documents":
        return "documents", judge
    if args.model is None:
        raise ValueError(
            f"`model` must be given with generator {args.generator!r}, got None. Name the one that writes."
        )
    return make_generator(args, args.model, args.endpoints if args.generator == "openai" else [], rank), judge


def make_generator(args: SynthesizeArguments, model: str, endpoints: list[str], rank: int) -> Generator:
    """Return the generator of a model: its endpoints', or a local one on this process's own device."""
    if endpoints:
        return OpenAIGenerator(model, endpoints, api_key_env=args.api_key_env, max_concurrency=args.max_concurrency)
    state = PartialState()
    device = f"cuda:{state.local_process_index}" if state.num_processes > 1 and state.device.type == "cuda" else None
    return TransformersGenerator(model, batch_size=args.batch_size, device=device)


def make_builder(args: SynthesizeArguments, options: SynthesisOptions) -> ContextSynthesisBuilder:
    """Return the builder of `chat`, from which those of the other configurations come."""
    state = PartialState()
    generator, judge = make_generators(args, state.process_index)
    builder = ContextSynthesisBuilder(
        generator=generator,
        judge=judge,
        journal=args.journal,
        budget=Budget(args.budget_tokens, args.budget_usd, args.prompt_price, args.completion_price),
        show_progress=None if state.is_main_process else False,
        cache_dir=args.cache_dir,
        **asdict(options),
    )
    builder.pipeline.shard = (args.shard_index, args.num_shards)
    return builder


def print_plan(builder: ContextSynthesisBuilder, args: SynthesizeArguments, options: SynthesisOptions) -> None:
    """Print what a run would do, and ask nothing."""
    pipeline = builder.pipeline
    pipeline.check()
    seeds, plan, counter = pipeline.seeds, pipeline.plan, builder.files.counter
    writes = args.generator != "documents"
    budget = Budget(prompt_price=args.prompt_price, completion_price=args.completion_price)
    count = counter.count if counter else None
    found = estimate(seeds, plan, options, writes=writes, budget=budget, count=count)
    tasks = {task: sum(seed.task == task for seed in seeds) for task in sorted({seed.task for seed in seeds})}
    print(f"seeds      {len(seeds):,}: " + ", ".join(f"{task} {number:,}" for task, number in tasks.items()))
    for reason, number in pipeline.all_seeds.skipped.most_common():
        print(f"skipped    {number:,}: {reason}")
    print(f"generator  {builder.config.generator} {builder.config.model}".rstrip())
    requests = ", ".join(f"{number:,} {purpose}" for purpose, number in found.requests.items())
    print(f"requests   {requests or 'none'}")
    print(f"tokens     about {found.prompt_tokens:,} in and {found.completion_tokens:,} out, without retries")
    print(
        f"cost       about ${found.spend.usd:,.2f}; ${found.most.usd:,.2f} if every reply and retry runs to its limit"
    )
    if plan.judge:
        print("           and what the judge is asked where an answer does not stand in its context word for word")
    for number, seed in enumerate(seeds[:: max(1, len(seeds) // 3)][:3], 1):
        for planned in planned_requests(seed, plan, options, writes=writes):
            print(f"\n--- seed {number} of 3, {seed.origin}: {planned.purpose} ---")
            print("\n\n".join(f"[{role}]\n{content}" for role, content in planned.messages))


def main() -> int:
    """Run the recipe; the exit status is 1 where it stopped and a rerun goes on."""
    start_logging()
    parser = TrlParser((SynthesizeArguments, SynthesisOptions, PublishArguments))
    args, options, publish_args = parser.parse_args_and_config()
    # On a machine without an accelerator, several processes know of each other only if told that they are on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if args.output_dir is None and not args.dry_run and args.num_shards == 1:
        raise ValueError("`output_dir` must be given, got None. Name the folder to write to.")
    check_license(license=args.license, seeds_license=args.seeds_license)
    if args.push_to_hub is not None and not args.dry_run:
        publish_args.check(args.push_to_hub)
    builder = make_builder(args, options)
    if args.dry_run:
        if state.is_main_process:
            print_plan(builder, args, options)
        return 0
    builder.pipeline.team = join_team(builder.files.folder)
    try:
        leads = builder.prepare_outcomes()
        if leads and args.num_shards > 1:
            print(f"Shard {args.shard_index} of {args.num_shards} is in {builder.pipeline.journal.name}.")
        elif leads:
            licenses = {"license": args.license, "seeds_license": args.seeds_license}
            folder = builder.export(args.output_dir, num_proc=args.num_proc, **licenses)
            print(f"Wrote {folder}.")
            if args.push_to_hub is not None:
                to: dict[str, Any] = {"repo_id": args.push_to_hub, "private": args.private or None}
                command = publish_command("publish_dataset", folder, **to, **publish_args.options())
                print(publish_args.push(partial(publish_dataset, folder, **to), command))
    except (RunStopped, KeyboardInterrupt) as stop:
        print(f"Stopped: {str(stop) or 'interrupted'} Run the same command again to go on.", file=sys.stderr)
        return 1
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
