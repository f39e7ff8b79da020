"""Tasks of short contexts on a loaded model, through lm-eval: what the training costs there.

Each task stands by itself: one whose data cannot be fetched gives a result that says so, and the rest goes on.
Source: https://github.com/EleutherAI/lm-evaluation-harness.
"""

import copy
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import combinations
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_longalign.evaluation.intervals import Z, mean_interval
from hf_longalign.evaluation.options import SHORT
from hf_longalign.evaluation.results import group_means
from hf_longalign.evaluation.runner import Examinee, ResultStore
from hf_longalign.records.report import Difference, Score, SuiteResult, TaskResult


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval found on one task.

    Attributes:
        task: lm-eval's name of the task or group.
        metric: the task's first metric, with lm-eval's filter behind a comma, such as "exact_match,strict-match".
        value: its value, 0 to 1 for all tasks of `SHORT`; `None` where the task was not run.
        stderr: its standard error, where lm-eval gives one.
        metrics: all metrics of the task, by the same names.
        samples: questions asked.
        n_shot: examples shown before each.
        cut: prompts longer than `max_length`, which lm-eval cuts at their beginning; above 0 the value means little.
        version: lm-eval's version.
        error: why the task was not run, and what to do.
    """

    task: str
    metric: str | None = None
    value: float | None = None
    stderr: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    n_shot: int | None = None
    cut: int = 0
    version: str = ""
    error: str | None = None


def run_harness(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    max_length: int,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = True,
    include_path: str | Path | None = None,
) -> Iterator[HarnessResult]:
    """Check the arguments, then yield the result of each task as soon as it is there.

    An adapter is in force unless the caller has turned it off (`model.disable_adapter()`). lm-eval seeds Python's,
    NumPy's and torch's global generators anew for each task, so equal arguments give equal questions.

    Args:
        model: loaded, with or without an adapter; it is set to evaluation mode.
        tokenizer: the model's.
        tasks: names of lm-eval's tasks and groups.
        max_length: tokens the model reads and writes together.
        limit: questions of each task (of each member of a group), the first ones; `None`: all.
        batch_size: prompts at once.
        chat: go through the chat template.
        include_path: folder with further tasks in lm-eval's YAML format; of equal names, its own count.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: an unknown task, with names close to it; no chat template.
    """
    names = list(dict.fromkeys(tasks))
    if chat and not tokenizer.chat_template:
        raise ValueError("`chat=True` needs a tokenizer with a chat template, got one without. Set `chat` to False.")
    harness = _Harness(model, tokenizer, max_length, limit, batch_size, chat, include_path)
    harness.check(names)
    return (result for name in names for result in harness.run(name, harness.manager(name)))


class _Harness:
    """lm-eval around one loaded model."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        limit: int | None,
        batch_size: int,
        chat: bool,
        include_path: str | Path | None,
    ) -> None:
        try:
            import lm_eval
        except ImportError as error:
            raise ImportError('This needs lm-eval. Run: pip install "hf_longalign[harness]"') from error
        self.lm_eval, self.version = lm_eval, str(lm_eval.__version__)
        self.tokenizer, self.limit, self.chat = tokenizer, limit, chat
        self.own = None if include_path is None else _tasks_in(include_path)
        with _quiet():
            self.lm = _counting_lm(model, tokenizer, batch_size, max_length)

    def manager(self, name: str) -> Any:
        return self.own if self.own is not None and name in self.own.all_tasks else _tasks_of_lm_eval()

    def check(self, names: Sequence[str]) -> None:
        for name in names:
            known = self.manager(name).all_tasks
            if name not in known:
                close = difflib.get_close_matches(name, known) or [*SHORT, "…"]
                raise ValueError(
                    f"`short_tasks` must hold names that lm-eval {self.version} knows, got {name!r}. Set it to one of "
                    f"{', '.join(close)}; `lm-eval ls tasks` lists all."
                )
        if not names:
            raise ValueError(f"`short_tasks` must name a task, got none. Set it to {SHORT[0]!r}, for instance.")

    def run(self, name: str, manager: Any) -> list[HarnessResult]:
        self.lm.cut = 0
        try:
            with _only_process(), _quiet():
                found = self.lm_eval.simple_evaluate(
                    self.lm,
                    tasks=[name],
                    task_manager=manager,
                    limit=self.limit,
                    apply_chat_template=self.chat,
                    log_samples=False,
                )
        except Exception as error:  # each task's code and data raise their own; the others go on
            told = _explained(name, error)
            logger.warning("%s", told)
            logger.debug("lm-eval's error in %s", name, exc_info=True)
            return [HarnessResult(name, version=self.version, error=told)]
        if self.lm.cut:
            logger.warning("%s: %d prompts are longer than `max_length` and lost their beginning", name, self.lm.cut)
        return self._read(name, found)

    def _read(self, name: str, found: Mapping[str, Any]) -> list[HarnessResult]:
        by_task = {task: _metrics(values) for task, values in found["results"].items()}
        # A group without an average of its own, and a tag, stand for their tasks.
        tasks = [name] if by_task.get(name) else [task for task, metrics in by_task.items() if metrics]
        samples = {task: counts["effective"] for task, counts in found["n-samples"].items()}
        shots = found["n-shot"]
        results = []
        for task in tasks:
            metric = next(iter(by_task[task]))
            stderr = found["results"][task].get(metric.replace(",", "_stderr,"))
            results.append(
                HarnessResult(
                    task=task,
                    metric=metric,
                    value=by_task[task][metric],
                    stderr=float(stderr) if isinstance(stderr, Real) else None,
                    metrics=by_task[task],
                    samples=samples.get(task, sum(samples.values())),
                    n_shot=shots.get(task, next(iter(shots.values()), None)),
                    cut=self.lm.cut,
                    version=self.version,
                )
            )
        return results


