"""Turn short instruction-answer pairs into long-context chat data: what `hf-longalign synthesize` runs."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from hf_longalign.commands.publishing import CardOptions, HubOptions, PublishOptions, destination
from hf_longalign.commands.synthesis_options import SynthesizeArguments
from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.endpoint.protocol import Generator, RunStopped
from hf_longalign.hub import publish_command, publish_dataset
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.estimate import estimate, planned_requests
from hf_longalign.synthesis.local import TransformersGenerator
from hf_longalign.synthesis.save import save
from hf_longalign.synthesis.schema import CONFIGS
from hf_longalign.synthesis.stage import Team


def make_generators(args: SynthesizeArguments, rank: int) -> tuple[Generator | str, Generator | None]:
    """Return who writes and who judges."""
    judge = None
    if args.judge_model is not None:
        judge = make_generator(args, args.judge_model, args.judge_endpoints, rank)
    if args.generator == "documents":
        return "documents", judge
    return make_generator(args, str(args.model), args.endpoints if args.generator == "openai" else [], rank), judge


def make_generator(args: SynthesizeArguments, model: str, endpoints: list[str], rank: int) -> Generator:
    """Return the generator of a model: its endpoints', or a local one on this process's own device."""
    if endpoints:
        return OpenAIGenerator(model, endpoints, api_key_env=args.api_key_env, max_concurrency=args.max_concurrency)
    state = PartialState()
    device = f"cuda:{state.local_process_index}" if state.num_processes > 1 and state.device.type == "cuda" else None
    return TransformersGenerator(model, batch_size=args.batch_size, device=device)


def make_builders(args: SynthesizeArguments, options: SynthesisOptions) -> dict[str, ContextSynthesisBuilder]:
    """Return a builder for every configuration; they share journal, generators and files."""
    state = PartialState()
    generator, judge = make_generators(args, state.process_index)
    budget = Budget(args.budget_tokens, args.budget_usd, args.prompt_price, args.completion_price)
    builders = {
        name: ContextSynthesisBuilder(
            generator=generator,
            judge=judge,
            journal=args.journal,
            budget=budget,
            show_progress=None if state.is_main_process else False,
            cache_dir=args.cache_dir,
            config_name=name,
            **asdict(options),
        )
        for name in CONFIGS
    }
    for builder in builders.values():
        builder.stage.shard = (args.shard_index, args.num_shards)
    if state.num_processes > 1:
        builders["chat"].stage.team = Team(state.process_index, state.num_processes, state.wait_for_everyone)
    return builders


def print_plan(builder: ContextSynthesisBuilder, args: SynthesizeArguments, options: SynthesisOptions) -> None:
    """Print what a run would do, and ask nothing."""
    stage = builder.stage
    stage.check()
    seeds, plan = stage.seeds, stage.plan
    writes = args.generator != "documents"
    budget = Budget(prompt_price=args.prompt_price, completion_price=args.completion_price)
    count = stage.counter.count if stage.counter else None
    found = estimate(seeds, plan, options, writes=writes, budget=budget, count=count)
    tasks = {task: sum(seed.task == task for seed in seeds) for task in sorted({seed.task for seed in seeds})}
    print(f"seeds      {len(seeds):,}: " + ", ".join(f"{task} {number:,}" for task, number in tasks.items()))
    for reason, number in stage.all_seeds.skipped.most_common():
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


def write_data(builders: dict[str, ContextSynthesisBuilder], args: SynthesizeArguments, license: str | None) -> Path:
    """Prepare every configuration and write it."""
    data = {}
    for name, builder in builders.items():
        builder.download_and_prepare(num_proc=args.num_proc)
        data[name] = builder.as_dataset()
    stage = builders["chat"].stage
    return save(
        str(args.output_dir),
        data,
        stage.config,
        journal=stage.journal,
        budget=stage.budget,
        license=license,
        seeds_license=args.seeds_license,
    )


def run(
    args: SynthesizeArguments, options: SynthesisOptions, hub: HubOptions, publish: PublishOptions, card: CardOptions
) -> int:
    """Write the data; the exit status is 1 where it stopped and a rerun goes on."""
    # On a machine without an accelerator, several processes know of each other only if told that they are on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    builders = make_builders(args, options)
    if args.dry_run:
        if state.is_main_process:
            print_plan(builders["chat"], args, options)
        return 0
    try:
        if args.num_shards > 1:
            # Its replies are all a shard leaves behind: the outcomes on disk are those of all seeds.
            builders["chat"].stage.run()
            print(f"Shard {args.shard_index} of {args.num_shards} is in {builders['chat'].stage.journal.name}.")
            return 0
        builders["chat"].prepare_outcomes()
        if state.is_main_process:
            folder = write_data(builders, args, card.license)
            print(f"Wrote {folder}.")
            if hub.push_to_hub:
                to = destination(hub, folder)
                command = publish_command(folder, **to, **publish.options())
                print(publish.push(partial(publish_dataset, folder, **to), command))
    except (RunStopped, KeyboardInterrupt) as stop:
        print(f"Stopped: {str(stop) or 'interrupted'} Run the same command again to go on.", file=sys.stderr)
        return 1
    return 0
