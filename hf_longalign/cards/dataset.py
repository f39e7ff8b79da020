"""The card of a synthesised data set: what it holds, what it was made from and how, and how to train on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_longalign.cards.citations import cite
from hf_longalign.cards.edits import REPOSITORY, assemble
from hf_longalign.cards.markdown import code, fenced, join, listed, plain, table
from hf_longalign.cards.sample import show_sample


TITLE = "Long-context instruction data"
METHODS = {
    "context": (
        "Instructions and answers were written by people. The contexts were written by a language model so that they "
        "lead to the answer ([Context Synthesis](https://arxiv.org/abs/2502.15592)): they are input, never target."
    ),
    "given": "Instructions, answers and contexts come with the seeds; no model wrote any of it.",
    "instruction": (
        "Instructions and answers were written by a language model about given texts (instruction synthesis, the "
        "baseline of [Context Synthesis](https://arxiv.org/abs/2502.15592)): the targets are synthetic."
    ),
}
CONFIGS = {
    "chat": "rows to train on",
    "contexts": "every accepted context alone",
    "rejected": "what did not pass, with the reason",
}
COLUMNS = (
    ("`messages`", "the conversation: the task's prompt with all contexts, then the answer"),
    (
        "`parts`",
        'start and end, in characters of `messages[message]["content"]`, of every context and of the question',
    ),
    ("`task`, `instruction`, `answer`", "the seed"),
    ("`reference`", "what the prompt calls the context that is meant, where it has to say so"),
    ("`gold_index`, `gold_depth`", "which context holds the evidence; the share of the distractors before it"),
    ("`n_contexts`, `context_tokens`, `total_tokens`", "the length"),
    ("`context_ids`", "the seed or document each context comes from"),
    (
        "`seed_id`, `generator`, `model`, `prompt_hash`, `journal_keys`, `attempts`",
        "where the gold context comes from",
    ),
    ("`checks`", 'what was checked, with outcome ("passed", "failed", "open") and detail'),
    (
        "`closed_book`, `answer_loss`, `answerable_with`, `answerable_without`",
        "measured difficulty; null: not measured",
    ),
)
WRITERS = {
    "openai": "OpenAI-compatible endpoint",
    "transformers": "transformers, run locally",
    "documents": "nobody: the texts are given",
}
SUMMARIES = {"gov_report", "qmsum", "multi_news"}
# Upper ends of the Hub's size categories, exclusive.
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# The recipes that come with the package, by the positions their models are trained for.
RECIPES = (
    (32_768, "qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct"),
    (65_536, "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
    (131_072, "qwen3-4b", "Qwen/Qwen3-4B-Instruct-2507"),
)


@dataclass(frozen=True)
class Source:
    """A file or Hub data set that seeds were read from: `rows` were used, for `task` where it is one."""

    name: str
    rows: int
    task: str = ""
    on_hub: bool = False


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set; what is empty or `None` is not known and does not stand in the card.

    Attributes:
        method: "context", "given" or "instruction".
        splits: rows by configuration and split.
        tasks: rows of `chat` by task.
        rejected: rejected seeds by reason.
        generator: "openai", "transformers" or "documents".
        model: the model that wrote.
        judge_model: the model that judged, where it is another one.
        sampling: sampling settings by name.
        prompts: how many different prompts led to the contexts, and the digest of all their digests.
        checks: the checks every context passed.
        lengths: the length of every row of `chat`, in `unit`.
        unit: "tokens", or "words" where no tokenizer counted.
        depths: `gold_depth` of the rows that have distractors.
        contexts: the least and the most contexts of a row.
        seeds: where the instructions and answers come from.
        seeds_license: under which licence.
        decontaminated: names of the evaluation sets that seeds and contexts must not overlap with.
        ngram: how many words in a row count as an overlap.
        cost: "replies", "prompt_tokens", "completion_tokens" and, where there are prices, "usd" of what the rows,
            rejected ones included, were made from.
        settings: the other settings worth knowing, by name.
        sample: a row of `chat`.
        picture: path of the picture of lengths and depths, relative to the card.
        license: licence of the data set, as the Hub names it.
        languages: ISO 639 codes.
        version: version of the package.
        repo_id: `user/name`; a placeholder stands there until the data set is pushed.
    """

    method: str
    splits: Mapping[str, Mapping[str, int]]
    tasks: Mapping[str, int]
    rejected: Mapping[str, int] = field(default_factory=dict)
    generator: str = ""
    model: str = ""
    judge_model: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[int, str] | None = None
    checks: Sequence[str] = ()
    lengths: Sequence[int] = ()
    unit: str = "tokens"
    depths: Sequence[float] = ()
    contexts: tuple[int, int] | None = None
    seeds: Sequence[Source] = ()
    seeds_license: str | None = None
    decontaminated: Sequence[str] = ()
    ngram: int | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sample: Mapping[str, Any] | None = None
    picture: str | None = None
    license: str | None = None
    languages: Sequence[str] = ()
    version: str | None = None
    repo_id: str | None = None


