"""lm-eval's tasks as a suite of an evaluation: each task once per model, shared among processes."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_longalign.evaluation.harness import RULER_TASKS, SUITES, run_harness
from hf_longalign.evaluation.intervals import Z, mean_interval
from hf_longalign.evaluation.results import group_means
from hf_longalign.evaluation.runner import Examinee
from hf_longalign.evaluation.store import ResultStore


class HarnessSuite:
    """RULER or short-context tasks; those that failed in an earlier run are tried again.

    Every process must make it before any of them works: they agree on what an earlier run has left.

    Args:
        name: "ruler" or "short".
        tasks: lm-eval's names, or those of `SUITES`.
        model: what all examinees share.
        tokenizer: the model's.
        store: what earlier runs have found.
        max_length: tokens the model reads and writes together.
        lengths: of RULER's samples.
        limit: questions of each task; `None`: all.
        chat: go through the chat template.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[str],
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        store: ResultStore,
        examinees: Sequence[Examinee],
        *,
        max_length: int,
        lengths: Sequence[int] = (),
        limit: int | None = None,
        chat: bool = True,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.options: dict[str, Any] = {"max_length": max_length, "limit": limit, "chat": chat}
        named = list(dict.fromkeys(task for item in tasks for task in SUITES.get(item, (item,))))
        self.units: list[tuple[str, int | None]] = [
            (task, length) for task in named for length in (lengths if task in RULER_TASKS else [None])
        ]
        run_harness(model, tokenizer, named, ruler_lengths=list(lengths) or None, **self.options)  # checks the names
        self._keys = {
            (examinee.label, unit): self._first_open(examinee, unit, store)
            for examinee in examinees
            for unit in self.units
        }

    def work(self, examinees: Sequence[Examinee], store: ResultStore, *, rank: int, processes: int) -> None:
        """Run this process's share of the tasks."""
        jobs = [(examinee, unit) for unit in self.units for examinee in examinees]
        bar = tqdm(jobs[rank::processes], desc=self.name, unit="task", disable=rank != 0)
        for examinee, unit in bar:
            key = self._keys[examinee.label, unit]
            bar.set_postfix_str(f"{examinee.label}, {_title(*unit)}")
            if key not in store:
                with examinee.active():
                    store.add(key, [asdict(result) for result in self._run(*unit)])

    def asked(self) -> list[str]:
        """Return the tasks with lm-eval's version and what their questions depend on."""
        return [f"lm-eval/{version('lm-eval')}/{self.options}/{unit}" for unit in self.units]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> dict[str, Any]:
        """Return the value of every task with the interval of its standard error, or why it was not run."""
        store.wait_for(self._keys.values())
        tasks: dict[str, dict[str, Any]] = {}
        for unit in self.units:
            for examinee in examinees:
                for found in store.get(self._keys[examinee.label, unit]):
                    name = _title(found["task"], found["length"])
                    task = tasks.setdefault(name, {"task": name, "metric": None, "samples": 0, "scores": {}})
                    if found["length"] is not None:
                        task["length"] = found["length"]
                    if found["error"] is not None:
                        task["error"] = found["error"]
                        continue
                    # RULER's metrics are called by their length in lm-eval.
                    metric = found["metric"] if found["length"] is None else "string_match"
                    task.update(metric=metric, samples=found["samples"])
                    if found["cut"]:
                        task["note"] = (
                            f"{found['cut']:,} prompts were longer than the model's range and lost their beginning"
                        )
                    task["scores"][examinee.label] = _with_error(found["value"], found["stderr"], found["samples"])
        for task in tasks.values():
            values = [score["value"] for score in task["scores"].values()]
            if len(values) == len(examinees) == 2:
                task["difference"] = {"value": values[1] - values[0]}
        done = [task for task in tasks.values() if len(task["scores"]) == len(examinees)]
        return {
            "suite": self.name,
            "metric": None,
            "tasks": list(tasks.values()),
            "groups": group_means(done, {}),
        }

    def _run(self, task: str, length: int | None) -> Iterator[Any]:
        ruler_lengths = None if length is None else [length]
        return run_harness(self.model, self.tokenizer, [task], ruler_lengths=ruler_lengths, **self.options)

    def _first_open(self, examinee: Examinee, unit: tuple[str, int | None], store: ResultStore) -> str:
        """The key of a unit's result: the first attempt that is not there yet or did not fail."""
        attempt = 0
        while True:
            key = examinee.key(f"lm-eval/{self.options}/{unit}/{attempt}")
            if key not in store or not any(result["error"] for result in store.get(key)):
                return key
            attempt += 1


def _title(task: str, length: int | None) -> str:
    return task if length is None else f"{task}, {length:,} tokens"


def _with_error(value: float, stderr: float | None, samples: int) -> dict[str, float]:
    if stderr is None:
        return {"value": value}
    if stderr == 0:  # all questions scored alike, which few questions easily do: no proof that others would
        low, high = mean_interval([value] * samples)
        return {"value": value, "low": low, "high": high}
    return {"value": value, "low": max(0.0, value - Z * stderr), "high": min(1.0, value + Z * stderr)}
