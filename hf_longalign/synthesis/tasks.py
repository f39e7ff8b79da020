"""The tasks a seed can belong to: what text its context is, and the prompt a composed sample is put into.

The templates of the eight tasks are LongBench's own, which is what Context Synthesis composes into
(https://arxiv.org/abs/2502.15592), NarrativeQA's with the space it lacks. The templates that name one context among
several, and the general task, are this package's wording: with ten reports in the prompt, LongBench's "write a
one-page summary of the report" does not say which.
"""

import re
from dataclasses import dataclass

from hf_longalign.longbench_prompts import TEMPLATES


@dataclass(frozen=True)
class Task:
    """One task: its name, the text its contexts are, and its prompt.

    Attributes:
        name: LongBench's name of the task.
        aliases: other names under which seeds of the task are published.
        genre: the kind of text a model is asked to write as a context.
        noun: what one context is called when an instruction has to name it.
        template: the prompt, with `{context}` and, where the task has one, `{input}`.
        named_template: the prompt that asks about one of several contexts, with `{reference}` in place of it; `None`
            where naming the context in front of the instruction is enough.
        marks: what published contexts of the task hold in place of line breaks, and the line breaks.
    """

    name: str
    genre: str
    noun: str
    template: str
    named_template: str | None = None
    aliases: tuple[str, ...] = ()
    marks: tuple[tuple[str, str], ...] = ()

    @property
    def is_summary(self) -> bool:
        """Whether the instruction is the same for every seed, so that only a name tells the contexts apart."""
        return "{input}" not in self.template

    def clean(self, context: str) -> str:
        """Return a given context with line breaks for the marks that stand for them."""
        for mark, line_break in self.marks:
            context = context.replace(mark, line_break)
        return _BREAKS.sub(lambda found: "\n" * min(2, found[0].count("\n")), context) if self.marks else context


# Blanks before a line break and any number of breaks: one break stays one, more become a paragraph.
_BREAKS = re.compile(r"[ \t]*\n\s*")
_ENCYCLOPEDIA = "several passages of an encyclopedia, each under its own heading"


_TASKS = (
    Task(
        "narrativeqa",
        "a long excerpt of a novel or of a film script",
        "story",
        TEMPLATES["narrativeqa"].replace("asconcisely", "as concisely"),
    ),
    Task(
        "qasper",
        "a scientific article on language processing, with abstract, method, data, experiments and results",
        "article",
        TEMPLATES["qasper"],
    ),
    Task("hotpotqa", _ENCYCLOPEDIA, "passages", TEMPLATES["hotpotqa"]),
    Task("2wikimqa", _ENCYCLOPEDIA, "passages", TEMPLATES["2wikimqa"], aliases=("2wikiqa",)),
    Task("musique", _ENCYCLOPEDIA, "passages", TEMPLATES["musique"]),
    Task(
        "gov_report",
        "a report by a government agency, with findings, figures and recommendations",
        "report",
        TEMPLATES["gov_report"],
        named_template=(
            "You are given several reports by government agencies. Write a one-page summary of one of them.\n\n"
            "Reports:\n{context}\n\nNow, write a one-page summary of {reference}.\n\nSummary:"
        ),
        aliases=("govreport",),
    ),
    Task(
        "qmsum",
        "the transcript of a meeting, turn by turn, each turn opened by its speaker's name",
        "transcript",
        TEMPLATES["qmsum"],
    ),
    Task(
        "multi_news",
        "several news articles by different papers on one event",
        "news",
        TEMPLATES["multi_news"],
        named_template=(
            "You are given the news on several events. Write a one-page summary of the news on one of them.\n\n"
            "News:\n{context}\n\nNow, write a one-page summary of {reference}.\n\nSummary:"
        ),
        aliases=("multinews",),
        marks=(("NEWLINE_CHAR", "\n"), ("|||||", "\n\n"), ("story_separator_special_tag", "\n\n")),
    ),
    Task(
        "general",
        "a text of the kind the instruction is about",
        "text",
        "Read the text, then follow the instruction below it.\n\n{context}\n\n{input}",
    ),
)
TASKS = {task.name: task for task in _TASKS}
_ALIASES = {alias: task.name for task in TASKS.values() for alias in task.aliases}


def find_task(name: str) -> Task:
    """Return the task of that name or alias; a ValueError lists the names."""
    task = TASKS.get(_ALIASES.get(name, name))
    if task is None:
        names = ", ".join(sorted([*TASKS, *_ALIASES]))
        raise ValueError(f"`task` must be one of {names}, got {name!r}. Set it to 'general' else.")
    return task


def prompt_parts(task: Task, instruction: str, reference: str | None = None) -> tuple[str, str]:
    """Return what stands before the contexts in the task's prompt, and behind them and a blank line.

    >>> prompt_parts(TASKS["gov_report"], "", 'the report "Dams"')[1]
    'Now, write a one-page summary of the report "Dams".\\n\\nSummary:'
    """
    template = task.template
    if reference is not None and task.named_template is not None:
        template = task.named_template
    elif reference is not None:
        instruction = f"(On {reference}) {instruction}"
    head, tail = template.split("{context}\n\n")
    return head, fill(tail, reference=reference or "", input=instruction)


def fill(template: str, **values: str) -> str:
    """Return a template with its fields filled at once: braces in what is filled in are text, not fields.

    >>> fill("On {reference}: {input}", reference="the film {input}", input="Who?")
    'On the film {input}: Who?'
    """
    # Not `str.format`: contexts hold braces (code, JSON, LaTeX), and one pass fills none that came in with a value.
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), template)
