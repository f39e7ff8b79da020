"""RULER and short-context tasks on a loaded model, through lm-eval.

Each task stands by itself: one whose data cannot be fetched gives a result that says so, and the rest goes on.
Source: https://github.com/EleutherAI/lm-evaluation-harness.
"""

import copy
import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_longalign.evaluation.ruler import SeededLengths, least_length


logger = logging.getLogger(__name__)

# Needles, tracing, aggregation and questions (https://arxiv.org/abs/2404.06654), by lm-eval's names.
RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
# RULER's lengths count neither the chat template nor the beginning of the answer that it puts into the model's mouth.
RULER_EXTRA = 256
# Whether alignment to long contexts has cost what the model knew: knowledge, reasoning, following instructions.
SUITES: dict[str, tuple[str, ...]] = {"ruler": RULER_TASKS, "short": ("mmlu_pro", "gsm8k", "ifeval")}


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval found on one task, RULER's at one length.

    Attributes:
        task: lm-eval's name of the task or group.
        length: RULER's length in tokens; `None` elsewhere.
        metric: the task's first metric, with lm-eval's filter behind a comma, such as "exact_match,strict-match".
        value: its value, 0 to 1 for all tasks of `SUITES`; `None` where the task was not run.
        stderr: its standard error, where lm-eval gives one.
        metrics: all metrics of the task, by the same names.
        samples: questions asked.
        n_shot: examples shown before each.
        cut: prompts longer than `max_length`, which lm-eval cuts at their beginning; above 0 the value means little.
        version: lm-eval's version.
        error: why the task was not run, and what to do.
    """

    task: str
    length: int | None = None
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
    ruler_lengths: Sequence[int] | None = None,
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
        tasks: names of lm-eval's tasks and groups, or of `SUITES`: "ruler", "short".
        max_length: tokens the model reads and writes together; a RULER sample of that length may take up to
            `RULER_EXTRA` more.
        ruler_lengths: lengths in tokens of RULER's samples; `None`: all of `RULER_LENGTHS` up to `max_length`.
        limit: questions of each task (of each member of a group), the first ones; `None`: all.
        batch_size: prompts at once.
        chat: go through the chat template.
        include_path: folder with further tasks in lm-eval's YAML format; of equal names, its own count.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: an unknown task, with names close to it; a RULER length above `max_length`; no chat template.
    """
    names = list(dict.fromkeys(task for name in tasks for task in SUITES.get(name, (name,))))
    lengths = _ruler_lengths(ruler_lengths, max_length) if set(names) & set(RULER_TASKS) else []
    if chat and not tokenizer.chat_template:
        raise ValueError("`chat=True` needs a tokenizer with a chat template, got one without. Set `chat` to False.")
    harness = _Harness(model, tokenizer, max_length, limit, batch_size, chat, include_path)
    harness.check(names)
    return harness.results(names, lengths)


def _ruler_lengths(lengths: Sequence[int] | None, max_length: int) -> list[int]:
    found = [length for length in RULER_LENGTHS if length <= max_length] if lengths is None else list(lengths)
    if not found or max(found) > max_length:
        raise ValueError(
            f"`ruler_lengths` must be at most `max_length` ({max_length}), got {lengths or RULER_LENGTHS}. Set "
            "`max_length` to what the model reads, or shorter lengths."
        )
    return found


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
        self.max_length = max_length
        with _quiet():
            self.lm = _counting_lm(model, tokenizer, batch_size)

    def manager(self, name: str) -> Any:
        return self.own if self.own is not None and name in self.own.all_tasks else _tasks_of_lm_eval()

    def check(self, names: Sequence[str]) -> None:
        for name in names:
            known = self.manager(name).all_tasks
            if name not in known:
                close = difflib.get_close_matches(name, known) or [*SUITES, "…"]
                raise ValueError(
                    f"`tasks` must hold names that lm-eval {self.version} knows, got {name!r}. Set it to one of "
                    f"{', '.join(close)}; `lm-eval ls tasks` lists all."
                )
        if not names:
            raise ValueError(
                f"`tasks` must name a task, got none. Set it to one of {', '.join(SUITES)}, for instance."
            )

    def results(self, names: Sequence[str], lengths: Sequence[int]) -> Iterator[HarnessResult]:
        for name in names:
            if name not in RULER_TASKS:
                yield from self.run(name, self.manager(name))
        for length in lengths:
            with tempfile.TemporaryDirectory() as folder:
                # RULER makes its texts to a length in this tokenizer's tokens, which it loads from a folder. lm-eval
                # takes the first questions of all lengths together, so each length has a manager of its own.
                self.tokenizer.save_pretrained(folder)
                ruler = Path(self.lm_eval.__file__).parent / "tasks/ruler"
                manager = _tasks_in(ruler, metadata={"max_seq_lengths": SeededLengths([length]), "tokenizer": folder})
                for name in names:
                    if name in RULER_TASKS:
                        yield from self.run(name, manager, length)

    def run(self, name: str, manager: Any, length: int | None = None) -> list[HarnessResult]:
        self.lm.cut = 0
        self.lm.room = max(self.max_length, 0 if length is None else length + RULER_EXTRA)
        try:
            if length is not None:
                self._check_length(name, length)
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
            return [HarnessResult(name, length, version=self.version, error=told)]
        if self.lm.cut:
            logger.warning("%s: %d prompts are longer than `max_length` and lost their beginning", name, self.lm.cut)
        return self._read(name, length, found)

    def _check_length(self, name: str, length: int) -> None:
        least = least_length(name, length, lambda text: len(self.tokenizer(text)["input_ids"]))
        if length < least:
            needed = "a tokenizer with longer tokens" if least == sys.maxsize else f"at least {least:,} tokens"
            raise ValueError(f"its samples need {needed}, got a length of {length:,}")

    def _read(self, name: str, length: int | None, found: Mapping[str, Any]) -> list[HarnessResult]:
        by_task = {task: _metrics(values, length) for task, values in found["results"].items()}
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
                    length=length,
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


@cache
def _tasks_of_lm_eval() -> Any:
    """All tasks lm-eval comes with; reading their thousands of files takes seconds, so it is done once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _tasks_in(folder: str | Path, metadata: dict[str, Any] | None = None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)


def _counting_lm(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """lm-eval's model around a loaded one: reads and writes `room` tokens, counts the longer prompts in `cut`."""
    from lm_eval.models.huggingface import HFLM

    class CountingLM(HFLM):
        cut = 0
        room = 0

        @property
        def max_length(self) -> int:
            return self.room

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


def _metrics(values: Mapping[str, Any], length: int | None) -> dict[str, float]:
    """The metrics of a task, "name,filter"; of RULER the one of this length, which is what its metrics are called."""
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key
        and not key.split(",")[0].endswith("_stderr")
        and isinstance(value, Real)
        and (length is None or key.split(",")[0] == str(length))
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
