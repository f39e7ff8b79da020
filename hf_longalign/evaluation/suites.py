"""The suites of an evaluation: each does its share of the work once, and tells its results when all is done."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.evaluation.results import Scorer, suite_results
from hf_longalign.evaluation.runner import Examinee, answers, ask
from hf_longalign.evaluation.store import ResultStore


class Suite(Protocol):
    """A part of an evaluation."""

    def work(self, examinees: Sequence[Examinee], store: ResultStore, *, rank: int, processes: int) -> None:
        """Do one process's share of what the store does not hold yet."""
        ...

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> dict[str, Any]:
        """Wait for all shares and return what goes into the report."""
        ...

    def asked(self) -> list[str]:
        """Return what tells each question from every other: equal where two reports asked the same."""
        ...


class PromptSuite:
    """Prompts that are answered and scored: needle and LongBench.

    Args:
        name: "needle" or "longbench".
        prompts: all of them, the same in every process.
        scorer: scores an answer.
        metric: the metric to report first; `None`: each task its own.
        groups: tasks by group.
        missing: tasks that could not be asked, and why.
    """

    def __init__(
        self,
        name: str,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        *,
        metric: str | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        missing: Mapping[str, str] | None = None,
    ) -> None:
        self.missing = missing or {}
        self.name, self.prompts, self.scorer, self.metric, self.groups = name, prompts, scorer, metric, groups

    def work(self, examinees: Sequence[Examinee], store: ResultStore, *, rank: int, processes: int) -> None:
        """Have each model answer this process's share of the prompts."""
        for examinee in examinees:
            ask(examinee, self.prompts, store, rank=rank, processes=processes, progress=rank == 0)

    def asked(self) -> list[str]:
        """Return the keys of the prompts."""
        return [prompt.key for prompt in self.prompts]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> dict[str, Any]:
        """Return the scores of all prompts; see [`suite_results`]."""
        texts = {examinee.label: answers(examinee, self.prompts, store) for examinee in examinees}
        found = suite_results(self.name, self.prompts, texts, self.scorer, metric=self.metric, groups=self.groups)
        found["tasks"] += [{"task": task, "error": error} for task, error in self.missing.items()]
        return found
