"""Turn short instruction-answer pairs into long-context chat data, or tell what that would cost: `synthesize`."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_longalign.cards.page import check_license
from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import HubOptions, PublishOptions, destination
from hf_longalign.endpoint import BatchGenerator, HostedBatches, OpenAIGenerator
from hf_longalign.endpoint.protocol import Generator, Reply, Request, RunStopped
from hf_longalign.hub import publish_command, publish_dataset
from hf_longalign.options import json_object, option
from hf_longalign.synthesis.budget import Budget, Spend
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.seeds import Seed


if TYPE_CHECKING:
    from hf_longalign.synthesis.builder import ContextSynthesisBuilder
    from hf_longalign.synthesis.writer import Plan


DESCRIPTION = """Turn short instruction-answer pairs into long-context chat data.

    hf-longalign synthesize --config recipes/synthesis/openai.yaml --seeds hotpotqa=pairs.jsonl \\
        --output_dir outputs/contexts

--dry_run prints the plan, three prompts and what the run would cost. A run that was interrupted, for whatever reason,
goes on where it stopped when it is started again. On several GPUs: accelerate launch -m hf_longalign synthesize …"""


@dataclass
class SynthesizeArguments:
    """Who writes, what it may cost, and where everything goes."""

    output_dir: str | None = option(
        None, "Folder for the Parquet files and the card; of a run in shards, for the journal of each."
    )
    cache_dir: str | None = option(None, "Folder for the journal and prepared data; unset: the cache of datasets.")
    journal: str | None = option(None, "The journal's file; unset: one in `cache_dir`.")
    license: str | None = option(None, "Licence of the data, as the Hub names it: cc-by-4.0, apache-2.0 …")
    seeds_license: str | None = option(None, "Licence of the seeds, as the Hub names it.")
    generator: str = option(
        "documents",
        "Who writes: an endpoint, the Batch API of the first endpoint (half the price), a model on this "
        "machine by transformers or by vLLM, or nobody, where the seeds have their contexts.",
        choices=["openai", "batch", "transformers", "vllm", "documents"],
    )
    model: str | None = option(None, "The model that writes.")
    endpoints: list[str] = option(
        ["http://localhost:8000/v1"], "Base URLs of OpenAI-compatible endpoints that serve the model."
    )
    api_key_env: str = option("OPENAI_API_KEY", "The environment variable that holds the key; the key itself never.")
    max_concurrency: int | None = option(
        None,
        "The most requests at once: to one endpoint (unset: 64), or rows of a model on this machine (unset: 16 by "
        "transformers, 256 by vLLM).",
    )
    adapter: str | None = option(None, 'A LoRA adapter on the model, with generator "vllm": folder or Hub id.')
    vllm_options: dict[str, Any] | str | None = option(
        None, "Arguments of `vllm.LLM`, as JSON or YAML: tensor_parallel_size, max_model_len, hf_overrides …"
    )
    judge_model: str | None = option(None, "A model that judges and answers in place of the one that writes.")
    judge_endpoints: list[str] = option([], "Base URLs of its endpoints; unset: a local model.")
    prompt_price: float = option(0.0, "Dollars per million prompt tokens.")
    completion_price: float = option(0.0, "Dollars per million completion tokens.")
    budget_tokens: int | None = option(None, "Stop before more tokens are spent.")
    budget_usd: float | None = option(None, "Stop before more dollars are spent.")
    num_proc: int | None = option(None, "Processes that compose rows.")
    num_shards: int = option(
        1,
        "Ask for one of so many parts of the seeds, with that part of the budget, and compose nothing; "
        "merge the journals afterwards.",
    )
    shard_index: int = option(0, "Which part, from 0.")
    dry_run: bool = option(False, "Print the plan, three prompts and the cost; ask nothing.")

    def check(self) -> None:
        """Refuse what is missing or makes no sense."""
        check_license(license=self.license, seeds_license=self.seeds_license)
        if self.output_dir is None and not self.dry_run and self.num_shards == 1:
            raise ValueError("`output_dir` must be given, got None. Name the folder to write to.")
        if self.model is None and self.generator != "documents":
            raise ValueError(
                f"`model` must be given with generator {self.generator!r}, got None. Name the one that writes."
            )
        for name in ("adapter", "vllm_options"):
            if getattr(self, name) is not None and self.generator != "vllm":
                raise ValueError(f"`{name}` must be unset with generator {self.generator!r}. Set `--generator vllm`.")
        json_object("vllm_options", self.vllm_options)
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(
                f"`shard_index` must be from 0 to below `num_shards`, got {self.shard_index} of {self.num_shards}. "
                "Count the parts from 0."
            )
        if self.num_shards > 1 and self.output_dir is not None and self.journal is not None:
            raise ValueError(
                f"`journal` must be unset where shards go into `output_dir`, got {self.journal!r}: each has one of "
                "its own. Take one of the two away."
            )


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return the options of the run, of the data, of the Hub and of publishing."""

    def check(args: SynthesizeArguments, _: SynthesisOptions, hub: HubOptions, publish: PublishOptions) -> None:
        publish.check_idle(push_to_hub=hub.push_to_hub)
        if hub.push_to_hub and not args.dry_run and args.output_dir is not None:
            publish.check_push(hub, args.output_dir)

    classes = (SynthesizeArguments, SynthesisOptions, HubOptions, PublishOptions)
    return OptionParser("synthesize", classes, DESCRIPTION).read(arguments, check)


