"""Ask a model, and the adapter trained on it, the same questions: what `hf-longalign evaluate` runs."""

import logging
import shutil
import tempfile
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig

from hf_longalign.cards import write_adapter_card
from hf_longalign.commands.evaluation_options import ModelArguments, SuiteArguments
from hf_longalign.commands.publishing import AdapterCardOptions, HubOptions, PublishOptions, destination, same_command
from hf_longalign.evaluation.encoding import token_counter
from hf_longalign.evaluation.endpoint import EndpointGenerator, ServerFacts
from hf_longalign.evaluation.generation import LocalGenerator, check_range
from hf_longalign.evaluation.harness_suite import HarnessSuite
from hf_longalign.evaluation.longbench.prompts import longbench_prompts
from hf_longalign.evaluation.longbench.scoring import score_longbench
from hf_longalign.evaluation.longbench.tasks import GROUPS, expand_tasks
from hf_longalign.evaluation.models import (
    ADAPTER,
    BASE,
    base_revision,
    check_there,
    examinees,
    load_config,
    load_model,
    load_tokenizer,
    record_of,
)
from hf_longalign.evaluation.needle_scoring import score_needle
from hf_longalign.evaluation.noise import noise
from hf_longalign.evaluation.perplexity_suite import PerplexitySuite
from hf_longalign.evaluation.placement import needle_prompts
from hf_longalign.evaluation.prompt import Prompt, fingerprint
from hf_longalign.evaluation.runner import Examinee, spent
from hf_longalign.evaluation.store import ResultStore
from hf_longalign.evaluation.suites import PromptSuite, Suite
from hf_longalign.evaluation.texts import load_texts
from hf_longalign.evaluation.write import write_report
from hf_longalign.hub import publish_adapter
from hf_longalign.rope import model_range
from hf_longalign.run_record import loaded_commit
from hf_longalign.version import __version__


logger = logging.getLogger(__name__)


class Setting:
    """The models, the tokenizer and the range that all suites share."""

    def __init__(self, args: ModelArguments, state: PartialState) -> None:
        check_there(model=args.model, adapter=args.adapter, tokenizer=args.tokenizer)
        self.args = args
        named = {BASE: args.model, ADAPTER: args.adapter}
        self.names = {label: name for label, name in named.items() if name is not None}
        revision = base_revision(args.model, args.adapter, args.model_revision, args.adapter_revision)
        where: dict[str, Any] = {
            "adapter": args.adapter,
            "revision": revision,
            "adapter_revision": args.adapter_revision,
            "trust_remote_code": args.trust_remote_code,
        }
        self.tokenizer = load_tokenizer(args.model, tokenizer=args.tokenizer, **where)
        self.model: Any = None
        if args.endpoint is not None:
            self.config = load_config(args.model, **where)
            return
        self.model = load_model(
            args.model,
            **where,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
            if args.load_in_4bit
            else None,
            device_map="auto" if state.num_processes == 1 and torch.cuda.is_available() else {"": str(state.device)},
        )
        self.config = self.model.config

    def models(self) -> list[dict[str, Any]]:
        """Return label, name and commit of what is evaluated."""
        commits = {BASE: getattr(self.config, "_commit_hash", None)}
        if self.args.adapter is not None:
            commits[ADAPTER] = loaded_commit(self.args.adapter, "adapter_config.json", self.args.adapter_revision)
        return [
            {"label": label, "name": public_name(name), "revision": commits[label]}
            for label, name in self.names.items()
        ]

    def look(self, suites: dict[str, Suite], who: list[Examinee], store: ResultStore) -> dict[str, ServerFacts]:
        """Ask the server about the range of each model, unless an earlier run did; empty without an endpoint."""
        prompts = [prompt for suite in suites.values() if isinstance(suite, PromptSuite) for prompt in suite.prompts]
        served = {}
        for examinee in who:
            if not prompts or not isinstance(examinee.generator, EndpointGenerator):
                continue
            key = examinee.key(f"server/{max(prompts, key=lambda prompt: len(prompt.text)).key}")
            if key not in store:
                count = token_counter(self.tokenizer, chat=prompts[0].chat)
                store.add(key, asdict(examinee.generator.look(prompts, count)))
            served[examinee.label] = ServerFacts(**store.get(key))
        return served

    @property
    def reach(self) -> int:
        """The model's range in tokens."""
        return model_range(self.config)

    def examinees(self) -> list[Examinee]:
        """Return base and adapter, each with what generates for it."""
        args = self.args
        if args.endpoint is None:
            generator = LocalGenerator(self.model, self.tokenizer, batch_tokens=args.batch_tokens)
            found = examinees(self.model, generator, self.names, {"quantised": args.load_in_4bit})
            for examinee in found[1:]:
                examinee.generator = LocalGenerator(self.model, self.tokenizer, batch_tokens=args.batch_tokens)
            return found
        return [
            Examinee(
                label,
                f"{args.endpoint.split('@')[-1]}/{name}",
                EndpointGenerator(name, args.endpoint, api_key_env=args.api_key_env, concurrency=args.concurrency),
            )
            for label, name in self.names.items()
        ]


