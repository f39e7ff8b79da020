"""Ask a model, and the adapter trained on it, the same questions, and write a report of what changed.

    accelerate launch recipes/evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct --adapter outputs/qwen2.5-0.5b \
        --suite needle,longbench,ruler,short --output_dir outputs/report

Every answer is on disk as soon as it is there: the same command goes on where a killed one stopped. Several processes
share the questions. The options below can stand in a YAML (`--config`) or on the command line, which wins.
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import load_dataset
from huggingface_hub import snapshot_download
from publishing import AdapterPublishArguments, same_command, start_logging
from transformers import AutoConfig, BitsAndBytesConfig
from trl import TrlParser

from hf_longalign.evaluation.encoding import token_counter
from hf_longalign.evaluation.endpoint import EndpointGenerator
from hf_longalign.evaluation.generation import LocalGenerator, check_range
from hf_longalign.evaluation.harness_suite import HarnessSuite
from hf_longalign.evaluation.haystack import read_texts
from hf_longalign.evaluation.longbench.prompts import longbench_prompts
from hf_longalign.evaluation.longbench.scoring import score_longbench
from hf_longalign.evaluation.longbench.tasks import GROUPS
from hf_longalign.evaluation.models import ADAPTER, BASE, examinees, load_model, load_tokenizer, record_of
from hf_longalign.evaluation.needle_scoring import score_needle
from hf_longalign.evaluation.noise import noise
from hf_longalign.evaluation.perplexity_suite import PerplexitySuite
from hf_longalign.evaluation.placement import needle_prompts
from hf_longalign.evaluation.prompt import fingerprint
from hf_longalign.evaluation.runner import Examinee
from hf_longalign.evaluation.store import ResultStore
from hf_longalign.evaluation.suites import PromptSuite, Suite
from hf_longalign.evaluation.write import write_report
from hf_longalign.provenance import loaded_commit
from hf_longalign.publish.adapter import publish_adapter
from hf_longalign.publish.card_file import write_adapter_card
from hf_longalign.publish.retry import PublishError
from hf_longalign.rope import model_range
from hf_longalign.version import __version__


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
        default="THUDM/LongBench", metadata={"help": "Hub id, data.zip or a folder of `<task>.jsonl`."}
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


class Setting:
    """The models, the tokenizer and the range that all suites share."""

    def __init__(self, args: ModelArguments, state: PartialState) -> None:
        self.args = args
        named = {BASE: args.model, ADAPTER: args.adapter}
        self.names = {label: name for label, name in named.items() if name is not None}
        where = {"adapter": args.adapter, "revision": args.model_revision, "adapter_revision": args.adapter_revision}
        remote = {"trust_remote_code": args.trust_remote_code}
        self.tokenizer = load_tokenizer(args.model, tokenizer=args.tokenizer, **where, **remote)
        self.model = None
        if args.endpoint is not None:
            self.config = AutoConfig.from_pretrained(args.model, revision=args.model_revision, **remote)
            return
        self.model = load_model(
            args.model,
            **where,
            **remote,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
            if args.load_in_4bit
            else None,
            device_map="auto" if state.num_processes == 1 and torch.cuda.is_available() else {"": str(state.device)},
        )
        self.config = self.model.config

    @property
    def reach(self) -> int:
        """The model's range in tokens."""
        return model_range(self.config)

    def examinees(self) -> list[Examinee]:
        """Return base and adapter, each with what generates for it."""
        args = self.args
        if args.endpoint is None:
            found = examinees(self.model, None, self.names, {"quantised": args.load_in_4bit})
            for examinee in found:
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
    chat = bool(setting.tokenizer.chat_template) if args.chat is None else args.chat
    lengths = args.lengths or default_lengths(setting.reach)
    check_range(setting.config, max(lengths))
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
            suites[name] = PromptSuite(name, list(prompts), score_needle, metric="exact_match")
        elif name == "longbench":
            prompts = longbench_prompts(
                args.longbench_tasks,
                tokenizer=setting.tokenizer,
                max_length=setting.reach,
                source=args.longbench_source,
                limit=args.limit,
                chat=chat,
            )
            suites[name] = PromptSuite(name, list(prompts), score_longbench, groups=GROUPS)
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
    return names


def default_lengths(reach: int) -> list[int]:
    """Return 1,024 and its doubles up to a range; the range itself where that is shorter."""
    doubles = (1024 * 2**power for power in range(32))
    return list(takewhile(lambda length: length <= reach, doubles)) or [reach]


def read_documents(source: str | None, args: SuiteArguments) -> Any:
    """Return texts: built-in ones, those of a file or folder, or a column of a data set."""
    if source is None:
        return noise(seed=args.seed)
    if Path(source).exists():
        return read_texts(source)
    rows = load_dataset(source, split=args.haystack_split, streaming=True)
    return (row[args.haystack_column] for row in rows)


