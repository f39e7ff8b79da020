"""The tasks of LongBench v1, LongBench-E and v2: metric, room for the answer, and group.

Source: https://github.com/THUDM/LongBench, `config/dataset2maxlen.json`, `eval.py`, `pred.py`, `task.md` (MIT).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from hf_longalign.longbench_prompts import TEMPLATES


@dataclass(frozen=True)
class Task:
    """One task of LongBench.

    Attributes:
        name: as in the data set; the same for its LongBench-E variant.
        metric: name of the metric, see `metrics.METRICS`.
        max_new_tokens: room for the answer, in tokens.
        chat: whether chat models are asked through their chat template.
        stop: texts at which generation ends.
        first_line_only: whether only the answer's first line counts.
    """

    name: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    stop: tuple[str, ...] = ()
    first_line_only: bool = False

    @property
    def template(self) -> str:
        """LongBench's prompt, with `{context}` and, where the task has one, `{input}`."""
        return V2_TEMPLATE if self.name == V2 else TEMPLATES[self.name]


V2 = "longbench_v2"
# `prompts/0shot.txt`; `input` is the question with its choices.
V2_TEMPLATE = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {input}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)


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
CHINESE_TASKS = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
# The eight tasks that Context Synthesis is measured by (https://arxiv.org/abs/2502.15592).
CONTEXT_SYNTHESIS_TASKS = (
    "narrativeqa",
    "qasper",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
)
# LongBench-E: the same tasks with rows spread evenly over the lengths; named with "_e" behind.
EVEN_TASKS = tuple(f"{name}_e" for name in TASKS if name not in (*CHINESE_TASKS, "narrativeqa", "musique", "qmsum"))
# LongBench-E has averages of its own, and none over both.
GROUPS |= {
    f"{group}, LongBench-E": tuple(f"{name}_e" for name in members if f"{name}_e" in EVEN_TASKS)
    for group, members in GROUPS.items()
}
NAMED_SETS: dict[str, tuple[str, ...]] = {
    "all": tuple(TASKS),
    "context_synthesis": CONTEXT_SYNTHESIS_TASKS,
    "even": EVEN_TASKS,
    "v2": (V2,),
}
_V2_TASK = Task(V2, "choice", 128)


def find_task(name: str) -> Task:
    """Return the task of that name, or of its LongBench-E variant.

    Raises:
        ValueError: no such task; the message names close ones.

    Example:

    >>> find_task("hotpotqa_e") is find_task("hotpotqa")
    True
    """
    if name == V2:
        return _V2_TASK
    if name in EVEN_TASKS:
        return TASKS[name.removesuffix("_e")]
    if name not in TASKS:
        known = [*TASKS, *EVEN_TASKS, V2]
        close = difflib.get_close_matches(name, known, cutoff=0.5) or known
        raise ValueError(
            f"`longbench_tasks` must hold LongBench's names, got {name!r}. Set it to one of {', '.join(close)}."
        )
    return TASKS[name]


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Return task names for names of tasks and of sets ("all", "context_synthesis", "even", "v2"), each once.

    Raises:
        ValueError: no such task or set, or none at all.

    Example:

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


def length_range(words: int) -> str:
    """Return the range of lengths that LongBench-E counts a row to, by its words, or characters in Chinese.

    Example:

    >>> [length_range(words) for words in (3999, 4000, 8000)]
    ['0-4k', '4-8k', '8k+']
    """
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"