def make_generators(args: SynthesizeArguments) -> tuple[Generator | str, Generator | None]:
    """Return who writes and who judges."""
    judge = None
    if args.judge_model is not None:
        judge = make_generator(args, args.judge_model, args.judge_endpoints)
    if args.generator == "documents":
        # The seeds have their contexts; a judge may still be asked about them.
        return "documents", judge
    if args.generator == "batch":
        batches = HostedBatches(args.endpoints[0], api_key_env=args.api_key_env)
        return BatchGenerator(str(args.model), batches), judge
    if args.generator == "vllm":
        return make_vllm(args), judge
    return make_generator(args, str(args.model), args.endpoints if args.generator == "openai" else []), judge


def make_generator(args: SynthesizeArguments, model: str, endpoints: list[str]) -> Generator:
    """Return the generator of a model: its endpoints', or a local one on this process's own device."""
    most = args.max_concurrency
    if endpoints:
        at_once = 64 if most is None else most
        return OpenAIGenerator(model, endpoints, api_key_env=args.api_key_env, max_concurrency=at_once)
    from accelerate import PartialState

    from hf_longalign.synthesis.local import TransformersGenerator

    state = PartialState()
    device = f"cuda:{state.local_process_index}" if state.num_processes > 1 and state.device.type == "cuda" else None
    return TransformersGenerator(model, batch_size=16 if most is None else most, device=device)


def make_vllm(args: SynthesizeArguments) -> Generator:
    """Return a model in vLLM, which spreads it over the GPUs by itself."""
    from accelerate import PartialState

    from hf_longalign.synthesis.local import VLLMGenerator

    processes = PartialState().num_processes
    if processes > 1:
        raise ValueError(
            f'`generator` "vllm" must run in one process, got {processes}: they would share a GPU. Start it without '
            "`accelerate launch`, with `--vllm_options '{\"tensor_parallel_size\": 8}'`, or start a shard per GPU."
        )
    most = args.max_concurrency
    options = json_object("vllm_options", args.vllm_options)
    return VLLMGenerator(str(args.model), adapter=args.adapter, batch_size=256 if most is None else most, **options)


def builder_options(args: SynthesizeArguments, options: SynthesisOptions, shards: int = 1) -> dict[str, Any]:
    """Return what the builder, or `run_shard`, takes; each of so many shards may spend its share of the budget."""
    from accelerate import PartialState

    generator, judge = make_generators(args)
    tokens = None if args.budget_tokens is None else args.budget_tokens // shards
    usd = None if args.budget_usd is None else args.budget_usd / shards
    return {
        "generator": generator,
        "judge": judge,
        "budget": Budget(tokens, usd, args.prompt_price, args.completion_price),
        "show_progress": None if PartialState().is_main_process else False,
        "cache_dir": args.cache_dir,
        **asdict(options),
    }


