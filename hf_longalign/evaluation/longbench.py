"""LongBench v1, LongBench-E and v2: their tasks, the rows of their data, and the prompts a model is asked.

Source: https://arxiv.org/abs/2308.14508 and https://github.com/THUDM/LongBench, `config/dataset2maxlen.json`,
`eval.py`, `pred.py`, `task.md` (MIT).
"""

import difflib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from hf_longalign import rows
from hf_longalign.evaluation.longbench_metrics import METRICS, chinese_words
from hf_longalign.evaluation.prompt import Prompt, encode_text
from hf_longalign.longbench_prompts import TEMPLATES
from hf_longalign.records.training import is_hub_id


FILES = (".zip", ".json", ".jsonl", ".gz", ".tar", ".txt", ".csv", ".parquet")
HUB_ID, V2_HUB_ID = "zai-org/LongBench", "zai-org/LongBench-v2"
V2 = "longbench_v2"
# `prompts/0shot.txt`; `input` is the question with its choices.
V2_TEMPLATE = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {input}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)


@dataclass(frozen=True)
class Task:
    """One task: its name in the data, the same for LongBench-E, its metric, and how it is asked."""

    name: str
    metric: str
    max_new_tokens: int  # room for the answer
    chat: bool = True  # whether chat models are asked through their chat template
    stop: tuple[str, ...] = ()  # texts at which generation ends
    first_line_only: bool = False  # whether only the answer's first line counts

    @property
    def template(self) -> str:
        """LongBench's prompt, with `{context}` and, where the task has one, `{input}`."""
        return V2_TEMPLATE if self.name == V2 else TEMPLATES[self.name]


# The few-shot tasks continue a list of examples, and the code tasks a file: a chat template would be in the way.
# In SAMSum the model would go on with further dialogues, so the end of the line ends the answer. LongBench's script
# also forbids an answer to begin with it; here such an answer is empty.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("narrativeqa", "qa_f1", 128),
        Task("qasper", "qa_f1", 128),
        Task("multifieldqa_en", "qa_f1", 64),
        Task("multifieldqa_zh", "qa_f1_zh", 64),
        Task("hotpotqa", "qa_f1", 32),
        Task("2wikimqa", "qa_f1", 32),
        Task("musique", "qa_f1", 32),
        Task("dureader", "rouge_l_zh", 128),
        Task("gov_report", "rouge_l", 512),
        Task("qmsum", "rouge_l", 512),
        Task("multi_news", "rouge_l", 512),
        Task("vcsum", "rouge_l_zh", 512),
        Task("trec", "classification", 64, chat=False, first_line_only=True),
        Task("triviaqa", "qa_f1", 32, chat=False, first_line_only=True),
        Task("samsum", "rouge_l", 128, chat=False, first_line_only=True, stop=("\n",)),
        Task("lsht", "classification", 64, chat=False, first_line_only=True),
        Task("passage_count", "count", 32),
        Task("passage_retrieval_en", "retrieval", 32),
        Task("passage_retrieval_zh", "retrieval_zh", 32),
        Task("lcc", "code_similarity", 64, chat=False),
        Task("repobench-p", "code_similarity", 64, chat=False),
    )
}
GROUPS: dict[str, tuple[str, ...]] = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic tasks": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code completion": ("lcc", "repobench-p"),
}
# LongBench-E: rows of the same tasks, spread evenly over the lengths; named with "_e" behind.
_NOT_EVEN = {name for name in TASKS if name.endswith("_zh")} | {"dureader", "vcsum", "lsht"}
EVEN_TASKS = tuple(f"{name}_e" for name in TASKS if name not in _NOT_EVEN | {"narrativeqa", "musique", "qmsum"})
ALL_TASKS = {**TASKS, **{name: TASKS[name.removesuffix("_e")] for name in EVEN_TASKS}, V2: Task(V2, "choice", 128)}
# LongBench-E has averages of its own, and none over both.
GROUPS |= {
    f"{group}, LongBench-E": tuple(f"{name}_e" for name in members if f"{name}_e" in EVEN_TASKS)
    for group, members in GROUPS.items()
}
NAMED_SETS: dict[str, tuple[str, ...]] = {
    "all": tuple(TASKS),
    # The eight tasks that Context Synthesis is measured by (https://arxiv.org/abs/2502.15592).
    "context_synthesis": tuple(
        "narrativeqa qasper hotpotqa 2wikimqa musique gov_report qmsum multi_news".split()  # noqa: SIM905
    ),
    "even": EVEN_TASKS,
    "v2": (V2,),
}


