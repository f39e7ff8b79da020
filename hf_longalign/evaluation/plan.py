"""How many samples, at which lengths: as many as the time allows, and more where it helps."""

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, NamedTuple

import torch

from hf_longalign.evaluation.models import Examined
from hf_longalign.evaluation.options import SuiteOptions
from hf_longalign.evaluation.prompt import Prompt, encode_text
from hf_longalign.evaluation.runner import Examinee, ResultStore, spent
from hf_longalign.records.report import SuiteResult


logger = logging.getLogger(__name__)

# Samples that are enough to see a change of ten points, and the fewest that an interval can be made of.
MOST, FEWEST = 20, 3
# Tokens of the two texts by whose time the cost of a token, alone and by its distance to others, is known.
PROBES = (256, 1024)
# Tokens of an answer, and how many are written at once. Answers have 64 on average where a small model does not end.
ANSWER_TOKENS, ROWS = 64, 8
# The share of a needle prompt that is read anew, at the default depths: what two depths share is read once, so the
# first two are read whole and the others from 0.25, 0.5 and 0.75 on: (1 + 1 + 0.75 + 0.5 + 0.25) / 5.
NEEDLE_SHARE = 0.7
# The suites whose samples are planned; the others hold what they hold.
GRIDS = {"needle", "puzzles", "ruler"}
# Half the width of a 95 % interval below which more samples are not worth their time.
WIDTH = 0.03


class Cost(NamedTuple):
    """What a token costs in seconds."""

    read: float  # by itself
    pair: float  # for each token before it
    written: float

    def seconds(self, length: int, share: float = 1.0) -> float:
        """Return the seconds of a prompt of so many tokens, a share of which is read anew, with its answer."""
        return share * (self.read * length + self.pair * length**2) + ANSWER_TOKENS * self.written


@dataclass(frozen=True)
class Plan:
    """What is asked: lengths in tokens, samples of each task at each, and about how many minutes that takes."""

    lengths: list[int]
    samples: int
    minutes: float


def plan_grid(
    model: Any, names: Sequence[str], options: SuiteOptions, lengths: Sequence[int], store: ResultStore
) -> Plan:
    """Return the grid of an evaluation, and say what is left out of it.

    Samples that the options do not set are as many as `options.minutes` allow, 3 to 20; where not even 3 fit, the
    longest lengths are left out, which is said.

    A `model` of `None` is a server, whose speed is not known: 10 samples are asked. The store keeps what was decided,
    so that other processes, and the same command after a kill, ask the same.
    """
    if options.samples is not None or model is None or not GRIDS & set(options.suites):
        return Plan(list(lengths), options.samples or 10, 0.0)
    # A moved folder is the same evaluation; any other option makes another plan.
    asked = {name: value for name, value in asdict(options).items() if name != "output_dir"}
    key = f"plan/{json.dumps([asked, list(lengths), list(names)], sort_keys=True)}"
    grid = Plan(**store.once(key, lambda: fit(speed_of(model, names[0], store), len(names), options, lengths)))
    if store.is_main:
        shown = ", ".join(f"{length:,}" for length in grid.lengths)
        logger.info("%d samples of each task at %s tokens.", grid.samples, shown)
        gone = ", ".join(f"{length:,}" for length in lengths if length not in grid.lengths)
        if gone:
            logger.warning(
                "%s tokens are left out: they would take longer than `minutes` %g. Set `lengths` or more minutes.",
                gone,
                options.minutes,
            )
        if grid.minutes > options.minutes:
            logger.warning(
                "They take about %g min, longer than `minutes` %g: of fewer samples no interval can be made. Set more "
                "minutes, or ask less (`suites`, `needle_tasks`, `puzzles`, `lengths`).",
                grid.minutes,
                options.minutes,
            )
    return grid


def fit(cost: Cost, models: int, options: SuiteOptions, lengths: Sequence[int]) -> Plan:
    """Return the largest grid for so many models within the minutes of the options; the longest lengths go first.

    Example: half a millisecond a token, and two tasks of puzzles.

    >>> options = SuiteOptions(suites=["puzzles"], puzzles=["count", "latest"], minutes=1.0)
    >>> fit(Cost(0.0005, 0.0, 0.0), 1, options, [1024, 4096, 65536])
    Plan(lengths=[1024, 4096], samples=11, minutes=0.9)
    """
    kept = sorted(lengths)
    needles = len(options.needle_tasks) * len(options.depths) if "needle" in options.suites else 0
    others = [("puzzles", options.puzzles), ("ruler", options.ruler_tasks)]
    whole = sum(len(tasks) for suite, tasks in others if suite in options.suites)
    while True:
        times = (needles * cost.seconds(length, NEEDLE_SHARE) + whole * cost.seconds(length) for length in kept)
        each = models * sum(times) / 60
        samples = int(min(MOST, max(FEWEST, options.minutes / each)))
        if samples * each <= options.minutes or len(kept) == 1:
            return Plan(kept, samples, round(samples * each, 1))
        kept = kept[:-1]