def make_suites(
    names: list[str], setting: Setting, args: SuiteArguments, who: list[Examinee], store: ResultStore
) -> dict[str, Suite]:
    """Make the suites that were asked for."""
    chat = uses_chat(setting, args)
    lengths = args.lengths or default_lengths(setting.reach)
    check_range(setting.config, max(lengths), "lengths")
    suites: dict[str, Suite] = {}
    for name in names:
        if name == "needle":
            prompts = needle_prompts(
                haystack=read_documents(args.haystack, args),
                count=token_counter(setting.tokenizer, chat=chat),
                lengths=lengths,
                depths=args.depths,
                tasks=args.needle_tasks,
                samples=args.samples,
                seed=args.seed,
                chat=chat,
                max_new_tokens=args.max_new_tokens,
            )
            total = len(args.needle_tasks) * len(lengths) * args.samples * len(args.depths)
            made = list(
                tqdm(prompts, desc="making needle prompts", total=total, disable=not PartialState().is_main_process)
            )
            suites[name] = PromptSuite(name, made, score_needle, metric="exact_match")
        elif name == "longbench":
            suites[name] = longbench_suite(setting, args, chat=chat)
        elif name == "perplexity":
            suites[name] = PerplexitySuite(
                setting.model,
                setting.tokenizer,
                read_documents(args.perplexity_documents or args.haystack, args),
                window=args.perplexity_window or max(lengths),
            )
        else:
            suites[name] = HarnessSuite(
                name,
                ["ruler"] if name == "ruler" else args.short_tasks,
                setting.model,
                setting.tokenizer,
                store,
                who,
                max_length=setting.reach,
                lengths=lengths if name == "ruler" else (),
                limit=args.limit,
                chat=chat,
            )
    return suites


def longbench_suite(setting: Setting, args: SuiteArguments, *, chat: bool) -> PromptSuite:
    """Make LongBench's prompts; tasks whose data cannot be had are left out, and told."""
    source = args.longbench_source
    prompts: list[Prompt] = []
    missing: dict[str, str] = {}
    for task in expand_tasks(args.longbench_tasks):
        try:
            prompts += longbench_prompts(
                [task],
                tokenizer=setting.tokenizer,
                max_length=setting.reach,
                source=source,
                limit=args.limit,
                chat=chat,
            )
        except (ConnectionError, FileNotFoundError) as error:
            missing[task] = str(error).replace(source, public_name(source))
            logger.warning("%s is left out: %s", task, error)
    return PromptSuite("longbench", prompts, score_longbench, groups=GROUPS, missing=missing)


def default_lengths(reach: int) -> list[int]:
    """Return 1,024 and its doubles up to a range; the range itself where that is shorter."""
    doubles = (1024 * 2**power for power in range(32))
    return list(takewhile(lambda length: length <= reach, doubles)) or [reach]


def read_documents(source: str | None, args: SuiteArguments) -> Any:
    """Return texts: built-in ones, those of a file or folder, or a column of a data set."""
    if source is None:
        return noise(seed=args.seed)
    return load_texts(source, column=args.haystack_column, split=args.haystack_split)


def make_report(
    suites: dict[str, Suite], who: list[Examinee], setting: Setting, args: SuiteArguments, store: ResultStore
) -> dict[str, Any]:
    """Gather the results of all processes."""
    found = {name: suite.results(who, store) for name, suite in suites.items()}
    prompts = [prompt for suite in suites.values() if isinstance(suite, PromptSuite) for prompt in suite.prompts]
    report = {
        "hf_longalign": __version__,
        "date": date.today().isoformat(),
        "models": setting.models(),
        "suites": [result for name, result in found.items() if name != "perplexity"],
        "prompts": fingerprint(key for suite in suites.values() for key in suite.asked()),
        "settings": settings(suites, setting, args),
    }
    if "perplexity" in found:
        report["perplexity"] = found["perplexity"]
    if prompts:
        report["speed"] = {examinee.label: vars(spent(examinee, prompts, store)) for examinee in who}
    return report


