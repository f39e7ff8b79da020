"""Asking models all prompts once: what is on disk is not asked again, processes of one folder share the rest."""

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from hf_longalign.evaluation.claims import LIMIT, Claims
from hf_longalign.evaluation.prompt import Completion, Prompt
from hf_longalign.evaluation.results import Scorer, suite_result
from hf_longalign.records.report import Speed, SuiteResult, TaskResult


logger = logging.getLogger(__name__)

PAUSE = 0.5  # seconds between two looks at what other processes have done

# A task, lengths and samples at each -> its prompts, and the lengths that have no room, with the reason.
Maker = Callable[[str, Sequence[int], int], tuple[list[Prompt], dict[str, str]]]


class ResultStore:
    """JSON values by key in a folder, one append-only file per process; every process reads all of them.

    `expected` processes were started to share it; any others may join.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ResultStore(folder) as store:
    ...         store.add("a", {"text": "42"})
    ...     with ResultStore(folder) as store:
    ...         store.get("a"), "b" in store
    ({'text': '42'}, False)
    """

    def __init__(self, folder: str | Path, expected: int = 1) -> None:
        self.folder, self.expected = Path(folder), expected
        self.claims = Claims(self.folder / "claims")
        # The first that no living process writes to: a run that goes on adds to the files of the one before.
        files = (self.folder / f"results-{number}.jsonl" for number in itertools.count())
        path = next(path for path in files if self.claims.take(path.name))
        self._file = path.open("ab+")
        # A kill may have left half a line, which the next one would be glued to.
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        self._values: dict[str, Any] = {}
        self._read: dict[Path, int] = {}
        self._late = time.monotonic() + LIMIT
        self.refresh()

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self.claims.close()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that shows what is done and writes the report."""
        return self.claims.take("main")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """Return the value of a key that is there."""
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Write a JSON-able value, which is on disk when this returns."""
        # Of a process that was taken for lost another gives the answer: a second one must not follow.
        self.claims.check()
        self._file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a machine that goes down keeps it too
        self._values[key] = value

    def refresh(self) -> None:
        """Read what the processes have added since the last time."""
        for path in sorted(self.folder.glob("results-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data.rfind(b"\n") + 1  # the rest is being written by another process, or was cut off by a kill
            for line in data[:whole].splitlines():
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            self._read[path] = self._read.get(path, 0) + whole

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that have no value yet."""
        return [key for key in keys if key not in self._values]

    def open_keys(self, units: Sequence[Sequence[str]]) -> Iterator[list[str]]:
        """Yield keys that have no value, some units at a time, each to one process; nothing once all have a holder.

        Whoever is given keys adds their values before asking for more. Units of a process that is lost come again.

        Args:
            units: the keys of what one process does in one go.
        """
        while True:
            self.refresh()
            left = [unit for unit in units if self.missing(unit)]
            most = self._share(len(left))
            taken = list(itertools.islice((unit for unit in left if self.claims.take(unit[0])), most))
            if not taken:
                return
            self.refresh()  # another process may have finished a unit since, and let it go
            yield self.missing(itertools.chain(*taken))
            self.claims.release(unit[0] for unit in taken)

    def _share(self, units: int) -> int:
        """How many units to take at once: alone all, as they share beginnings, else few, so that all end together."""
        others = self.claims.alive()
        if time.monotonic() < self._late:
            others = max(others, self.expected)
        else:
            self.tell_who_is_missing()
        return units if others == 1 else ceil(units / others / 2)

    def tell_who_is_missing(self) -> None:
        """Warn, once, where fewer processes came than were started."""
        if len(self.claims.met) < self.expected:
            logger.warning(
                "%d processes were started, and %d came to %s. If the others run, their disk is another one and they "
                "ask everything again: set `output_dir` to a folder that all share. If they are lost, what they would "
                "have asked is asked here.",
                self.expected, len(self.claims.met), self.folder,
            )  # fmt: skip
            self.expected = 0

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the value of a key, which one process makes where none has yet, and the others wait for.

        A dataclass is stored as the dict of its fields.
        """
        while self.missing([key]):  # whoever makes it may be lost before it is written
            for keys in self.open_keys([[key]]):
                for missing in keys:
                    made = make()
                    self.add(missing, asdict(made) if is_dataclass(made) and not isinstance(made, type) else made)
            if self.missing([key]):
                time.sleep(PAUSE)
        return self._values[key]


class Generator(Protocol):
    """Answers prompts greedily."""

    stats: Speed  # what that has taken so far
    on_read: Callable[[Prompt], None]  # called with each prompt where many are read before the first is answered

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Yield each prompt with its completion, in any order."""
        ...


@dataclass
class Examinee:
    """A model under evaluation."""

    label: str  # what tables and plots call it, such as "base" or "adapter"
    identity: str  # what makes its answers its own (weights, revision, RoPE, precision); equal for equal models alone
    generator: Generator
    # A context in which the generator speaks for this model, such as one that turns an adapter off.
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    what: str = ""  # in words

    def key(self, unit: str) -> str:
        """Return the key under which the result of a unit of work (a prompt, a task, a document) is stored."""
        return f"{self.identity}/{unit}"


def ask(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore, *, progress: bool = True) -> None:
    """Have a model answer the prompts that the store does not hold and no other process is at, task by task.

    The store gets the fields of [`Completion`], and in `spent` what it took, under `examinee.key(prompt.key)`.
    """
    # The other ways to ask a task ("latest, closed book") are answered together with it: full batches are faster.
    by_task: dict[str, dict[str, Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task.partition(",")[0], {})[examinee.key(prompt.key)] = prompt
    for task, by_key in by_task.items():
        # By sample, not by prompt: the depths of a sample share a haystack, which one process then reads once.
        samples: dict[tuple, list[str]] = {}
        for key, prompt in by_key.items():
            samples.setdefault(prompt.sample, []).append(key)
        for keys in store.open_keys(list(samples.values())):
            bar = tqdm(total=len(by_key), desc=f"{examinee.label}, {task}", unit="prompt", disable=not progress)
            examinee.generator.on_read = partial(_count_once, bar, set())
            with bar, examinee.active():
                bar.update(len(by_key) - len(store.missing(by_key)))
                before = asdict(examinee.generator.stats)
                for prompt, completion in examinee.generator.generate([by_key[key] for key in keys]):
                    # Prompts that are answered together share the time by chance: only the sum over many means
                    # something.
                    now = asdict(examinee.generator.stats)
                    spent = {name: now[name] - before[name] for name in now}
                    store.add(examinee.key(prompt.key), {**asdict(completion), "spent": spent})
                    before = now
                    examinee.generator.on_read(prompt)


def _count_once(bar: Any, counted: set[str], prompt: Prompt) -> None:
    """Move a bar on by a prompt that is read, or answered where nobody tells what is read."""
    if prompt.key not in counted:  # one that was read before memory ran out is read again
        counted.add(prompt.key)
        place = [] if prompt.length is None else [f"{prompt.length:,} tokens"]
        place += [] if prompt.depth is None else [f"depth {prompt.depth:.0%}"]
        bar.set_postfix_str(", ".join(place), refresh=False)
        bar.update()


def answers(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore) -> list[Completion]:
    """Return what a model answered to each prompt."""
    found = (store.get(examinee.key(prompt.key)) for prompt in prompts)
    return [Completion(value["text"], value["tokens"], value["cut"]) for value in found]


def spent(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore) -> Speed:
    """Return what all answers took together, those of earlier runs and of other processes too."""
    found = [store.get(examinee.key(prompt.key))["spent"] for prompt in prompts]
    return Speed(**{part.name: sum(one[part.name] for one in found) for part in fields(Speed)})


@dataclass
class PromptSuite:
    """Prompts that are answered and scored.

    Every suite does what is open and free (`work`), tells what it asks (`asked`), under which keys the store gets the
    answers (`keys`) and, once all are there, what came out (`results`); so do
    [`~hf_longalign.evaluation.harness.HarnessSuite`] and [`~hf_longalign.evaluation.perplexity.PerplexitySuite`].
    """

    name: str  # a key of `hf_longalign.records.report.SUITES`
    prompts: list[Prompt]  # all of them, the same in every process
    scorer: Scorer
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # tasks by group, for averages
    missing: Mapping[str, str] = field(default_factory=dict)  # tasks that could not be asked, and why
    haystack: str | None = None  # what needles lie in, in words
    make: Maker | None = None  # makes the prompts of tasks at lengths, for more samples

    def extend(self, task: str, length: int, samples: int) -> None:
        """Have so many samples of a task at a length, those that are there included."""
        known = {prompt.key for prompt in self.prompts}
        prompts, _ = self.make(task, [length], samples) if self.make else ([], {})
        self.prompts += [prompt for prompt in prompts if prompt.key not in known]

    def work(self, examinees: Sequence[Examinee], store: ResultStore) -> None:
        """Have each model answer the prompts that no other process is at."""
        for examinee in examinees:
            ask(examinee, self.prompts, store, progress=store.is_main)

    def keys(self, examinees: Sequence[Examinee]) -> list[str]:
        """Return the keys of all answers."""
        return [examinee.key(prompt.key) for examinee in examinees for prompt in self.prompts]

    def asked(self) -> list[str]:
        """Return the keys of the prompts."""
        return [prompt.key for prompt in self.prompts]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> SuiteResult:
        """Return the scores of all prompts; see [`suite_result`]."""
        found = {examinee.label: answers(examinee, self.prompts, store) for examinee in examinees}
        result = suite_result(self.name, self.prompts, found, self.scorer, groups=self.groups, haystack=self.haystack)
        result.tasks.extend(TaskResult(task, error=error) for task, error in self.missing.items())
        return result
