"""Tasks of short contexts through lm-eval, on a model that is loaded or served: what the training costs there.

Each task stands by itself: one whose data cannot be fetched gives a result that says so, and the rest goes on.
Source: https://github.com/EleutherAI/lm-evaluation-harness.
"""

import copy
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import combinations, count, product
from numbers import Real
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_longalign.endpoint.address import redact
from hf_longalign.evaluation.endpoint import EndpointGenerator
from hf_longalign.evaluation.intervals import Z, mean_interval
from hf_longalign.evaluation.models import Examined
from hf_longalign.evaluation.options import SHORT
from hf_longalign.evaluation.results import group_means
from hf_longalign.evaluation.runner import Examinee, ResultStore
from hf_longalign.lazy import require
from hf_longalign.records.base import Record
from hf_longalign.records.report import Difference, Score, SuiteResult, TaskResult


logger = logging.getLogger(__name__)

# Requests that are sent again, with pauses of up to ten seconds.
_ATTEMPTS = 8


@dataclass(frozen=True)
class HarnessResult(Record):
    """What lm-eval found on one task or group, by its name for it."""

    task: str
    metric: str | None = None  # the first one, with a filter behind a comma, such as "exact_match,strict-match"
    value: float | None = None  # 0 to 1 for all tasks of `SHORT`; `None` where the task was not run
    stderr: float | None = None  # standard error, where lm-eval gives one
    samples: int = 0  # questions asked
    cut: int = 0  # prompts longer than the range, which lose their beginning; above 0 the value means little
    error: str | None = None  # why the task was not run, and what to do


def run_harness(
    model: PreTrainedModel | PeftModel | EndpointGenerator,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    max_length: int,
    limit: int | None = None,
    chat: bool = True,
) -> Iterator[HarnessResult]:
    """Check the arguments, then yield the result of each task as soon as it is there.

    Args:
        model: loaded, with its adapter in force unless the caller has turned it off; or a served one.
        tasks: names of lm-eval's tasks and groups.
        max_length: tokens the model reads and writes together.
        limit: questions of each task (of each member of a group), the first ones; `None`: all.

    Raises:
        ValueError: an unknown task, with names close to it; no chat template; a task that needs log-probabilities of
            a server that does not tell them.
    """
    names = list(dict.fromkeys(tasks))
    if chat and not tokenizer.chat_template:
        raise ValueError("`chat=True` needs a tokenizer with a chat template, got one without. Set `chat` to False.")
    lm_eval, manager = require("lm_eval", "harness"), _tasks_of_lm_eval()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks) or [*SHORT, "…"]
            raise ValueError(
                f"`short_tasks` must hold names that lm-eval {lm_eval.__version__} knows, got {name!r}. Set it to one "
                f"of {', '.join(close)}; `lm-eval ls tasks` lists all."
            )
    if not names:
        raise ValueError(f"`short_tasks` must name a task, got none. Set it to {SHORT[0]!r}, for instance.")
    if isinstance(model, EndpointGenerator):
        model.check()
        secrets = model.endpoint.secrets
        compared = [name for name in names if needs_logprobs(manager, name)]
        if compared:
            check_logprobs(model, tokenizer, compared[0])
        with alone(secrets):
            lms = {
                name: served_lm(model, tokenizer, max_length, chat=chat, by_tokens=name in compared) for name in names
            }
    else:
        secrets = []
        with alone():
            lms = dict.fromkeys(names, loaded_lm(model, tokenizer, max_length))

    def run(name: str) -> list[HarnessResult]:
        lm = lms[name]
        lm.cut = 0
        asked = {"tasks": [name], "task_manager": manager, "limit": limit, "apply_chat_template": chat}
        try:
            # In a thread: lm-eval starts an event loop for requests, and the caller may have one running (notebooks).
            with alone(secrets), ThreadPoolExecutor(1) as thread:
                found = thread.submit(lm_eval.simple_evaluate, lm, **asked, log_samples=False).result()
        except Exception as error:  # each task's code and data raise their own; the others go on
            reason = next((line for line in str(error).splitlines() if line.strip()), "no message")[:300].rstrip(".")
            told = (
                f"{type(error).__name__}: {reason}. If its data could not be fetched, run it once "
                "where the Hub is reached, with the same HF_HOME, or leave it out."
            )
            logger.warning("%s was not run: %s", name, told)
            logger.debug("lm-eval's error in %s", name, exc_info=True)
            return [HarnessResult(name, error=told)]
        if lm.cut:
            logger.warning("%s: %d prompts are longer than `max_length` and lost their beginning", name, lm.cut)
        return _read(name, found, lm.cut)

    return (result for name in names for result in run(name))


