"""lm-eval's bridge: a task of our own really run, and tasks whose data are out of reach."""

import json
import random
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_llama, tiny_tokenizer


pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")

from hf_longalign.evaluation.harness import SHORT, HarnessResult, HarnessSuite, _tasks_of_lm_eval, run_harness
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


def _task(folder, rows, output_type="generate_until", more=GENERATED):
    data = folder / "towns.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "towns.yaml").write_text(TASK.format(data=data, output_type=output_type, more=more))
    return folder


def _run(model, tasks, **options):
    return list(run_harness(model, tiny_tokenizer(), tasks, **{"max_length": 2048, "batch_size": 2, **options}))


def test_generated_answers_are_the_model_s_own_with_and_without_an_adapter(model, tmp_path):
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
    _task(tmp_path, rows)
    (on,) = _run(adapted, ["towns"], include_path=tmp_path)
    with adapted.disable_adapter():
        (off,) = _run(adapted, ["towns"], include_path=tmp_path)
    assert (on.metric, on.value, off.value) == ("exact_match,none", 0.25, 0.75)
    assert (on.task, on.samples, on.n_shot, on.cut, on.error) == ("towns", 4, 0, 0, None)
    assert on.stderr == pytest.approx((0.25 * 0.75 / 3) ** 0.5)
    assert on.metrics == {"exact_match,none": 0.25}
    assert on.version.startswith("0.4")
    # A shorter limit asks the first questions alone; without the template the model says something else.
    with adapted.disable_adapter():
        (limited,) = _run(adapted, ["towns"], include_path=tmp_path, limit=2)
        (plain,) = _run(adapted, ["towns"], include_path=tmp_path, chat=False)
    assert (limited.value, limited.samples) == (1.0, 2)
    assert plain.value == 0.0


def test_prompts_longer_than_max_length_are_counted(model, tmp_path):
    question = "What did Ardel sell? " * 60
    tokens = len(tiny_tokenizer()(question)["input_ids"])
    rows = [{"question": question, "answer": "salt"}, {"question": "Short?", "answer": "wool"}]
    _task(tmp_path, rows)
    (generated,) = _run(model, ["towns"], include_path=tmp_path, chat=False, max_length=tokens + 7)
    (fits,) = _run(model, ["towns"], include_path=tmp_path, chat=False, max_length=tokens + 8)
    assert (generated.cut, fits.cut) == (1, 0)
    _task(tmp_path, rows, "multiple_choice", CHOSEN)
    (chosen,) = _run(model, ["towns"], include_path=tmp_path, chat=False, max_length=tokens // 2)
    assert chosen.cut == 2  # both choices of the long question
    assert chosen.metric == "acc,none"


def test_a_task_out_of_reach_says_so_and_the_rest_goes_on(model, tmp_path, caplog):
    _task(tmp_path, [{"question": "Short?", "answer": "wool"}])
    gone, there = _run(model, ["gsm8k", "towns"], include_path=tmp_path)
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
            suite = HarnessSuite(["towns", "gsm8k"], model, tiny_tokenizer(), store, who, max_length=64)
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


def test_where_all_scored_alike_the_interval_has_a_width(tmp_path):
    found = HarnessResult("gsm8k", metric="exact_match,strict-match", value=1.0, stderr=0.0, samples=4)
    examinee = Examinee("base", "id", None)
    with ResultStore(tmp_path) as store:
        suite = HarnessSuite(["gsm8k"], tiny_llama(), tiny_tokenizer(), store, [examinee], max_length=512)
        store.add(suite._keys["base", "gsm8k"], [asdict(found)])
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


def test_the_tokenizer_is_left_alone_and_questions_repeat(model, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    _task(tmp_path, [{"question": "Short?", "answer": "wool"}])
    list(run_harness(model, tokenizer, ["towns"], max_length=512, include_path=tmp_path))
    first = random.random()
    list(run_harness(model, tokenizer, ["towns"], max_length=512, include_path=tmp_path))
    assert random.random() == first
    assert tokenizer.pad_token is None