def dataset_card(facts: DatasetFacts) -> str:
    """Return the README.md of a data set.

    Example:

    >>> facts = DatasetFacts("given", {"chat": {"train": 2}}, {"qasper": 2}, lengths=[100, 300])
    >>> card = dataset_card(facts)
    >>> "path: chat/train-*.parquet" in card, "| 100 | 200 | 300 | 300 |" in card
    (True, True)
    """
    return assemble(
        _metadata(facts),
        {
            "intro": _intro(facts),
            "use": _use(facts),
            "making": _making(facts),
            "seeds": _seeds(facts),
            "lengths": _lengths(facts),
            "columns": f"## Columns of `chat`\n\n{table(('column', 'what it is'), COLUMNS)}",
            "sample": show_sample(facts.sample) if facts.sample else "",
            "rejected": _rejected(facts),
            "settings": _section("Settings", table(("setting", "value"), _known(facts.settings))),
            "citation": _citation(facts),
        },
    )


def size_category(rows: int) -> str:
    """Return the Hub's name for a number of rows.

    >>> size_category(999), size_category(1600)
    ('n<1K', '1K<n<10K')
    """
    return next((name for most, name in SIZES if rows < most), "n>10M" if rows >= 10**9 else "10M<n<100M")


def _metadata(facts: DatasetFacts) -> dict[str, Any]:
    summaries = [task for task in facts.tasks if task in SUMMARIES]
    categories = ["question-answering"] if len(summaries) < len(facts.tasks) else []
    categories += ["summarization"] if summaries else []
    synthetic = ["synthetic"] if facts.method != "given" else []
    metadata = {
        "pretty_name": TITLE,
        "license": facts.license,
        "language": list(facts.languages),
        "task_categories": [*categories, "text-generation"],
        "size_categories": [size_category(sum(facts.splits["chat"].values()))],
        "tags": ["long-context", "instruction-tuning", "context-synthesis", *synthetic, "hf_longalign", "trl"],
        "configs": [
            {
                "config_name": config,
                **({"default": True} if config == "chat" else {}),
                "data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits],
            }
            for config, splits in facts.splits.items()
        ],
    }
    return {key: value for key, value in metadata.items() if value}


def _intro(facts: DatasetFacts) -> str:
    splits = [
        (f"`{config}`", f"`{split}`", rows, CONFIGS.get(config, ""))
        for config, by_split in facts.splits.items()
        for split, rows in by_split.items()
    ]
    tasks = table(("task", "rows of `chat`"), facts.tasks.items(), right=[1]) if len(facts.tasks) > 1 else ""
    only = f"All rows of `chat` belong to the task {plain(next(iter(facts.tasks)))}." if len(facts.tasks) == 1 else ""
    return join(
        f"# {TITLE}",
        f"{METHODS[facts.method]} {_arrangement(facts)}",
        "The rows are chats, ready for long-context instruction tuning with "
        "[TRL](https://github.com/huggingface/trl) and hf_longalign, which made them.",
        table(("configuration", "split", "rows", "what it holds"), splits, right=[2]),
        tasks or only,
    )


def _arrangement(facts: DatasetFacts) -> str:
    if facts.contexts is None or facts.contexts[1] < 2:
        return "Each row holds one context that answers among others that distract."
    low, high = facts.contexts
    if low == 1:
        return (
            f"Each row holds up to {high:,} contexts, one that answers and, where there is room, some that "
            "distract, in an order drawn at random."
        )
    number = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return (
        f"Each row holds {number} contexts, one that answers among others that distract, in an order drawn at random."
    )


def _use(facts: DatasetFacts) -> str:
    name = facts.repo_id or REPOSITORY
    longest = max(facts.lengths, default=0) * (1 if facts.unit == "tokens" else 2)
    tests = "test" in facts.splits["chat"]
    load = fenced(
        "python",
        f"from datasets import load_dataset\n\n"
        f'chat = load_dataset("{name}", "chat", split="train")\n'
        'print(chat[0]["messages"][-1]["content"])',
    )
    parts = ["## How to use it", load]
    recipe = next((recipe for recipe in RECIPES if longest <= recipe[0]), None)
    if longest and recipe:
        most = max(1024, 1 << (longest - 1).bit_length())
        about = "" if facts.unit == "tokens" else " (two tokens a word, to be safe)"
        parts += [
            f"To train on it with skipped positions, keep every row whole: `max_length` {most:,} covers the longest"
            f"{about}.",
            fenced("python", _training(name, recipe[2], most, recipe[0])),
            "Or with the recipe of hf_longalign, in its repository:",
            fenced("bash", _command(name, recipe[1], most, tests)),
        ]
    return join(*parts)