def _read(name: str, found: Mapping[str, Any], cut: int) -> list[HarnessResult]:
    """What lm-eval's tables of results say of a task, or of all that a tag or a group stands for."""
    # Metrics are called "name,filter", and their standard errors stand among them as "name_stderr,filter".
    by_task = {
        task: {
            key: float(value)
            for key, value in values.items()
            if "," in key and not key.split(",")[0].endswith("_stderr") and isinstance(value, Real)
        }
        for task, values in found["results"].items()
    }
    # A group without an average of its own, and a tag, stand for their tasks.
    tasks = [name] if by_task.get(name) else [task for task, metrics in by_task.items() if metrics]
    samples = {task: counts["effective"] for task, counts in found["n-samples"].items()}
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
                samples=samples.get(task, sum(samples.values())),
                cut=cut,
            )
        )
    return results


class HarnessSuite:
    """Short-context tasks of lm-eval, each once per model; those that failed in an earlier run are tried again.

    `options` are those of [`run_harness`].
    """

    name = "short"

    def __init__(self, tasks: Sequence[str], examined: Examined, store: ResultStore, **options: Any) -> None:
        require("lm_eval", "harness")  # before its version is asked for
        self.examined, self.options = examined, options
        self.tasks = list(dict.fromkeys(tasks))
        self._keys: dict[tuple[str, str], str] = {}
        for who, (task, unit) in product(examined.who, zip(self.tasks, self.asked(), strict=True)):
            # The first attempt that is not there yet or did not fail.
            keys = (who.key(f"{unit}/{attempt}") for attempt in count())
            self._keys[who.label, task] = next(
                key for key in keys if key not in store or not any(one.get("error") for one in store.get(key))
            )
        # Names, and what servers can do, before anything is asked; a server that has answered all is left alone.
        for who in examined.who[:1] if examined.model is not None else examined.who:
            if examined.model is not None or store.missing(self.keys([who])):
                self._run(who, self.tasks)

    def work(self, examinees: Sequence[Examinee], store: ResultStore) -> None:
        """Run the tasks that no other process is at."""
        jobs = {self._keys[who.label, task]: (who, task) for task in self.tasks for who in examinees}
        for keys in store.open_keys([[key] for key in jobs]):
            bar = tqdm(keys, desc=self.name, unit="task", disable=not store.is_main)
            for key in bar:
                examinee, task = jobs[key]
                bar.set_postfix_str(f"{examinee.label}, {task}")
                with examinee.active():
                    store.add(key, [result.to_json() for result in self._run(examinee, [task])])

    def keys(self, examinees: Sequence[Examinee]) -> list[str]:
        """Return the keys of all results."""
        return [self._keys[examinee.label, task] for examinee in examinees for task in self.tasks]

    def asked(self) -> list[str]:
        """Return the tasks with lm-eval's version and what their questions depend on."""
        return [f"lm-eval/{version('lm-eval')}/{self.options}/{task}" for task in self.tasks]

    def results(self, examinees: Sequence[Examinee], store: ResultStore) -> SuiteResult:
        """Return the value of every task with the interval of its standard error, or why it was not run."""
        found: dict[str, dict[str, HarnessResult]] = {}
        for task in self.tasks:
            for examinee in examinees:
                for value in store.get(self._keys[examinee.label, task]):
                    result = HarnessResult.from_json(value)
                    found.setdefault(result.task, {})[examinee.label] = result
        tasks = [_task_result(name, by_label) for name, by_label in found.items()]
        return SuiteResult(self.name, tasks, group_means(tasks, {}))

    def _run(self, examinee: Examinee, tasks: Sequence[str]) -> Iterator[HarnessResult]:
        model: Any = examinee.generator if self.examined.model is None else self.examined.model
        return run_harness(model, self.examined.tokenizer, tasks, **self.options)


