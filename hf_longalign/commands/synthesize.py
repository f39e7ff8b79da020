"""Turn short instruction-answer pairs into long-context chat data: what `hf-longalign synthesize` runs."""

import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import PartialState

from hf_longalign.commands.publishing import CardOptions, HubOptions, PublishOptions, destination
from hf_longalign.commands.synthesis_options import SynthesizeArguments
from hf_longalign.endpoint import BatchGenerator, CommandBatches, HostedBatches, OpenAIGenerator
from hf_longalign.endpoint.protocol import Generator, RunStopped
from hf_longalign.hub import publish_command, publish_dataset
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.estimate import estimate, planned_requests
from hf_longalign.synthesis.export import check_output
from hf_longalign.synthesis.local import TransformersGenerator
from hf_longalign.synthesis.team import join_team


def make_generators(args: SynthesizeArguments, rank: int) -> tuple[Generator | str, Generator | None]:
    """Return who writes and who judges."""
    judge = None
    if args.judge_model is not None:
        judge = make_generator(args, args.judge_model, args.judge_endpoints, rank)
    if args.generator == "documents":
        return "documents", judge
    if args.generator == "batch":
        return make_batch_generator(args), judge
    return make_generator(args, str(args.model), args.endpoints if args.generator == "openai" else [], rank), judge


def make_batch_generator(args: SynthesizeArguments) -> BatchGenerator:
    """Return the generator that asks a Batch API, or a command on this machine."""
    if args.batch_command is None:
        return BatchGenerator(str(args.model), HostedBatches(args.endpoints[0], api_key_env=args.api_key_env))
    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "batches"
    return BatchGenerator(str(args.model), CommandBatches(shlex.split(args.batch_command), folder))


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
        budget=Budget(args.budget_tokens, args.budget_usd, args.prompt_price, args.completion_price, args.price_share),
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
    budget = Budget(None, None, args.prompt_price, args.completion_price, args.price_share)
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


def run(
    args: SynthesizeArguments, options: SynthesisOptions, hub: HubOptions, publish: PublishOptions, card: CardOptions
) -> int:
    """Write the data; the exit status is 1 where it stopped and a rerun goes on."""
    # On a machine without an accelerator, several processes know of each other only if told that they are on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    builder = make_builder(args, options)
    if args.dry_run:
        if state.is_main_process:
            print_plan(builder, args, options)
        return 0
    if args.num_shards == 1:  # before anything is paid for
        check_output(Path(str(args.output_dir)), builder.pipeline.journal, builder.files.folder)
    builder.pipeline.team = join_team(builder.files.folder)
    try:
        leads = builder.prepare_outcomes()
        if leads and args.num_shards > 1:
            print(f"Shard {args.shard_index} of {args.num_shards} is in {builder.pipeline.journal.name}.")
        elif leads:
            licenses = {"license": card.license, "seeds_license": args.seeds_license}
            folder = builder.export(str(args.output_dir), num_proc=args.num_proc, **licenses)
            print(f"Wrote {folder}.")
            if hub.push_to_hub:
                to = destination(hub, folder)
                command = publish_command(folder, **to, **publish.options())
                print(publish.push(partial(publish_dataset, folder, **to), command))
    except (RunStopped, KeyboardInterrupt) as stop:
        print(f"Stopped: {str(stop) or 'interrupted'} Run the same command again to go on.", file=sys.stderr)
        return 1
    return 0