def speed_of(model: Any, name: str, store: ResultStore) -> Cost:
    """Return what [`seconds_per_token`] found of a model on this machine, now or in an earlier run."""
    return Cost(*store.once(f"speed/{name}/{platform.node()}", lambda: seconds_per_token(model)))


def announce(examined: Examined, suites: Sequence[Any], store: ResultStore, minutes: float | None = None) -> None:
    """Say, in the main process, what is still to be asked and about how long one process takes for it.

    `minutes` are those until which more samples are asked where intervals are wide; `None`: no more are.
    """
    in_all = 0.0
    for suite in suites if store.is_main else ():
        left = set(store.missing(suite.keys(examined.who)))
        prompts = getattr(suite, "prompts", ())  # lm-eval alone knows its texts
        asked = [prompt for prompt in prompts for one in examined.who if one.key(prompt.key) in left]
        tokens, seconds = 0, 0.0
        for prompt in asked:
            length = prompt.length or len(encode_text(examined.tokenizer, prompt.text, chat=prompt.chat))
            tokens += length
            if examined.model is not None:  # the speed of a server is not known
                cost = speed_of(examined.model, examined.who[0].identity, store)
                seconds += cost.seconds(length, 1.0 if prompt.depth is None else NEEDLE_SHARE)
        in_all += seconds / 60
        if asked:
            time_told = f", about {seconds / 60:,.1f} min of one process" if seconds else ""
            logger.info("%s: %d prompts of %s tokens in all%s.", suite.name, len(asked), f"{tokens:,}", time_told)
        elif left:
            logger.info("%s: %d results are to be found.", suite.name, len(left))
    if in_all and minutes is not None and minutes > in_all:
        told = "In all about %.1f min, then more samples where intervals are wide, until %g min are over."
        logger.info(told, in_all, minutes)


@torch.inference_mode()
def seconds_per_token(model: Any) -> Cost:
    """Measure what a token costs."""
    times: list[float] = []
    cache: Any = None
    for tokens in (PROBES[0], *PROBES):  # the first one warms up
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        seconds, cache = _timed(model, input_ids=ids, use_cache=True)
        times.append(seconds)
    # Answers are written after a text that all their rows hold: on a CPU that costs more than the step itself.
    held: dict[str, Any] = {"use_cache": False}
    if hasattr(cache, "batch_repeat_interleave"):  # not a state of another kind
        cache.batch_repeat_interleave(ROWS)
        held = {"use_cache": True, "past_key_values": cache}
    written, _ = _timed(model, input_ids=ids[:, :1].expand(ROWS, 1), **held)
    # A token costs a fixed part and one that grows with the tokens before it: two lengths tell both.
    _, at_short, at_long = times
    short, long = PROBES
    pair = max(0.0, (at_long / long - at_short / short) / (long - short))
    return Cost(max(1e-9, at_short / short - pair * short), pair, written / ROWS)


def _timed(model: Any, **inputs: Any) -> tuple[float, Any]:
    """The seconds of a forward, and the cache it leaves."""
    start = time.perf_counter()
    output = model(**inputs, logits_to_keep=1)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, getattr(output, "past_key_values", None)


class Cell(NamedTuple):
    """A task at a length: the samples it shall have in all, and about how many seconds the new ones take."""

    task: str
    length: int
    samples: int
    seconds: float


def cells_to_refine(
    result: SuiteResult, prompts: Sequence[Prompt], costs: Mapping[int, float], seconds: float
) -> list[Cell]:
    """Return where more samples are worth their time: the shortest lengths first, as far as the seconds left reach.

    `costs` are seconds of a prompt by its length, all models together.
    """
    cells = []
    for task in result.tasks:
        for length, scores in task.scores_by_length.items():
            own = [prompt for prompt in prompts if prompt.task == task.task and prompt.length == length]
            present = len({prompt.index for prompt in own})
            half = max((score.high or 1.0) - (score.low or 0.0) for score in scores.values()) / 2
            # An interval narrows with the root of the samples. At most four times as many are asked at once, since
            # the width itself is known badly from few.
            wanted = min(ceil(present * (half / WIDTH) ** 2), 4 * present)
            if half > WIDTH and wanted > present:
                each = costs[length] * len(own) / present
                cells.append(Cell(task.task, length, wanted, (wanted - present) * each))
    kept = []
    for cell in sorted(cells, key=lambda cell: (cell.length, cell.task)):
        seconds -= cell.seconds
        if seconds < 0:
            break
        kept.append(cell)
    return kept


def seconds_per_prompt(
    examinees: Sequence[Examinee], prompts: Sequence[Prompt], store: ResultStore
) -> dict[int, float]:
    """Return what a prompt of each length took on average, all models together."""
    costs = {}
    for length in {prompt.length for prompt in prompts if prompt.length is not None}:
        own = [prompt for prompt in prompts if prompt.length == length]
        costs[length] = sum(spent(examinee, own, store).seconds for examinee in examinees) / len(own)
    return costs
