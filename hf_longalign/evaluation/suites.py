"""The suite of prompts that are answered and scored.

A suite does one process's share of the work (`work`), tells what it asks (`asked`) and, once all shares are done, what
came out (`results`). The others are lm-eval's tasks ([`~hf_longalign.evaluation.harness.HarnessSuite`]) and perplexity
([`~hf_longalign.evaluation.perplexity_suite.PerplexitySuite`]).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.evaluation.results import Scorer, suite_result
from hf_longalign.evaluation.runner import Examinee, answers, ask
from hf_longalign.evaluation.store import ResultStore
from hf_longalign.records.report import SuiteResult, TaskResult


# Tasks, lengths and samples of each -> their prompts, and what has no room, with the reason.
Maker = Callable[[Iterable[str], Sequence[int], int], tuple[list[Prompt], dict[str, str]]]


class PromptSuite:
    """Prompts that are answered and scored.

    Args:
        name: a key of `hf_longalign.records.names.SUITES`.
        prompts: all of them, the same in every process.
        scorer: scores an answer; its first metric is the one to report.
        groups: tasks by group.
        missing: tasks that could not be asked, and why.
        haystack: what needles lie in, in words.
        make: makes the prompts of tasks at lengths, for more samples; `None`: there are no more.
    """

    def __init__(
        self,
        name: str,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        missing: Mapping[str, str] | None = None,
        haystack: str | None = None,
        make: Maker | None = None,
    ) -> None:
        self.name, self.prompts, self.scorer, self.make = name, list(prompts), scorer, make
        self.groups, self.missing, self.haystack = groups, missing or {}, haystack

    def extend(self, task: str, length: int, samples: int) -> None:
        """Have so many samples of a task at a length, those that are there included."""
        known = {prompt.key for prompt in self.prompts}
        prompts, _ = self.make([task], [length], samples) if self.make else ([], {})
        self.prompts += [prompt for prompt in prompts if prompt.key not in known]

    def work(self, examinees: Sequence[Examinee], store: ResultStore, *, rank: int, processes: int) -> None:
        """Have each model answer this process's share of the prompts."""
        for examinee in examinees:
            ask(examinee, self.prompts, store, rank=rank, processes=processes, progress=rank == 0)

    def asked(self) -> list[str]:
        """Return the keys of the prompts."""
        return [prompt.key for prompt in self.prompts]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> SuiteResult:
        """Return the scores of all prompts; see [`suite_result`]."""
        found = {examinee.label: answers(examinee, self.prompts, store) for examinee in examinees}
        result = suite_result(self.name, self.prompts, found, self.scorer, groups=self.groups, haystack=self.haystack)
        result.tasks.extend(TaskResult(task, error=error) for task, error in self.missing.items())
        return result