def make_report(
    suites: dict[str, Suite], who: list[Examinee], setting: Setting, args: SuiteArguments, store: ResultStore
) -> dict[str, Any]:
    """Gather the results of all processes."""
    found = {name: suite.results(who, store) for name, suite in suites.items()}
    prompts = [prompt for suite in suites.values() if isinstance(suite, PromptSuite) for prompt in suite.prompts]
    revisions = {BASE: setting.args.model_revision, ADAPTER: setting.args.adapter_revision}
    report = {
        "hf_longalign": __version__,
        "date": date.today().isoformat(),
        "models": [
            {"label": label, "name": public_name(name), "revision": revisions[label]}
            for label, name in setting.names.items()
        ],
        "suites": [result for name, result in found.items() if name != "perplexity"],
        "prompts": fingerprint(prompts),
        "settings": settings(suites, setting, args),
    }
    if "perplexity" in found:
        report["perplexity"] = found["perplexity"]
    stats = {examinee.label: vars(examinee.generator.stats) for examinee in who}
    report["speed"] = {label: counts for label, counts in stats.items() if counts["prompt_tokens"]}
    return report


def settings(suites: dict[str, Suite], setting: Setting, args: SuiteArguments) -> dict[str, Any]:
    """Return what a reader must know to ask the same again."""
    chosen: dict[str, Any] = {"seed": args.seed, "through": "endpoint" if setting.args.endpoint else "transformers"}
    if "needle" in suites:
        haystack = "built-in noise" if args.haystack is None else public_name(args.haystack)
        chosen.update(haystack=haystack, samples=args.samples, depths=args.depths)
    if "longbench" in suites:
        chosen["LongBench data"] = public_name(args.longbench_source)
    if args.limit is not None:
        chosen["limit"] = args.limit
    if setting.args.endpoint is None:
        chosen.update(dtype=str(setting.model.dtype).removeprefix("torch."), range=setting.reach)
        chosen.update(torch=torch.__version__, transformers=transformers.__version__)
    return chosen


def public_name(name: str) -> str:
    """Return a Hub id as it is, of a path of this machine its last part: reports are published."""
    return Path(name).resolve().name if Path(name).exists() else name


def publish_report(
    model_args: ModelArguments, args: SuiteArguments, publish_args: AdapterPublishArguments, report: dict[str, Any]
) -> str:
    """Publish the adapter with its report and a card that shows it, and return what to tell the user."""
    source = model_args.adapter
    if not Path(source).is_dir():
        # What was evaluated, and not what somebody may have pushed since.
        commit = loaded_commit(source, "adapter_config.json", model_args.adapter_revision)
        source = snapshot_download(source, revision=commit or model_args.adapter_revision)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "adapter"
        shutil.copytree(source, staged, ignore=shutil.ignore_patterns("checkpoint-*", "*.pt", "*.bin"))
        for name in ("report.json", "report.md", *report["images"]):
            shutil.copy(Path(args.output_dir) / name, staged)
        write_adapter_card(staged, repo_id=args.push_to_hub, **publish_args.card())
        return publish_args.push(
            publish_adapter,
            staged,
            args.push_to_hub,
            base_model=publish_args.base_name,
            private=args.private or None,
            resume_command=same_command(),
        )


def main() -> None:
    """Ask, score, report, publish."""
    parser = TrlParser((ModelArguments, SuiteArguments, AdapterPublishArguments))
    model_args, args, publish_args = parser.parse_args_and_config()
    names = check_suites(args, model_args.endpoint)
    if args.push_to_hub is not None and model_args.adapter is None:
        raise ValueError("`push_to_hub` adds the report to the card of an adapter, got none. Set `adapter`.")
    if args.push_to_hub is not None:
        base = model_args.model if Path(model_args.adapter).is_dir() else None
        publish_args.check(args.push_to_hub, base=base)
    # On a machine without an accelerator, several processes know of each other only if told that they are on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    setting = Setting(model_args, state)
    with ResultStore(Path(args.output_dir) / "answers", state.process_index) as store:
        who = setting.examinees()
        suites = make_suites(names, setting, args, who, store)
        state.wait_for_everyone()  # all have seen what an earlier run left; the last time that processes wait in step
        for suite in suites.values():
            suite.work(who, store, rank=state.process_index, processes=state.num_processes)
        if not state.is_main_process:
            return
        report = make_report(suites, who, setting, args, store)
    coverage = record_of(model_args.adapter, model_args.adapter_revision).get("coverage")
    report = write_report(args.output_dir, report, coverage=coverage)
    print((Path(args.output_dir) / "report.md").read_text(encoding="utf-8"))
    print(f"Wrote {args.output_dir}")
    if args.push_to_hub is not None:
        print(publish_report(model_args, args, publish_args, report))


if __name__ == "__main__":
    start_logging()
    try:
        main()
    except PublishError as error:
        sys.exit(str(error))