def _task_result(task: str, by_label: Mapping[str, HarnessResult]) -> TaskResult:
    done = {label: found for label, found in by_label.items() if found.value is not None}
    first = next(iter(done.values()), None)
    cut = sum(found.cut for found in done.values())
    scores = {}
    for label, found in done.items():
        value, error = float(found.value or 0), found.stderr
        if error == 0:  # all questions scored alike, which few questions easily do: no proof that others would
            scores[label] = Score(value, *mean_interval([value] * found.samples))
        elif error is None:
            scores[label] = Score(value)
        else:
            scores[label] = Score(value, max(0.0, value - Z * error), min(1.0, value + Z * error))
    return TaskResult(
        task,
        metric=first.metric if first else None,
        samples=first.samples if first else 0,
        scores=scores,
        # lm-eval keeps no answers here, so the difference has no interval of its own.
        differences=[
            Difference(label, reference, scores[label].value - scores[reference].value)
            for reference, label in combinations(scores, 2)
        ],
        cut_prompts=cut,
        error=next((found.error for found in by_label.values() if found.error), None),
        note="prompts longer than the model's range lost their beginning" if cut else None,
    )


@cache
def _tasks_of_lm_eval() -> Any:
    """All tasks lm-eval comes with; reading their thousands of files takes seconds, so it is done once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def loaded_lm(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, room: int) -> Any:
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
            # lm-eval would cut here without a word; so it is asked not to, and the same is done after counting.
            token_ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
            if not left_truncate_len:
                return token_ids, mask
            self.cut += int((mask.sum(dim=1) > left_truncate_len).sum())
            return token_ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

        def _loglikelihood_tokens(self, requests: list, *args: Any, **options: Any) -> Any:
            self.cut += sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)
            return super()._loglikelihood_tokens(requests, *args, **options)

    # The tokenizer is copied because lm-eval gives it a padding token.
    return CountingLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer))


def served_lm(
    generator: EndpointGenerator, tokenizer: PreTrainedTokenizerBase, room: int, *, chat: bool, by_tokens: bool
) -> Any:
    """lm-eval's model at an endpoint.

    Tasks that only generate take the routes of the other suites: chat prompts as messages, plain ones as text. Those
    that compare log-likelihoods go `by_tokens`: they send tokens, and read what the server tells of each.
    """
    for module in ("tenacity", "aiohttp", "requests"):
        require(module, "harness")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    class Tokens(LocalCompletionsAPI):
        cut = 0

        def __init__(self, **asked: Any) -> None:
            super().__init__(**asked)
            # Given after the fact, for lm-eval would load a tokenizer by its name. It adds what the model expects at
            # the beginning of a text, as for a model that is loaded; lm-eval itself would leave it out here.
            self.tokenizer, self.tokenizer_backend, self.tokenized_requests = tokenizer, "huggingface", True
            self.add_bos_token = None

        def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **options: Any) -> Any:
            if isinstance(string, str):
                return HFLM.tok_encode(self, string, add_special_tokens)
            return [self.tok_encode(one, add_special_tokens) for one in string]

        def _loglikelihood_tokens(self, requests: list, **options: Any) -> Any:
            self.cut += sum(len(context or ()) + len(rest) > self.max_length for _, context, rest in requests)
            return super()._loglikelihood_tokens(requests, **options)

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> Any:
            for text, options in (request.args for request in requests):
                room = self.max_length - options.get("max_gen_toks", self._max_gen_toks)
                self.cut += len(self.tok_encode(text)) > room
            return super().generate_until(requests, disable_tqdm)

    endpoint = generator.endpoint
    scheme, key = ("Basic", endpoint.login) if endpoint.login else ("Bearer", endpoint.api_key)
    asked = {
        "model": generator.model,
        "tokenizer_backend": None,
        "max_length": room,
        "num_concurrent": generator.max_concurrency,
        "max_retries": _ATTEMPTS,
        "timeout": generator.timeout,
        # Never empty: lm-eval would send the key in OPENAI_API_KEY, whosever it is.
        "header": {"Authorization": f"{scheme} {key}"} if key else {"Accept": "application/json"},
    }
    if chat and not by_tokens:
        return LocalChatCompletion(base_url=f"{endpoint.name}/chat/completions", **asked)
    return (Tokens if by_tokens else LocalCompletionsAPI)(base_url=f"{endpoint.name}/completions", **asked)


def needs_logprobs(manager: Any, spec: str | Mapping[str, Any]) -> bool:
    """Whether a task of lm-eval, or one of a group's or tag's, does more than generate; unknown counts as yes.

    It is read from the tasks' files: to make a task itself its data would have to be fetched.
    """
    entry: Any = manager.task_index.get(spec) if isinstance(spec, str) else None
    if entry is not None and entry.kind.name == "TAG":
        members: Any = sorted(entry.tags)
    else:
        config = (entry.cfg or {}) if entry is not None else {} if isinstance(spec, str) else spec
        members = config.get("task")
        if not isinstance(members, list):
            # A member of a group may be another task with some settings changed.
            other = config.get("group") or members
            if "output_type" in config or entry is not None or other is None:
                return bool(config.get("output_type") != "generate_until")
            members = [other]
    return any(needs_logprobs(manager, member) for member in members)


def check_logprobs(generator: EndpointGenerator, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Refuse a task that compares log-likelihoods where a server does not tell those of a prompt's tokens.

    Raises:
        ValueError: names task and server, and what the server said.
    """
    lm = served_lm(generator, tokenizer, 16, chat=False, by_tokens=True)
    ids = tokenizer("one two three four", add_special_tokens=False)["input_ids"][:4]
    import requests

    body = lm._create_payload([ids])
    try:
        answer = requests.post(lm.base_url, json=body, headers=lm.header, timeout=lm.timeout)
        told = f"HTTP {answer.status_code}: {answer.text[:300]}"
        # Those of the prompt and of the one token that was asked for: lm-eval cuts by these places.
        if answer.ok and len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == len(ids) + 1:
            lm.parse_logprobs(answer.json(), ctxlens=[1])
            return
    except (requests.ConnectionError, requests.Timeout) as error:
        told = f"{type(error).__name__}, is it running?"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        told = "an answer without them"
    raise ValueError(
        f"`short_tasks` must be what the server can answer, got {task!r}, for which it must tell log-probabilities of "
        f"a prompt's tokens (/completions with `echo` and `logprobs`, as vLLM has). {generator.endpoint.name} said: "
        f"{redact(told, generator.endpoint.secrets)}. Set tasks that generate, such as gsm8k and ifeval, or evaluate "
        "the model itself, without `endpoint`."
    )


