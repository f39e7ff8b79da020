"""Options that no other test gives: each reaches what it is for."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from fake_endpoint import FakeEndpoint
from loopback_hub import as_default
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, set_seed

from hf_longalign import ContextSynthesisBuilder
from hf_longalign.cli import main
from hf_longalign.commands import sft
from hf_longalign.commands.sft import DataOptions
from hf_longalign.evaluation import evaluate, models, suites
from hf_longalign.evaluation.options import ModelOptions, SuiteOptions
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.training_options import TrainingOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(initializer_range=0.3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count):
    return [{"instruction": f"What did town {n} sell?", "answer": f"ware {n}"} for n in range(count)]


def test_a_data_set_is_read_at_its_revision(monkeypatch):
    asked = {}
    rows = DatasetDict(train=Dataset.from_list([{"text": "a"}]))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: asked.update(options, args=args) or rows)
    sft.read_dataset(DataOptions(dataset_name="org/rows", dataset_config="chat", dataset_revision="v2"))
    assert asked == {"args": ("org/rows", "chat"), "revision": "v2", "streaming": False}


def test_an_adapter_is_merged_at_its_revision_into_the_base_named(monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr("hf_longalign.merge.merge_adapter", lambda *args, **options: asked.update(options, args=args))
    words = ("--base_model", "org/base", "--adapter_revision", "v2", "--dtype", "bfloat16", "--max_shard_size", "1GB")
    assert main(["merge", "user/adapter", "out", *words, "--no_known_answers"]) == 0
    named = {"base_model": "org/base", "revision": "v2", "dtype": "bfloat16", "max_shard_size": "1GB"}
    assert asked == {"args": ("user/adapter", "out"), "known_answers": False, **named}
    assert capsys.readouterr().out == "Wrote out\n"


def test_a_private_repository_is_made_private(tmp_path, monkeypatch):
    chat = tmp_path / "rows" / "chat"
    Dataset.from_list([{"messages": []}]).to_parquet(chat / "train-00000-of-00001.parquet")
    (tmp_path / "rows" / "README.md").write_text("# Rows\n")
    with as_default(monkeypatch) as hub:
        words = ("--hub_model_id", "user/rows", "--hub_private_repo", "true")
        assert main(["push", str(tmp_path / "rows"), *words]) == 0
        assert hub.repos["datasets", "user/rows"].private


def plan(capsys, *words):
    assert main(["synthesize", "--dry_run", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_plan_counts_what_is_asked(tmp_path, capsys):
    seeds = write(tmp_path / "pairs.jsonl", pairs(8))
    common = ("--generator", "openai", "--model", "tiny", "--cache_dir", tmp_path)
    few = plan(capsys, *common, "--seeds", seeds, "--seeds_per_task", 3, "--n_distractors", 2)
    assert "seeds      3: " in few and "requests   3 context" in few
    answers = ("--difficulty", "closed_book", "--difficulty_samples", 2)
    assert "16 closed_book" in plan(capsys, *common, "--seeds", seeds, "--n_distractors", 2, *answers)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(" ".join(f"Mill {n} of {name} was sold." for n in range(400)))
    drawn = ("--documents", tmp_path / "*.txt", "--chunk_words", 200, "--pairs_per_document", 2)
    assert "4 pair" in plan(capsys, *common, "--method", "instruction", "--n_distractors", 0, *drawn)


def test_a_budget_in_dollars_stops_the_run(tmp_path, capsys):
    seeds = write(tmp_path / "pairs.jsonl", pairs(12))
    with FakeEndpoint() as server:
        words = f"--generator openai --model tiny --endpoints {server.url} --seeds {seeds} --checks duplicate"
        words += f" --max_tokens 200 --prompt_price 10 --completion_price 10 --cache_dir {tmp_path / 'cache'}"
        words += f" --n_distractors 3 --budget_usd 0.03 --output_dir {tmp_path / 'out'}"
        assert main(["synthesize", *words.split()]) == 1
        assert 0 < len(server.log) < 12
    assert "Stopped: " in capsys.readouterr().err


def test_another_model_judges(tmp_path):
    rows = [
        {**pair, "context": f"Town {n} is old. Its people live of what they make."} for n, pair in enumerate(pairs(3))
    ]
    seeds = write(tmp_path / "pairs.jsonl", rows)
    with FakeEndpoint(model="judge", reply=lambda body: "supported") as server:
        words = f"--seeds {seeds} --checks support judge --judge_model judge --judge_endpoints {server.url}"
        words += f" --n_distractors 1 --cache_dir {tmp_path / 'cache'} --output_dir {tmp_path / 'out'}"
        assert main(["synthesize", *words.split()]) == 0
        assert len(server.log) == 3 and {entry.body["model"] for entry in server.log} == {"judge"}


def test_a_local_model_tells_how_difficult_seeds_are(tmp_path, model):
    given = [{**pair, "context": f"It is {pair['answer']} that was sold. " * 8} for pair in pairs(6)]
    builder = ContextSynthesisBuilder(
        seeds=given, cache_dir=tmp_path, checks=["support"], n_distractors=1, show_progress=False,
        difficulty="answer_loss", difficulty_model=str(model), difficulty_use="select", difficulty_share=0.5,
    )  # fmt: skip
    builder.download_and_prepare()
    rows = builder.as_dataset(split="train")
    assert len(rows) == 3 and all(loss > 0 for loss in rows["answer_loss"])


def test_hard_distractors_are_found_by_an_encoder(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "encoder")
    set_seed(0)  # of some untrained encoders the texts are as near to numbers as to one another
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "encoder")
    texts = ["salt and wool at the fair. " * 9, "salt and wool at the market. " * 9, "1 2 3 4 5 6 7 8 9. " * 9]
    given = [
        {**pair, "context": f"It is {pair['answer']}. {text}"} for pair, text in zip(pairs(3), texts, strict=True)
    ]
    builder = ContextSynthesisBuilder(
        seeds=given, cache_dir=tmp_path, checks=["support"], n_distractors=1, show_progress=False,
        hard_share=1.0, embedding_model=str(tmp_path / "encoder"),
    )  # fmt: skip
    builder.download_and_prepare()
    row = builder.as_dataset(split="train")[0]
    assert "market" in row["messages"][0]["content"] and "1 2 3" not in row["messages"][0]["content"]


def test_suites_take_their_options(tmp_path, model, monkeypatch):
    questions = [
        {"question": f"Who sold ware {n}?", "answer": f"Town {n}", "context": f"Town {n} sold ware {n}."}
        for n in range(6)
    ]
    made = {}

    class Harness:
        name = "short"

        def __init__(self, tasks, *args, **options):
            made.update(tasks=tasks, limit=options["limit"])
            raise KeyboardInterrupt  # what it would do needs the Hub

    common = {"lengths": [768], "samples": 1, "max_new_tokens": 8}
    report = evaluate(
        str(model), suites=["puzzles", "ruler", "perplexity"], puzzles=["latest"], diagnose=True,
        ruler_tasks=["ruler_qa_squad"], ruler_questions=str(write(tmp_path / "squad.jsonl", questions)),
        limit=2, perplexity_window=256, output_dir=str(tmp_path / "report"), **common,
    )  # fmt: skip
    puzzles, ruler = report.suites
    assert puzzles.tasks[0].diagnosis and ruler.tasks[0].task == "ruler_qa_squad" and ruler.tasks[0].samples == 1
    assert report.settings["questions for RULER"] == "squad.jsonl" and report.perplexity.documents == 2
    monkeypatch.setattr(suites, "HarnessSuite", Harness)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            str(model), suites=["short"], short_tasks=["gsm8k"], limit=3, output_dir=str(tmp_path / "s"), **common
        )
    assert made == {"tasks": ["gsm8k"], "limit": 3}


def test_code_that_comes_with_a_model_runs_only_where_it_may(model, monkeypatch):
    asked = []

    def load(name, **options):
        asked.append(options["trust_remote_code"])
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    for trusted in (False, True):
        with pytest.raises(KeyboardInterrupt):
            models.Examined.load(ModelOptions(str(model), trust_remote_code=trusted))
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainingOptions(skip_strategy="skip-all"), "`skip_strategy` must be one of none, .*, cream, got 'skip-all'"),
        (SynthesisOptions(retries=None), "`retries` must be between 0 and 100, got None. Correct it, or leave it out"),
        (SynthesisOptions(target_tokens=0), "`target_tokens` must be at least 1, got 0"),
        (SuiteOptions(lengths=[1024, 0]), "`lengths` must be at least 1, got 0"),
        (SuiteOptions(puzzles="count"), "`puzzles` must be one of .*, got 'c'"),
        (
            ModelOptions("org/model", generator="vllm", vllm_options="x"),
            "`vllm_options` must be a JSON object, got 'x'",
        ),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused_with_its_name(options, message):
    with pytest.raises(ValueError, match=message):
        options.check()


def test_what_no_rule_forbids_is_taken():
    TrainingOptions(skip_strategy=lambda lengths, target_length, rng: None, rope_type=None).check()
    SynthesisOptions(seeds=["a.jsonl"], max_words=None, checks=[], min_words=np.int64(3)).check()
    ModelOptions("org/model", generator="vllm", vllm_options={"max_model_len": 512}).check()
