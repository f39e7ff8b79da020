import sys

from datasets import Dataset

from hf_longalign.cards.dataset import Cost, DataSource
from hf_longalign.endpoint.protocol import Reply, Request
from hf_longalign.synthesis.builder import ContextSynthesisConfig
from hf_longalign.synthesis.export import dataset_facts, export
from hf_longalign.synthesis.journal import Journal


TEXT = "The dam below the village of Thornwick was finished in the autumn of 1912, two years after the first stone."


CHECKS = [{"name": "control_tokens", "outcome": "passed", "detail": ""}]


def outcome(number, origin, **more):
    row = {"task": "general", "instruction": "Who?", "answer": "Ada", "context": TEXT, "origin": origin}
    return {**row, "prompt_hash": f"p{number}", "journal_keys": [], "seed_id": str(number), **more}


def chat(number, **more):
    messages = [{"role": "user", "content": f"{TEXT} Who?"}, {"role": "assistant", "content": "Ada"}]
    row = {
        "messages": messages,
        "task": "general",
        "total_tokens": 20 + number,
        "n_contexts": 2,
        "gold_depth": 0.5,
        "checks": CHECKS,
    }
    row["reference"] = None
    return {**row, **more}


def tables(chats, contexts, rejected=()):
    found = {"chat": {"train": Dataset.from_list(chats)}, "contexts": {"train": Dataset.from_list(contexts)}}
    return {**found, "rejected": {"train": Dataset.from_list(list(rejected))}} if rejected else found


def config(**options):
    return ContextSynthesisConfig(name="chat", generator="openai", model="m", **options)


def test_seeds_are_named_without_folders_and_counted_once(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    seeds = [f"qasper={tmp_path}/pairs.jsonl", "user/rows:v2@train"]
    contexts = [outcome(0, "pairs.jsonl:1"), outcome(1, "pairs.jsonl:2"), outcome(2, "rows:v2@train:1")]
    rejected = [outcome(1, "pairs.jsonl:2", reason="budget: 9 tokens"), outcome(3, "pairs.jsonl:3", reason="leak: it")]
    facts = dataset_facts(tables([chat(0)], contexts, rejected), config(seeds=seeds))
    assert facts.seeds == [DataSource("pairs.jsonl", 3, "general"), DataSource("user/rows", 1, "general", on_hub=True)]
    assert facts.rejected == {"budget": 1, "leak": 1} and facts.prompts[0] == 4
    assert dataset_facts(tables([chat(0)], contexts), config(seeds=[{"instruction": "a"}])).seeds == []


def test_lengths_fall_back_to_words_and_depths_need_distractors():
    rows = [chat(0), chat(5, n_contexts=1), chat(7)]
    facts = dataset_facts(tables(rows, [outcome(0, "a:1")]), config())
    assert (facts.lengths, facts.unit, facts.depths, facts.contexts) == ([20, 25, 27], "tokens", [0.5, 0.5], (1, 2))
    facts = dataset_facts(tables([chat(0), chat(0, total_tokens=None)], [outcome(0, "a:1")]), config())
    assert (facts.lengths, facts.unit) == ([22, 22], "words")


def test_cost_is_that_of_the_rows_and_left_out_where_replies_are_missing(tmp_path):
    requests = [Request((("user", text),), "m") for text in ("a", "b", "c")]
    with Journal(tmp_path / "journal.sqlite") as journal:
        for request in requests:
            journal.put(request, Reply("x", "stop", 100, 10, "m"))
    keys = [request.key for request in requests]
    contexts = [outcome(0, "a:1", journal_keys=keys[:1]), outcome(1, "a:2", journal_keys=keys[:2])]
    data = tables([chat(0)], contexts)
    path = tmp_path / "journal.sqlite"
    assert dataset_facts(data, config(), journal=path).cost == Cost(2, 200, 20)
    lost = tables([chat(0)], [outcome(0, "a:1", journal_keys=["gone"])])
    assert dataset_facts(lost, config(), journal=path).cost is None
    assert dataset_facts(data, config(), journal=tmp_path / "none").cost is None and not (tmp_path / "none").exists()


def test_without_matplotlib_the_card_goes_without_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = export(tmp_path / "out", tables([chat(0)], [outcome(0, "a:1")]), config())
    assert "The card goes without its picture." in caplog.text
    assert "assets" not in (folder / "README.md").read_text() and not (folder / "assets").exists()


def test_what_was_not_in_use_is_not_told():
    data = tables([chat(0)], [outcome(0, "a:1")])
    settings = dataset_facts(data, config()).settings
    assert not {"hard_share", "hard_by", "difficulty_use", "general_share", "test_share", "facts_first"} & set(
        settings
    )
    settings = dataset_facts(data, config(hard_share=0.5, test_share=0.1, checks=["leak"])).settings
    assert settings["hard_by"] == "bm25" and settings["test_share"] == 0.1 and "min_words" not in settings
    assert dataset_facts(data, config()).ngram is None


def test_prompts_are_longbenchs_where_nothing_had_to_be_named():
    rows = [chat(0, task="qasper"), chat(1, task="gov_report", reference="Report 3"), chat(2), chat(3, task="musique")]
    assert dataset_facts(tables(rows, [outcome(0, "a:1")]), config()).longbench_prompts == ["musique", "qasper"]


def test_rows_with_marks_made_words_of_are_counted():
    mended = [{"name": "control_tokens", "outcome": "neutralised", "detail": "1 in the seed"}]
    facts = dataset_facts(tables([chat(0), chat(1, checks=mended), chat(2)], [outcome(0, "a:1")]), config())
    assert facts.neutralised == 1