def find_task(name: str) -> Task:
    """Return the task of that name, or of its LongBench-E variant.

    Raises:
        ValueError: no such task; the message names close ones.
    """
    if name not in ALL_TASKS:
        close = difflib.get_close_matches(name, ALL_TASKS, cutoff=0.5) or ALL_TASKS
        raise ValueError(
            f"`longbench_tasks` must hold LongBench's names, got {name!r}. Set it to one of {', '.join(close)}."
        )
    return ALL_TASKS[name]


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Return task names for names of tasks and of sets ("all", "context_synthesis", "even", "v2"), each once.

    Raises:
        ValueError: no such task or set, or none at all.

    >>> expand_tasks(["context_synthesis", "trec", "qasper"])[-2:]
    ['multi_news', 'trec']
    """
    tasks = list(dict.fromkeys(task for name in names for task in NAMED_SETS.get(name, (name,))))
    if not tasks:
        raise ValueError(
            f"`longbench_tasks` must name a task, got {list(names)!r}. Set it to 'context_synthesis', for instance."
        )
    for task in tasks:
        find_task(task)
    return tasks


@dataclass(frozen=True)
class Row:
    """One row of a task."""

    context: str  # the long text
    input: str  # the question or the last example; empty where a task has none. In v2 the question and its choices
    answers: tuple[str, ...]  # the references, at least one
    classes: tuple[str, ...] = ()  # all labels of a classification task, in the data's order
    parts: tuple[str, ...] = ()  # that it counts to: LongBench-E's range of lengths, v2's difficulty and length


def read_rows(task: str, source: str | Path | None = None) -> Iterator[Row]:
    """Yield the rows of a task in the data's order.

    Args:
        task: such as "hotpotqa", "hotpotqa_e" or "longbench_v2".
        source: a folder with `<task>.jsonl` (or `data/<task>.jsonl`), one such file, LongBench's `data.zip`, or the id
            of a data set on the Hub that holds `data.zip`. For v2 a folder with `data.json`, that file, or the id of a
            data set that holds it. `None`: LongBench's own on the Hub.

    Raises:
        ValueError: no such task; a row that is not LongBench's, with its file, line and column.
        FileNotFoundError: the source does not have the task.
        ConnectionError: the Hub could not be asked, with what to do.
    """
    metric = find_task(task).metric
    if task == V2:
        path = _fetched(V2_HUB_ID if source is None else source, "data.json")
        names = ("question", "choice_A", "choice_B", "choice_C", "choice_D", "context")
        for row in _json_rows(V2, path, "data.json", "LongBench v2"):
            question, *choices, context = (_column(row, name, "a text", _text).strip() for name in names)
            listed = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", choices, strict=True))
            answer = _column(row, "answer", "one of A, B, C, D", lambda value: value in tuple("ABCD"))
            kinds = tuple(_column(row, name, "a word", _text) for name in ("difficulty", "length"))
            yield Row(context, f"{question}\nChoices:\n{listed}", (answer,), parts=kinds)
        return
    # Its repository offers the data through a loading script, which `datasets` no longer runs: the archive is read.
    path = _fetched(HUB_ID if source is None else source, "data.zip")
    for row in _json_rows(task, path, f"{task}.jsonl", f"the task {task!r}"):
        answers = _column(row, "answers", "a list of one or more texts", lambda value: _texts(value) and value)
        classes = row.values.get("all_classes")
        if metric == "classification":
            classes = _column(row, "all_classes", "a list of texts", _texts)
        parts: tuple[str, ...] = ()
        if task in EVEN_TASKS:  # a row counts to a range by its words, in Chinese its characters
            words = _column(row, "length", "a number of words", lambda value: isinstance(value, int))
            parts = ("0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+",)
        context, asked = (_column(row, name, "a text", _text) for name in ("context", "input"))
        yield Row(context, asked, tuple(answers), tuple(classes or ()), parts)


def _fetched(source: str | Path, file: str) -> Path:
    """The path itself, or the file fetched from the Hub."""
    path = Path(source)
    if path.exists():
        return path
    is_file = path.suffix in FILES  # a Hub id may hold a full stop too
    if isinstance(source, Path) or not is_hub_id(source) or "/" not in source or is_file:
        raise FileNotFoundError(
            f"`longbench_source` must be a file, a folder or a Hub id, got {str(source)!r}, which is not there. "
            "Correct the path."
        )
    try:
        return Path(hf_hub_download(source, file, repo_type="dataset"))
    except Exception as error:  # the client raises its own, httpx's, OSError and ValueError, by what went wrong
        raise ConnectionError(
            f"LongBench's data could not be fetched from the Hub data set {source!r} ({type(error).__name__}: "
            f"{error}). Download its {file} on a machine that reaches the Hub, and set `longbench_source` to that "
            "file or to the folder it unpacks to."
        ) from error


def _json_rows(task: str, source: Path, wanted: str, what: str) -> Iterator[rows.Row]:
    """Every row of a task's file, in a folder, in an archive or by itself."""

    def missing(verb: str, kind: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"`longbench_source` must {verb} {wanted} to have {what}, got the {kind} {str(source)!r}. Set it to the "
            "folder or file that has it, or leave the task out."
        )

    path = source
    if source.is_dir():
        places = [source / name for name in (f"{task}.jsonl", f"data/{task}.jsonl", wanted)]
        path = next((place for place in places if place.is_file()), source)
        if path == source:
            raise missing("hold", "folder")
    if task != V2 and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == wanted), None)
            if member is None:
                raise missing("hold", "archive")
            with archive.open(member) as unpacked:
                yield from rows.read_jsonl(unpacked, f"{path}/{member}")
    elif path.suffix == ".json" and task == V2:
        listed = json.loads(path.read_text(encoding="utf-8"))
        yield from (rows.Row(found, str(path), number, "row") for number, found in enumerate(listed, 1))
    elif path.suffix != ".jsonl" or (task != V2 and path.name != wanted):
        raise missing("be", "file")
    else:
        with path.open("rb") as file:
            yield from rows.read_jsonl(file, str(path))


