"""Asking models all prompts once: what is on disk is not asked again, several processes share the rest."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from hf_longalign.evaluation.prompt import Completion, GenerationStats, Prompt
from hf_longalign.evaluation.results import Scorer, suite_result
from hf_longalign.records.report import Speed, SuiteResult, TaskResult


logger = logging.getLogger(__name__)

# A task, lengths and samples at each -> its prompts, and the lengths that have no room, with the reason.
Maker = Callable[[str, Sequence[int], int], tuple[list[Prompt], dict[str, str]]]


class ResultStore:
    """JSON values by key in a folder, one append-only file per process; every process reads all of them.

    Args:
        folder: where the files go; it is made.
        rank: number of this process.

    Raises:
        OSError: the folder cannot be written to.

    Example:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ResultStore(folder) as store:
    ...         store.add("a", {"text": "42"})
    ...     with ResultStore(folder, rank=1) as store:
    ...         store.get("a"), "b" in store
    ({'text': '42'}, False)
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"results-{rank}.jsonl"
        self._file = path.open("ab+")
        # A kill may have left half a line, which the next one would be glued to.
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        self._values: dict[str, Any] = {}
        self._read: dict[Path, int] = {}
        self.refresh()

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """Return the value of a key that is there."""
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Write a JSON-able value, which is on disk when this returns."""
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

    def wait_for(self, keys: Iterable[str], *, every: float = 0.5, tell_every: float = 60.0) -> None:
        """Wait until other processes have added all keys, and say every `tell_every` seconds how many are missing."""
        # Files, and no barrier of torch: that one ends the run after its time-out, and shares differ by hours.
        missing, told = set(keys), -tell_every
        while True:
            self.refresh()
            missing = {key for key in missing if key not in self._values}
            if not missing:
                return
            if time.monotonic() - told >= tell_every:
                told = time.monotonic()
                logger.info("Waiting for %d results of other processes in %s.", len(missing), self.folder)
            time.sleep(every)


class Generator(Protocol):
    """Answers prompts greedily, each as soon as it is answered, and counts in `stats` what that takes."""

    stats: GenerationStats

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Yield each prompt with its completion, in any order."""
        ...


@dataclass
class Examinee:
    """A model under evaluation.

    Attributes:
        label: what tables and plots call it, such as "base" or "adapter".
        identity: what makes its answers its own (weights, revision, RoPE, precision); equal for equal models alone.
        generator: answers prompts.
        active: returns a context in which the generator speaks for this model, such as one that turns an adapter off.
        what: what it is, in words.
    """

    label: str
    identity: str
    generator: Generator
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    what: str = ""

    def key(self, unit: str) -> str:
        """Return the key under which the result of a unit of work (a prompt, a task, a document) is stored."""
        return f"{self.identity}/{unit}"


def share(prompts: Sequence[Prompt], rank: int, processes: int) -> list[Prompt]:
    """Return the prompts of one of several processes.

    Example:

    >>> grid = [(i, d) for i in (0, 1) for d in (0.0, 1.0)]
    >>> prompts = [Prompt("needle", "single", i, "text", ("a",), 8, length=64, depth=d) for i, d in grid]
    >>> [(prompt.index, prompt.depth) for prompt in share(prompts, 1, 2)]
    [(1, 0.0), (1, 1.0)]
    """
    # By sample, not by prompt: the depths of a sample share a haystack, which one process then reads once.
    groups: dict[tuple, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.suite, *prompt.sample), []).append(prompt)
    return [prompt for group in list(groups.values())[rank::processes] for prompt in group]


def ask(
    examinee: Examinee,
    prompts: Sequence[Prompt],
    store: ResultStore,
    *,
    rank: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> None:
    """Have a model answer its share of the prompts that the store does not hold yet, task by task.

    The store gets `{"text": …, "tokens": …, "cut": …, "spent": …}` under `examinee.key(prompt.key)`; `spent` is what
    it took, see [`GenerationStats`]. `progress` shows a bar per task.
    """
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        mine = share([prompt for prompt in prompts if prompt.task == task], rank, processes)
        left = [prompt for prompt in mine if examinee.key(prompt.key) not in store]
        title, done = f"{examinee.label}, {task}", len(mine) - len(left)
        bar = tqdm(total=len(mine), initial=done, desc=title, unit="prompt", disable=not progress)
        with bar, examinee.active():
            before = asdict(examinee.generator.stats)
            for prompt, completion in examinee.generator.generate(left):
                # Prompts that are answered together share the time by chance: only the sum over many means something.
                now = asdict(examinee.generator.stats)
                spent = {name: now[name] - before[name] for name in now}
                store.add(examinee.key(prompt.key), {**asdict(completion), "spent": spent})
                before = now
                place = [] if prompt.length is None else [f"{prompt.length:,} tokens"]
                place += [] if prompt.depth is None else [f"depth {prompt.depth:.0%}"]
                bar.set_postfix_str(", ".join(place), refresh=False)
                bar.update()


def _stored(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore) -> list[dict[str, Any]]:
    keys = [examinee.key(prompt.key) for prompt in prompts]
    store.wait_for(keys)
    return [store.get(key) for key in keys]


def answers(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore) -> list[Completion]:
    """Return what a model answered to each prompt, waiting for the other processes where they are not done."""
    found = _stored(examinee, prompts, store)
    return [Completion(value["text"], value["tokens"], value["cut"]) for value in found]


def spent(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore) -> Speed:
    """Return what all answers took together, those of earlier runs and of other processes too, once all are there."""
    found = [value["spent"] for value in _stored(examinee, prompts, store)]
    return Speed(**{field.name: sum(one[field.name] for one in found) for field in fields(Speed)})


class PromptSuite:
    """Prompts that are answered and scored.

    Every suite does one process's share of the work (`work`), tells what it asks (`asked`) and, once all shares are
    done, what came out (`results`); see also [`~hf_longalign.evaluation.harness.HarnessSuite`] and
    [`~hf_longalign.evaluation.perplexity.PerplexitySuite`].

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
        prompts, _ = self.make(task, [length], samples) if self.make else ([], {})
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