def settings(suites: dict[str, Suite], setting: Setting, args: SuiteArguments) -> dict[str, Any]:
    """Return what a reader must know to ask the same again."""
    chosen: dict[str, Any] = {"seed": args.seed, "through": "endpoint" if setting.args.endpoint else "transformers"}
    chosen["chat template"] = "yes" if uses_chat(setting, args) else "no"
    if "needle" in suites:
        chosen.update({"haystack": public_documents(args.haystack), "samples": args.samples, "depths": args.depths})
        chosen["room for the answer"] = args.max_new_tokens
    if "perplexity" in suites:
        chosen["perplexity documents"] = public_documents(args.perplexity_documents or args.haystack)
    if {"ruler", "short"} & set(suites):
        chosen["lm-eval"] = version("lm-eval")
    if "longbench" in suites:
        chosen["LongBench data"] = public_name(args.longbench_source)
    if args.limit is not None:
        chosen["limit"] = args.limit
    if setting.args.endpoint is None:
        chosen.update(dtype=str(setting.model.dtype).removeprefix("torch."), range=setting.reach)
        chosen.update(torch=torch.__version__, transformers=transformers.__version__)
        chosen.update(hardware=hardware(), processes=PartialState().num_processes)
    return chosen


def uses_chat(setting: Setting, args: SuiteArguments) -> bool:
    """Whether questions go through the chat template."""
    return bool(setting.tokenizer.chat_template) if args.chat is None else args.chat


def public_documents(source: str | None) -> str:
    """Return what a report calls documents."""
    return "built-in noise" if source is None else public_name(source)


def hardware() -> str:
    """Return what a process runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def public_name(name: str) -> str:
    """Return a Hub id as it is, of a path of this machine its last part: reports are published."""
    return Path(name).resolve().name if Path(name).exists() else name


def publish_report(
    model_args: ModelArguments,
    args: SuiteArguments,
    hub: HubOptions,
    publish_args: PublishOptions,
    card: AdapterCardOptions,
    report: dict[str, Any],
) -> str:
    """Publish the adapter with its report and a card that shows it, and return what to tell the user."""
    source = str(model_args.adapter)
    to = destination(hub, source)
    if not Path(source).is_dir():
        # What was evaluated, and not what somebody may have pushed since.
        commit = loaded_commit(source, "adapter_config.json", model_args.adapter_revision)
        source = snapshot_download(source, revision=commit or model_args.adapter_revision)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "adapter"
        shutil.copytree(source, staged, ignore=shutil.ignore_patterns("checkpoint-*", "*.pt", "*.bin"))
        for name in ("report.json", "report.md", *report["images"]):
            shutil.copy(Path(args.output_dir) / name, staged)
        if "coverage.png" in report["images"]:  # the same, with the lengths that were evaluated
            (staged / "assets" / "coverage.png").unlink(missing_ok=True)
        write_adapter_card(staged, repo_id=to["repo_id"], **card.card())
        settings = {**to, "base_model": card.base_name, "resume_command": same_command()}
        return publish_args.push(partial(publish_adapter, staged, **settings), same_command())


def run(
    model_args: ModelArguments,
    args: SuiteArguments,
    hub: HubOptions,
    publish_args: PublishOptions,
    card: AdapterCardOptions,
) -> int:
    """Ask, score, report, publish."""
    # On a machine without an accelerator, several processes know of each other only if told that they are on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    setting = Setting(model_args, state)
    with ResultStore(Path(args.output_dir) / "answers", state.process_index) as store:
        who = setting.examinees()
        suites = make_suites(args.suites, setting, args, who, store)
        served = setting.look(suites, who, store) if state.is_main_process else {}
        state.wait_for_everyone()  # all have seen what an earlier run left; the last time that processes wait in step
        for suite in suites.values():
            suite.work(who, store, rank=state.process_index, processes=state.num_processes)
        if not state.is_main_process:
            return 0
        report = make_report(suites, who, setting, args, store)
        for label, facts in served.items():
            report["settings"].update({f"{label}: {name}": value for name, value in facts.settings().items()})
    record = record_of(model_args.adapter, model_args.adapter_revision)
    report = write_report(args.output_dir, report, coverage=record.coverage if record else None)
    print((Path(args.output_dir) / "report.md").read_text(encoding="utf-8"))
    print(f"Wrote {args.output_dir}")
    if hub.push_to_hub:
        print(publish_report(model_args, args, hub, publish_args, card, report))
    return 0
