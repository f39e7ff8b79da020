"""What lm-eval asks: a model that is loaded here, or one that a server answers for."""

import copy
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_longalign.endpoint.address import redact
from hf_longalign.evaluation.endpoint import EndpointGenerator
from hf_longalign.lazy import require


logger = logging.getLogger(__name__)

# Requests that are sent again, with pauses of up to ten seconds.
_ATTEMPTS = 8


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

    class Text(LocalCompletionsAPI):
        cut = 0

    class Messages(LocalChatCompletion):
        cut = 0

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
        return Messages(base_url=f"{endpoint.name}/chat/completions", **asked)
    return (Tokens if by_tokens else Text)(base_url=f"{endpoint.name}/completions", **asked)


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