@contextmanager
def alone(secrets: Sequence[str] = ()) -> Iterator[None]:
    """lm-eval as in the only process, without its remarks on what is meant so; its `print` goes to stderr.

    `secrets` are kept out of what it says of requests that failed.
    """

    def tell(record: logging.LogRecord) -> bool:
        # Its errors hold the headers of the request, with the key; the warning before each holds the server's words.
        record.msg, record.args = redact(record.getMessage(), secrets), ()
        return record.levelno < logging.ERROR

    levels = {"lm_eval": logging.WARNING, "lm_eval.models.huggingface": logging.ERROR, "lm_eval.api": logging.ERROR}
    requests = logging.getLogger("lm_eval.models.api_models")
    requests.addFilter(tell)
    loggers = [] if logger.isEnabledFor(logging.DEBUG) else [logging.getLogger(name) for name in levels]
    before, rank = [one.level for one in loggers], os.environ.get("LOCAL_RANK")
    for one in loggers:
        one.setLevel(levels[one.name])
    # lm-eval gives results to the process with LOCAL_RANK 0 alone; here each process asks for its own tasks.
    os.environ["LOCAL_RANK"] = "0"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        requests.removeFilter(tell)
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
        os.environ.pop("LOCAL_RANK")
        os.environ.update({} if rank is None else {"LOCAL_RANK": rank})