class HarnessSuite:
    """Short-context tasks of lm-eval, each once per model; those that failed in an earlier run are tried again.

    Every process must make it before any of them works: they agree on what an earlier run has left.

    Args:
        tasks: lm-eval's names.
        model: what all examinees share.
        tokenizer: the model's.
        store: what earlier runs have found.
        examinees: the models.
        max_length: tokens the model reads and writes together.
        limit: questions of each task; `None`: all.
        chat: go through the chat template.
    """

    name = "short"

    def __init__(
        self,
        tasks: Sequence[str],
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        store: ResultStore,
        examinees: Sequence[Examinee],
        *,
        max_length: int,
        limit: int | None = None,
        chat: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.options: dict[str, Any] = {"max_length": max_length, "limit": limit, "chat": chat}
        self.tasks = list(dict.fromkeys(tasks))
        run_harness(model, tokenizer, self.tasks, **self.options)  # checks the names
        self._keys = {
            (examinee.label, task): self._first_open(examinee, task, store)
            for examinee in examinees
            for task in self.tasks
        }

    def work(self, examinees: Sequence[Examinee], store: ResultStore, *, rank: int, processes: int) -> None:
        """Run this process's share of the tasks."""
        jobs = [(examinee, task) for task in self.tasks for examinee in examinees]
        bar = tqdm(jobs[rank::processes], desc=self.name, unit="task", disable=rank != 0)
        for examinee, task in bar:
            key = self._keys[examinee.label, task]
            bar.set_postfix_str(f"{examinee.label}, {task}")
            if key not in store:
                with examinee.active():
                    found = run_harness(self.model, self.tokenizer, [task], **self.options)
                    store.add(key, [asdict(result) for result in found])

    def asked(self) -> list[str]:
        """Return the tasks with lm-eval's version and what their questions depend on."""
        return [f"lm-eval/{version('lm-eval')}/{self.options}/{task}" for task in self.tasks]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> SuiteResult:
        """Return the value of every task with the interval of its standard error, or why it was not run."""
        store.wait_for(self._keys.values())
        found: dict[str, dict[str, HarnessResult]] = {}
        for task in self.tasks:
            for examinee in examinees:
                for value in store.get(self._keys[examinee.label, task]):
                    result = HarnessResult(**value)
                    found.setdefault(result.task, {})[examinee.label] = result
        tasks = [_task_result(name, by_label) for name, by_label in found.items()]
        return SuiteResult(self.name, tasks, group_means(tasks, {}))

    def _first_open(self, examinee: Examinee, task: str, store: ResultStore) -> str:
        """The key of a task's result: the first attempt that is not there yet or did not fail."""
        attempt = 0
        while True:
            key = examinee.key(f"lm-eval/{self.options}/{task}/{attempt}")
            if key not in store or not any(result["error"] for result in store.get(key)):
                return key
            attempt += 1


def _task_result(task: str, by_label: Mapping[str, HarnessResult]) -> TaskResult:
    done = {label: result for label, result in by_label.items() if result.value is not None}
    first = next(iter(done.values()), None)
    cut = sum(result.cut for result in done.values())
    return TaskResult(
        task,
        metric=first.metric if first else None,
        samples=first.samples if first else 0,
        scores={label: _score(result) for label, result in done.items()},
        differences=[
            # lm-eval keeps no answers here, so the difference has no interval of its own.
            Difference(label, reference, float(done[label].value or 0) - float(done[reference].value or 0))
            for reference, label in combinations(done, 2)
        ],
        cut_prompts=cut,
        error=next((result.error for result in by_label.values() if result.error), None),
        note="prompts longer than the model's range lost their beginning" if cut else None,
    )


def _score(found: HarnessResult) -> Score:
    value = float(found.value or 0)
    if found.stderr is None:
        return Score(value)
    if found.stderr == 0:  # all questions scored alike, which few questions easily do: no proof that others would
        return Score(value, *mean_interval([value] * found.samples))
    return Score(value, max(0.0, value - Z * found.stderr), min(1.0, value + Z * found.stderr))


@cache
def _tasks_of_lm_eval() -> Any:
    """All tasks lm-eval comes with; reading their thousands of files takes seconds, so it is done once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _tasks_in(folder: str | Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def _counting_lm(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, room: int
) -> Any:
    """lm-eval's model around a loaded one: reads and writes `room` tokens, counts the longer prompts in `cut`."""
    from lm_eval.models.huggingface import HFLM

    class CountingLM(HFLM):
        cut = 0

        @property
        def max_length(self) -> int:
            return room

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> Any:
            token_ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
            if not left_truncate_len:
                return token_ids, mask
            self.cut += int((mask.sum(dim=1) > left_truncate_len).sum())
            return token_ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

        def _loglikelihood_tokens(self, requests: list, *args: Any, **options: Any) -> Any:
            self.cut += sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)
            return super()._loglikelihood_tokens(requests, *args, **options)

    # The tokenizer is copied because lm-eval gives it a padding token.
    return CountingLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task, "name,filter", without their standard errors."""
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key and not key.split(",")[0].endswith("_stderr") and isinstance(value, Real)
    }


def _explained(name: str, error: Exception) -> str:
    first_line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return (
        f"{name} was not run: {type(error).__name__}: {first_line[:300].rstrip('.')}. If its data could not be "
        "fetched, run it once where the Hub is reached, with the same HF_HOME, or leave it out."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks on what is meant to be so, such as a loaded model; its `print` goes to stderr."""
    levels = {"lm_eval": logging.WARNING, "lm_eval.models.huggingface": logging.ERROR, "lm_eval.api": logging.ERROR}
    if logger.isEnabledFor(logging.DEBUG):
        levels = {}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _only_process() -> Iterator[None]:
    """lm-eval gives results to the process with LOCAL_RANK 0 alone; here each process asks for its own tasks."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