def print_plan(builder: "ContextSynthesisBuilder", args: SynthesizeArguments, options: SynthesisOptions) -> None:
    """Print what a run would do, and ask nothing."""
    pipeline = builder.pipeline
    pipeline.check()
    seeds, plan, counter = pipeline.seeds.seeds, pipeline.plan, builder.files.counter
    prices = Budget(prompt_price=args.prompt_price, completion_price=args.completion_price)
    if args.generator == "batch":
        prices = prices.at(HostedBatches.price_share)
    rehearsal = Rehearsal(plan, options, writes=args.generator != "documents")
    asked, prompt, completion, most = estimate(seeds, rehearsal, prices, counter.count if counter else None)
    tasks = {task: sum(seed.task == task for seed in seeds) for task in sorted({seed.task for seed in seeds})}
    print(f"seeds      {len(seeds):,}: " + ", ".join(f"{task} {number:,}" for task, number in tasks.items()))
    for reason, number in pipeline.seeds.skipped.most_common():
        print(f"skipped    {number:,}: {reason}")
    print(f"generator  {builder.config.generator} {builder.config.model}".rstrip())
    requests = ", ".join(f"{number:,} {purpose}" for purpose, number in asked.items())
    print(f"requests   {requests or 'none'}")
    print(f"tokens     about {prompt:,} in and {completion:,} out, without retries")
    usd = prices.cost(prompt, completion).usd
    print(f"cost       about ${usd:,.2f}; ${most.usd:,.2f} if every reply and retry runs to its limit")
    if plan.judge:
        print("           and what the judge is asked where an answer does not stand in its context word for word")
    for number, seed in enumerate(seeds[:: max(1, len(seeds) // 3)][:3], 1):
        for request, _ in rehearsal.of(seed):
            print(f"\n--- seed {number} of 3, {seed.origin}: {request.purpose} ---")
            print("\n\n".join(f"[{role}]\n{content}" for role, content in request.messages))


def run(args: SynthesizeArguments, options: SynthesisOptions, hub: HubOptions, publish: PublishOptions) -> int:
    """Write the data; the exit status is 1 where it stopped and a rerun goes on."""
    import torch
    from accelerate import PartialState

    from hf_longalign.synthesis.builder import ContextSynthesisBuilder
    from hf_longalign.synthesis.export import check_output
    from hf_longalign.synthesis.shards import fill_shard
    from hf_longalign.synthesis.team import join_team

    # On a machine without an accelerator, several processes know of each other only if told that they are on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    builder = ContextSynthesisBuilder(**builder_options(args, options, args.num_shards), journal=args.journal)
    builder.pipeline.shard = (args.shard_index, args.num_shards)
    if args.dry_run:
        if state.is_main_process:
            print_plan(builder, args, options)
        return 0
    if args.num_shards == 1:  # before anything is paid for
        check_output(Path(str(args.output_dir)), builder.pipeline.journal, builder.files.folder)
    # Before anything is paid for, and in every process: they meet in this folder.
    builder.pipeline.team = join_team(builder.files.folder)
    try:
        if args.num_shards > 1:
            if fill_shard(builder, args.output_dir) if args.output_dir else builder.prepare_outcomes():
                place = args.output_dir or builder.pipeline.journal.name
                print(f"Shard {args.shard_index} of {args.num_shards} is in {place}.")
        elif builder.prepare_outcomes():
            licenses = {"license": args.license, "seeds_license": args.seeds_license}
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


# English under the tokenizers in use; only for text that is not written yet.
_TOKENS_PER_WORD = 4 / 3
# So many seeds tell what all will take.
_SAMPLE = 2000
_FACT_WORDS, _OUTLINE_WORDS, _PAIR_WORDS, _SPOKEN_WORDS = 150, 40, 40, 30


def _words(number: float) -> str:
    """Text of as many tokens as so many words have: "the " is one, and four bytes."""
    return "the " * round(number * _TOKENS_PER_WORD)


class Rehearsal:
    """Notes what is asked for a seed, and answers in the words that were asked for, as if all were good at once."""

    def __init__(self, plan: "Plan", options: SynthesisOptions, *, writes: bool) -> None:
        # No checks, and no judge: what one is asked is not known before there are replies.
        self.plan = replace(plan, rules=replace(plan.rules, checks=()), judge=None)
        self.options = options
        self.writes = writes
        self.asked: list[tuple[Request, int]] = []

    async def __call__(self, request: Request) -> Reply:
        """Note a request and answer it."""
        number, purpose = self.plan.sections, request.purpose
        words = {
            "facts": _FACT_WORDS,
            "outline": _OUTLINE_WORDS * number,
            "section": ceil(self.plan.words / number),
            "context": self.plan.words,
            "pair": _PAIR_WORDS,
        }.get(purpose, _SPOKEN_WORDS)
        self.asked.append((request, words))
        half = _words(words / 2)
        texts = {
            "facts": f"Evidence:\n- {half}\nDistraction:\n- {half}",
            "outline": "\n".join(f"Section {n}: {_words(_OUTLINE_WORDS)}" for n in range(1, number + 1)),
            "pair": f"Question: {half}\nAnswer: {half}",
        }
        return Reply(texts.get(purpose, f"Context:\n{_words(words)}"), "stop", 0, 0, request.model)

    def of(self, seed: Seed) -> list[tuple[Request, int]]:
        """Return all that a run would ask for a seed, each request with the words of its reply."""
        self.asked = []
        asyncio.run(self._rehearse(seed))
        return self.asked

    async def _rehearse(self, seed: Seed) -> None:
        # Not above: it imports `datasets`, and a wrong option is refused without.
        from hf_longalign.synthesis.writer import score_answers, write_context, write_pair

        options, plan, context = self.options, self.plan, seed.context or ""
        blind = options.difficulty == "closed_book"
        if blind:
            await score_answers(seed, plan, self, samples=options.difficulty_samples)
        if options.method == "instruction":
            outcome = await write_pair(seed, plan, self, lambda *_: None)
            seed = outcome.seed
        elif self.writes:
            context = (await write_context(seed, plan, self, lambda *_: None)).context
        if options.answerability:
            await score_answers(seed, plan, self, context=context)
            if not blind:
                await score_answers(seed, plan, self)


def estimate(
    seeds: Sequence[Seed], rehearsal: Rehearsal, prices: Budget, count: Callable[[str], int] | None
) -> tuple[Counter[str], int, int, Spend]:
    """Return what a run will ask if no reply has to be asked for twice.

    The number of requests by purpose, tokens of prompts and of replies that are as long as asked for; and the tokens
    and dollars if every reply runs to its limit and every retry is used.
    """
    # About four bytes of UTF-8 are a token, in English and, with longer characters, in most scripts.
    count = count or (lambda text: ceil(len(text.encode()) / 4))
    plan, options = rehearsal.plan, rehearsal.options
    kept = options.difficulty_share if options.difficulty_use != "record" else 1.0
    requests: Counter[str] = Counter()
    prompts, replies, most = 0.0, 0.0, Spend()
    # Not all: a million would take minutes.
    sample = seeds[:: max(1, len(seeds) // _SAMPLE)]
    times = len(seeds) / max(1, len(sample))
    for seed in sample:
        for request, words in rehearsal.of(seed):
            # Closed-book answers are asked of every seed; what is paid after them, only of the share that is kept.
            share = 1.0 if request.purpose == "closed_book" else kept
            prompt = sum(count(text) for _, text in request.messages)
            requests[request.purpose] += 1
            prompts += share * prompt
            limit = request.sampling.token_limit
            replies += share * min(words * _TOKENS_PER_WORD, limit)
            most += prices.cost(prompt, limit)
    for purpose in set(requests) - {"closed_book"}:
        requests[purpose] = ceil(kept * requests[purpose])
    requests = Counter({purpose: round(times * number) for purpose, number in requests.items()})
    tries = times * (1 + plan.retries)
    return requests, ceil(times * prompts), ceil(times * replies), Spend(ceil(most.tokens * tries), most.usd * tries)