def _training(name: str, model: str, most: int, target: int) -> str:
    return f"""\
from datasets import load_dataset
from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer
from peft import LoraConfig

trainer = LongAlignSFTTrainer(
    "{model}",
    args=LongAlignSFTConfig(
        output_dir="outputs/long-context",
        packing=True,
        max_length={most},
        assistant_only_loss=True,
        skip_target_length={target},
    ),
    train_dataset=load_dataset("{name}", "chat", split="train"),
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()"""


def _command(name: str, recipe: str, most: int, tests: bool) -> str:
    evaluates = "" if tests else " --eval_strategy no"
    return (
        f"accelerate launch recipes/sft.py --config recipes/{recipe}/sft_skipalign.yaml \\\n"
        f'  --dataset_name "{name}" --dataset_config chat --max_length {most}{evaluates} \\\n'
        f"  --output_dir outputs/{recipe}"
    )


def _making(facts: DatasetFacts) -> str:
    sampling = ", ".join(f"{name} {value}" for name, value in _known(facts.sampling))
    writer = [code(facts.model) if facts.model else "", WRITERS.get(facts.generator, "")]
    rows = [
        ("written by", ", ".join(filter(None, writer))),
        ("judged by", code(facts.judge_model) if facts.judge_model else ""),
        ("sampling", sampling),
        ("prompts", f"{facts.prompts[0]:,}, digest of all {code(facts.prompts[1])}" if facts.prompts else ""),
        ("checks", ", ".join(facts.checks)),
        ("decontaminated against", _decontamination(facts)),
        ("cost", _cost(facts.cost)),
        ("made with", f"hf_longalign {facts.version}" if facts.version else ""),
    ]
    notes = [
        "The prompts of the tasks are [LongBench](https://github.com/THUDM/LongBench)'s."
        if set(facts.tasks) - {"general", "general data"}
        else "",
        "Each row names its prompt (`prompt_hash`) and the replies it was made from (`journal_keys`)."
        if facts.prompts
        else "",
    ]
    body = join(table(("part", "how"), [row for row in rows if row[1]]), " ".join(note for note in notes if note))
    return f"## How it was made\n\n{body}"


def _decontamination(facts: DatasetFacts) -> str:
    if not facts.decontaminated:
        return ""
    rejected = facts.rejected.get("contaminated", 0)
    words = f", by {facts.ngram} words in a row" if facts.ngram else ""
    return f"{listed([code(name) for name in facts.decontaminated])}{words}; {rejected:,} rejected"


def _cost(cost: Mapping[str, float]) -> str:
    if not cost:
        return ""
    text = (
        f"{cost['replies']:,} replies, {cost['prompt_tokens']:,} prompt tokens and {cost['completion_tokens']:,} "
        "completion tokens"
    )
    return f"{text}, ${cost['usd']:,.2f}" if cost.get("usd") else text


def _seeds(facts: DatasetFacts) -> str:
    if not facts.seeds and not facts.seeds_license:
        return ""
    rows = [(_named(source), source.task, source.rows) for source in facts.seeds]
    licence = f"Licence of the seeds: {plain(facts.seeds_license)}." if facts.seeds_license else ""
    return join("## Seeds", table(("source", "task", "rows"), rows, right=[2]), licence)


def _named(source: Source) -> str:
    if not source.on_hub:
        return code(source.name)
    return f"[{plain(source.name)}](https://huggingface.co/datasets/{source.name})"


def _lengths(facts: DatasetFacts) -> str:
    if not facts.lengths:
        return ""
    ordered = sorted(facts.lengths)
    quantiles = [ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for share in (0, 0.5, 0.9, 1)]
    quantiles[1] = sum(ordered) // len(ordered)
    title = "Lengths and depths" if facts.depths else "Lengths"
    what = "whole rows, chat template included" if facts.unit == "tokens" else "all messages of a row"
    picture = f"![{title}]({facts.picture})" if facts.picture else ""
    depth = (
        "The depth of the context that answers, 0 before and 1 after all distractors, is drawn uniformly."
        if facts.depths
        else ""
    )
    return join(
        f"## {title}",
        table((f"least {facts.unit}", "mean", "90 % have at most", "most"), [quantiles], right=range(4)),
        f"Of {what}. {depth}".strip(),
        picture,
    )


def _rejected(facts: DatasetFacts) -> str:
    if not facts.rejected:
        return "## Rejected\n\nNo seed was rejected."
    number = sum(facts.rejected.values())
    rows = [(plain(reason), count) for reason, count in facts.rejected.items()]
    verb = "seed was" if number == 1 else "seeds were"
    return join(
        "## Rejected",
        f"{number:,} {verb} rejected, with the reason; they stand in the configuration `rejected`, never among the "
        "rows to train on.",
        table(("reason", "seeds"), rows, right=[1]),
    )


def _known(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in values.items() if value not in (None, "", [], ())]


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _citation(facts: DatasetFacts) -> str:
    names = ["context_synthesis"] if facts.method != "given" else []
    names += ["longbench"] if set(facts.tasks) - {"general", "general data"} else []
    return f"## Citation\n\n{cite(names)}" if names else ""
