"""lm-eval's bridge: a task of our own really run, and tasks whose data are out of reach."""

import json
import logging
import random
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_llama, tiny_tokenizer


pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")

import lm_eval.tasks

from hf_longalign.endpoint import EndpointError
from hf_longalign.evaluation.endpoint import EndpointGenerator
from hf_longalign.evaluation.harness import (
    SHORT,
    HarnessResult,
    HarnessSuite,
    _tasks_of_lm_eval,
    needs_logprobs,
    run_harness,
)
from hf_longalign.evaluation.models import Examined
from hf_longalign.evaluation.runner import Examinee, ResultStore
from hf_longalign.records.report import Difference, TaskResult


TASK = """
task: towns
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {output_type}
test_split: test
num_fewshot: 0
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metadata:
  version: 1.0
"""
GENERATED = """
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOSEN = """
doc_to_choice: ["salt", "wool"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model():
    return tiny_llama(max_position_embeddings=4096)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def _answer(model, tokenizer, question):
    """What the model says by itself: eight tokens after the chat template."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def write_task(monkeypatch, tmp_path):
    """Writes the task "towns", which lm-eval then knows, and of its own "gsm8k" alone."""
    own = Path(lm_eval.tasks.__path__[0]) / "gsm8k"

    def write(rows, output_type="generate_until", more=GENERATED):
        data = tmp_path / "towns.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "towns.yaml").write_text(TASK.format(data=data, output_type=output_type, more=more))
        manager = lm_eval.tasks.TaskManager(include_path=[str(tmp_path), str(own)], include_defaults=False)
        monkeypatch.setattr("hf_longalign.evaluation.harness._tasks_of_lm_eval", lambda: manager)

    return write


def _run(model, tasks, **options):
    return list(run_harness(model, tiny_tokenizer(), tasks, **{"max_length": 2048, **options}))


def examined(model, who):
    return Examined(None, tiny_tokenizer(), None, model, who)


def test_generated_answers_are_the_model_s_own_with_and_without_an_adapter(write_task):
    tokenizer = tiny_tokenizer()
    adapted = get_peft_model(tiny_llama(max_position_embeddings=4096), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.eval()
    questions = [f"In year {year}, what did Ardel sell?" for year in range(4)]
    with adapted.disable_adapter():
        base_says = [_answer(adapted, tokenizer, question) for question in questions]
    adapter_says = [_answer(adapted, tokenizer, question) for question in questions]
    assert base_says[0] != adapter_says[0] and base_says[3] != adapter_says[3]
    # The base is right on the first three, the adapter on the last.
    answers = [*base_says[:3], adapter_says[3]]
    rows = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
    write_task(rows)
    (on,) = _run(adapted, ["towns"])
    with adapted.disable_adapter():
        (off,) = _run(adapted, ["towns"])
    assert (on.metric, on.value, off.value) == ("exact_match,none", 0.25, 0.75)
    assert (on.task, on.samples, on.cut, on.error) == ("towns", 4, 0, None)
    assert on.stderr == pytest.approx((0.25 * 0.75 / 3) ** 0.5)
    # A shorter limit asks the first questions alone; without the template the model says something else.
    with adapted.disable_adapter():
        (limited,) = _run(adapted, ["towns"], limit=2)
        (plain,) = _run(adapted, ["towns"], chat=False)
    assert (limited.value, limited.samples) == (1.0, 2)
    assert plain.value == 0.0


def test_prompts_longer_than_max_length_are_counted(model, write_task):
    question = "What did Ardel sell? " * 60
    tokens = len(tiny_tokenizer()(question)["input_ids"])
    rows = [{"question": question, "answer": "salt"}, {"question": "Short?", "answer": "wool"}]
    write_task(rows)
    (generated,) = _run(model, ["towns"], chat=False, max_length=tokens + 7)
    (fits,) = _run(model, ["towns"], chat=False, max_length=tokens + 8)
    assert (generated.cut, fits.cut) == (1, 0)
    write_task(rows, "multiple_choice", CHOSEN)
    (chosen,) = _run(model, ["towns"], chat=False, max_length=tokens // 2)
    assert chosen.cut == 2  # both choices of the long question
    assert chosen.metric == "acc,none"


def test_a_task_out_of_reach_says_so_and_the_rest_goes_on(model, write_task, caplog):
    write_task([{"question": "Short?", "answer": "wool"}])
    gone, there = _run(model, ["gsm8k", "towns"])
    (told,) = [record for record in caplog.records if record.levelname == "WARNING"]  # one line, no traceback
    assert told.getMessage() == f"gsm8k was not run: {gone.error}" and told.exc_info is None
    assert (gone.task, gone.value, gone.metric) == ("gsm8k", None, None)
    assert "openai/gsm8k" in gone.error
    assert "run it once where the Hub is reached, with the same HF_HOME, or leave it out" in gone.error
    assert (there.task, there.value, there.error) == ("towns", 0.0, None)


def test_a_suite_compares_shares_and_tries_again_what_failed(model, tmp_path, monkeypatch):
    found = {"base": HarnessResult("towns", metric="acc,none", value=0.25, stderr=0.1, samples=4, cut=2)}
    found["adapter"] = HarnessResult("towns", metric="acc,none", value=0.5, stderr=0.1, samples=4, cut=2)
    gone = HarnessResult("gsm8k", error="no network")
    asked = []

    def run(model, tokenizer, tasks, **options):
        asked.extend(tasks if speaking else [])
        return iter([found[speaking[-1]] if task == "towns" else gone for task in tasks]) if speaking else iter(())

    @contextmanager
    def as_(label):
        speaking.append(label)
        yield
        speaking.pop()

    speaking: list[str] = []
    monkeypatch.setattr("hf_longalign.evaluation.harness.run_harness", run)
    who = [Examinee(label, label, None, lambda label=label: as_(label)) for label in ("base", "adapter")]

    def evaluated():
        with ResultStore(tmp_path) as store:
            suite = HarnessSuite(["towns", "gsm8k"], examined(model, who), store, max_length=64)
            suite.work(who, store)
            return suite.results(who, store)

    results = evaluated()
    towns, gsm8k = results.tasks
    assert towns.differences == [Difference("adapter", "base", 0.25)] and towns.error is None
    assert towns.cut_prompts == 4 and "longer than the model's range" in towns.note
    assert gsm8k == TaskResult("gsm8k", error="no network")
    assert asked == ["towns", "towns", "gsm8k", "gsm8k"]
    assert evaluated() == results
    assert asked[4:] == ["gsm8k", "gsm8k"]  # what succeeded is not asked again
    monkeypatch.setattr("hf_longalign.evaluation.harness.version", lambda package: "99")
    evaluated()
    assert asked[6:] == ["towns", "towns", "gsm8k", "gsm8k"]  # another lm-eval may find another value


def test_where_all_scored_alike_the_interval_has_a_width(tmp_path):
    found = HarnessResult("gsm8k", metric="exact_match,strict-match", value=1.0, stderr=0.0, samples=4)
    examinee = Examinee("base", "id", None)
    with ResultStore(tmp_path) as store:
        suite = HarnessSuite(["gsm8k"], examined(tiny_llama(), [examinee]), store, max_length=512)
        store.add(suite._keys["base", "gsm8k"], [found.to_json()])
        (task,) = suite.results([examinee], store).tasks
    assert task.scores["base"].high == 1.0 and 0.3 < task.scores["base"].low < 0.6  # Wilson's, 4 of 4


def test_names_and_templates_are_checked_before_anything_runs(model):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"got 'gsm9k'\. Set it to one of gsm8k"):
        run_harness(model, tokenizer, ["gsm9k"], max_length=2048)
    with pytest.raises(ValueError, match="must name a task"):
        run_harness(model, tokenizer, [], max_length=2048)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        run_harness(model, tokenizer, ["gsm8k"], max_length=2048)


def test_lm_eval_knows_the_short_tasks():
    assert set(SHORT) <= set(_tasks_of_lm_eval().all_tasks)


def test_the_tokenizer_is_left_alone_and_questions_repeat(model, write_task):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    write_task([{"question": "Short?", "answer": "wool"}])
    list(run_harness(model, tokenizer, ["towns"], max_length=512))
    first = random.random()
    list(run_harness(model, tokenizer, ["towns"], max_length=512))
    assert random.random() == first
    assert tokenizer.pad_token is None


@contextmanager
def served(model, tokenizer, *, logprobs=True, key=None):
    """A server of a model as vLLM serves it; without `logprobs` it tells none, as most chat APIs do."""
    asked, lock = [], threading.Lock()

    def complete(body):
        ids = body["prompt"] if "prompt" in body else tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=False
        )  # fmt: skip
        ids = tokenizer(ids)["input_ids"] if isinstance(ids, str) else ids[0] if isinstance(ids[0], list) else ids
        if body.get("echo"):
            if not logprobs:
                raise ValueError("echo is not supported with logprobs")
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [None, *(float(logits[place, token]) for place, token in enumerate(ids[1:]))]
            top = [None, *({"best": float(row.max())} for row in logits[:-1])]
            return {"text": "", "logprobs": {"token_logprobs": [*own, -1.0], "top_logprobs": [*top, {"best": -1.0}]}}
        out = model.generate(torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False)
        return {"text": tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers.get("Authorization")))
            try:
                if key and self.headers["Authorization"] != f"Bearer {key}":
                    raise ValueError(f"no such key: {self.headers['Authorization']}")
                with lock, torch.no_grad():
                    choice = complete(body)
                choice["message"] = {"role": "assistant", "content": choice["text"]}
                self._send(200, {"choices": [{"index": 0, "finish_reason": "stop", **choice}]})
            except ValueError as error:
                self._send(400, {"error": {"message": str(error)}})

        def do_GET(self):
            self._send(200, {"data": [{"id": "tiny"}]})

        def _send(self, status, data):
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield EndpointGenerator("tiny", f"http://127.0.0.1:{server.server_port}", max_concurrency=3), asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def senders():
    for module in ("tenacity", "aiohttp", "requests", "openai"):
        pytest.importorskip(module, reason='needs pip install "hf_longalign[eval,harness]"')


WORDS = ["salt", "wool", "glass", "copper", "honey", "tin"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_scores_as_the_model_itself(model, write_task, senders, chat):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|start|>"
    rows = [{"question": f"In year {n}, what did Ardel sell?", "answer": WORDS[n]} for n in range(6)]
    choices = f"\ndoc_to_choice: {json.dumps(WORDS)}\n"
    options = {"max_length": 512, "chat": chat}
    with served(model, tokenizer) as (generator, asked):
        # The Brier score is of the probabilities themselves, which equal choices would hide; `acc_norm` is of lengths.
        for metric in ("brier_score", "acc_norm"):
            write_task(rows, "multiple_choice", f"{choices}metric_list:\n  - metric: {metric}\n")
            asked.clear()
            (local,), (found,) = (
                list(run_harness(one, tokenizer, ["towns"], **options)) for one in (model, generator)
            )
            assert found.error is None and found.metric == local.metric == f"{metric},none"
            assert found.value == pytest.approx(local.value, abs=1e-5)
            assert {path for path, _, _ in asked} == {"/v1/completions"} and len(asked) == 1 + 36
        # What the model says by itself is right for the first four.
        said = [_answer(model, tokenizer, row["question"]) for row in rows]
        rows = [{**row, "answer": said[n] if n < 4 else "no"} for n, row in enumerate(rows)]
        write_task(rows)
        asked.clear()
        (local,), (found,) = (list(run_harness(one, tokenizer, ["towns"], **options)) for one in (model, generator))
        assert local.value == found.value == (4 / 6 if chat else 0.0) and found.samples == 6
        assert {path for path, _, _ in asked} == {"/v1/chat/completions" if chat else "/v1/completions"}
        assert all(body["temperature"] == 0 and body["max_tokens"] == 8 for _, body, _ in asked)


def test_a_server_without_logprobs_is_refused_by_name_before_anything_is_asked(model, write_task, senders):
    write_task([{"question": "Short?", "answer": "wool"}], "multiple_choice", CHOSEN)
    with served(model, tiny_tokenizer(), logprobs=False) as (generator, asked):
        with pytest.raises(
            ValueError, match=r"`short_tasks` .* got 'towns'.*HTTP 400: .*echo is not supported"
        ) as told:
            run_harness(generator, tiny_tokenizer(), ["towns", "gsm8k"], max_length=512)
        assert len(asked) == 1 and "Set tasks that generate" in str(told.value)
        # As it says: what generates goes.
        write_task([{"question": "Short?", "answer": "wool"}])
        (found,) = run_harness(generator, tiny_tokenizer(), ["towns"], max_length=512)
        assert found.value == 0.0 and found.error is None
    gone = EndpointGenerator("tiny", generator.endpoint.name)
    with pytest.raises(EndpointError, match="cannot be reached"):
        run_harness(gone, tiny_tokenizer(), ["towns"], max_length=512)


def test_the_key_is_sent_and_never_shown(model, write_task, senders, monkeypatch, caplog):
    monkeypatch.setattr("hf_longalign.evaluation.harness._ATTEMPTS", 2)
    write_task([{"question": "Short?", "answer": "wool"}])
    for key, right in (("sk-right", True), ("sk-wrong", False)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with served(model, tiny_tokenizer(), key="sk-right") as (generator, asked), caplog.at_level(logging.DEBUG):
            (found,) = run_harness(generator, tiny_tokenizer(), ["towns"], max_length=512)
        assert asked[-1][2] == f"Bearer {key}" and (found.error is None) == right
    assert "no such key" in caplog.text and "sk-" not in caplog.text + found.error


def test_a_suite_of_a_server_that_has_answered_asks_nothing_more(model, tmp_path, write_task, senders):
    write_task([{"question": "Short?", "answer": "wool"}])
    with served(model, tiny_tokenizer()) as (generator, asked), ResultStore(tmp_path / "answers") as store:
        who = [Examinee("base", "id", generator)]
        for _ in range(2):
            suite = HarnessSuite(["towns"], examined(None, who), store, max_length=512)
            suite.work(who, store)
            (task,) = suite.results(who, store).tasks
            assert task.samples == 1 and len(asked) == 1


def test_which_tasks_need_logprobs_is_known_without_their_data():
    manager = _tasks_of_lm_eval()
    needed = {name for name in (*SHORT, "bbh", "arc_easy", "ai2_arc", "mmlu", "leaderboard", "squadv2", "wikitext")
              if needs_logprobs(manager, name)}  # fmt: skip
    assert needed == {"arc_easy", "ai2_arc", "mmlu", "leaderboard", "squadv2", "wikitext"}


def test_without_lm_eval_its_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with ResultStore(tmp_path / "answers") as store, pytest.raises(ImportError, match=r"hf_longalign\[harness\]"):
        HarnessSuite(["gsm8k"], examined(tiny_llama(), []), store)