def _column(row: rows.Row, column: str, kind: str, fits: Callable[[Any], Any]) -> Any:
    if column not in row.values or not fits(row.values[column]):
        got = repr(row.values[column])[:80] if column in row.values else "no such column"
        raise ValueError(f"{row.place}: `{column}` must be {kind}, got {got}. Mend or remove the row.")
    return row.values[column]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def longbench_prompts(
    tasks: Sequence[str],
    *,
    tokenizer: Any,
    max_length: int,
    longbench_length: int | None = None,
    source: str | Path | None = None,
    limit: int | None = None,
    chat: bool = True,
) -> Iterator[Prompt]:
    """Yield the prompts of LongBench's tasks, each short enough to be read with its answer.

    Args:
        tasks: see [`expand_tasks`].
        max_length: tokens a model reads and writes together.
        longbench_length: tokens that a longer prompt is cut to, as LongBench's scripts cut it: counted without the
            chat template, with the tokenizer's own special tokens. `None`: as many as `max_length` has room for
            beside the answer and the template.
        source: where the data are, see [`read_rows`].
        limit: rows of each task, the first ones; `None`: all.
        chat: go through the chat template; never in the few-shot and code tasks, as LongBench has it.

    Raises:
        ValueError: an unknown task, a bad row, or a length without room.
        FileNotFoundError: the source does not have a task.
        ConnectionError: the Hub could not be asked.
    """
    # Scores compare with published ones where prompts were cut to the same length: the tables of v1 have 3,500 tokens
    # for models of 4k, 7,500 for 8k, 15,500 for 16k and 31,500 for 32k, those of v2 120,000 for 128k. v2's script
    # draws its answers at a temperature of 0.1; here all are greedy.
    if longbench_length is not None and not 2 <= longbench_length <= max_length:
        raise ValueError(
            f"`longbench_length` must be from 2 to the model's range of {max_length:,} tokens, got "
            f"{longbench_length!r}. Set 3500 for a model of 4k tokens, 7500 for 8k, 31500 for 32k."
        )
    for name in expand_tasks(tasks):
        task = find_task(name)
        with_template = chat and task.chat
        if task.metric in ("qa_f1_zh", "rouge_l_zh"):
            chinese_words("")  # told now that jieba is missing, and not when all is answered
        room = max_length - task.max_new_tokens
        for index, row in enumerate(islice(read_rows(name, source), limit)):
            whole = task.template.format(context=row.context, input=row.input)
            if longbench_length is None:
                text = cut_to_fit(whole, tokenizer, room, chat=with_template, joined=name == V2)
            else:
                text = cut_middle(whole, tokenizer, longbench_length, joined=name == V2)
                length = len(encode_text(tokenizer, text, chat=with_template))
                if length > room:
                    raise ValueError(
                        f"`longbench_length` must leave room for the template and {task.max_new_tokens} tokens of "
                        f"answer in the model's range of {max_length:,}, got {longbench_length!r}, with which prompt "
                        f"{index} of {name} takes {length:,}. Set {longbench_length - (length - room)} or less."
                    )
            yield Prompt(
                *("longbench", name, index, text, row.answers, task.max_new_tokens),
                chat=with_template,
                stop=task.stop,
                classes=row.classes,
                shortened=text != whole,
                parts=row.parts,
            )


