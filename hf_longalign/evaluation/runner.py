"""Asking a model all prompts once: what is on disk is not asked again, several processes share the rest."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from typing import Any, Protocol

from tqdm.auto import tqdm

from hf_longalign.evaluation.prompt import Completion, GenerationStats, Prompt
from hf_longalign.evaluation.store import ResultStore
from hf_longalign.records.report import Speed


class Generator(Protocol):
    """Answers prompts greedily, each as soon as it is answered, and counts in `stats` what that takes."""

    stats: GenerationStats

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Yield each prompt with its completion, in any order."""
        ...


class Examinee:
    """A model under evaluation: a label for readers, an identity for the disk, and what answers.

    Args:
        label: what tables and plots call it, such as "base" or "adapter".
        identity: what makes its answers its own (weights, revision, RoPE, precision); equal for equal models alone.
        generator: answers prompts.
        active: returns a context in which the generator speaks for this model, such as one that turns an adapter off.
        what: what it is, in words.
    """

    def __init__(
        self,
        label: str,
        identity: str,
        generator: Generator,
        active: Callable[[], AbstractContextManager[Any]] = nullcontext,
        what: str = "",
    ) -> None:
        self.label, self.identity, self.generator, self.active, self.what = label, identity, generator, active, what

    def key(self, unit: str) -> str:
        """Return the key under which the result of a unit of work (a prompt, a task, a document) is stored."""
        return f"{self.identity}/{unit}"


def share(prompts: Sequence[Prompt], rank: int, processes: int) -> list[Prompt]:
    """Return the prompts of one of several processes; those that share a haystack stay together.

    Example:

    >>> grid = [(i, d) for i in (0, 1) for d in (0.0, 1.0)]
    >>> prompts = [Prompt("needle", "single", i, "text", ("a",), 8, length=64, depth=d) for i, d in grid]
    >>> [(prompt.index, prompt.depth) for prompt in share(prompts, 1, 2)]
    [(1, 0.0), (1, 1.0)]
    """
    groups: dict[tuple, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.suite, prompt.task, prompt.length, prompt.index), []).append(prompt)
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

    Args:
        examinee: the model.
        prompts: all prompts, the same in every process.
        store: gets `{"text": …, "tokens": …, "cut": …, "spent": …}` under `examinee.key(prompt.key)`; `spent` is what
            it took, see [`GenerationStats`]. Prompts answered together share it by chance: only sums mean something.
        rank: number of this process.
        processes: number of processes.
        progress: show a bar per task, with the length and depth of the latest answer.
    """
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        mine = share([prompt for prompt in prompts if prompt.task == task], rank, processes)
        open_prompts = [prompt for prompt in mine if examinee.key(prompt.key) not in store]
        bar = tqdm(
            total=len(mine),
            initial=len(mine) - len(open_prompts),
            desc=f"{examinee.label}, {task}",
            unit="prompt",
            disable=not progress,
        )
        with bar, examinee.active():
            before = asdict(examinee.generator.stats)
            for prompt, completion in examinee.generator.generate(open_prompts):
                now = asdict(examinee.generator.stats)
                spent = {name: now[name] - before[name] for name in now}
                value = {**asdict(completion), "spent": spent}
                store.add(examinee.key(prompt.key), value)
                before = now
                bar.set_postfix_str(_place(prompt), refresh=False)
                bar.update()


def answers(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore) -> list[Completion]:
    """Return what a model answered to each prompt, waiting for the other processes where they are not done."""
    keys = [examinee.key(prompt.key) for prompt in prompts]
    store.wait_for(keys)
    values = [store.get(key) for key in keys]
    return [Completion(value["text"], value["tokens"], value["cut"]) for value in values]


def spent(examinee: Examinee, prompts: Sequence[Prompt], store: ResultStore) -> Speed:
    """Return what all answers took together, those of earlier runs and of other processes too, once all are there."""
    keys = [examinee.key(prompt.key) for prompt in prompts]
    store.wait_for(keys)
    found = [store.get(key)["spent"] for key in keys]
    return Speed(**{field.name: sum(one[field.name] for one in found) for field in fields(Speed)})


def _place(prompt: Prompt) -> str:
    length = "" if prompt.length is None else f"{prompt.length:,} tokens"
    return length if prompt.depth is None else f"{length}, depth {prompt.depth:.0%}"