def cut_middle(text: str, tokenizer: Any, tokens: int, *, joined: bool = False) -> str:
    """Return the text, its middle left out where it takes more than so many tokens, as LongBench's scripts do it.

    The result can take some tokens more or less than asked for (at least 2, special ones counted), and a character
    that was cut in two becomes U+FFFD. `joined`: put both ends together, then decode (v2), not the other way (v1).
    """
    return _ends(text, _tokens(text, tokenizer), tokenizer, tokens, joined)


def cut_to_fit(text: str, tokenizer: Any, max_tokens: int, *, chat: bool, joined: bool = False) -> str:
    """Return the text cut as by [`cut_middle`] until all fits into `max_tokens`, the chat template included.

    Raises:
        ValueError: `max_tokens` leaves no room for the text, or `chat` without a chat template.
    """
    surplus = len(encode_text(tokenizer, text, chat=chat)) - max_tokens
    if surplus <= 0:
        return text
    token_ids = _tokens(text, tokenizer)
    kept, shortened = len(token_ids), text
    # The joint and the template change the count, so it is taken again until the whole fits.
    while surplus > 0:
        kept -= surplus
        if kept < 2:
            raise ValueError(
                f"`max_length` must leave room for a prompt beside the answer and the chat template, got {max_tokens} "
                "tokens without the answer's. Set it to more."
            )
        shortened = _ends(text, token_ids, tokenizer, kept, joined)
        surplus = len(encode_text(tokenizer, shortened, chat=chat)) - max_tokens
    return shortened


def _tokens(text: str, tokenizer: Any) -> list[int]:
    # Without `verbose`, tokenizers warn that the text exceeds a range that it is just being cut to.
    return tokenizer(text, verbose=False)["input_ids"]


def _ends(text: str, ids: list[int], tokenizer: Any, tokens: int, joined: bool) -> str:
    if len(ids) <= tokens:
        return text
    # Instructions stand at both ends of a prompt. v2's script keeps the odd token, v1's does not.
    ends = [ids[: tokens // 2] + ids[-tokens // 2 :]] if joined else [ids[: tokens // 2], ids[-(tokens // 2) :]]
    return "".join(str(tokenizer.decode(end, skip_special_tokens=True)) for end in ends)


def score_longbench(prompt: Prompt, text: str) -> dict[str, float]:
    """Return the score of an answer from 0 to 1 under the name of its task's metric.

    >>> prompt = Prompt("longbench", "trec", 0, "Question: Who?\\nType:", ("Person",), 64, classes=("Person", "Date"))
    >>> score_longbench(prompt, "\\nPerson\\nQuestion: When?\\nType: Date")
    {'classification': 1.0}
    """
    task = find_task(prompt.task)
    if task.first_line_only:
        text = text.lstrip("\n").split("\n")[0]
    metric = METRICS[task.metric]
    return {task.metric: max(metric(text, reference, prompt.classes) for reference in prompt.answers)}
