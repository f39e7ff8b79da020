import json
import pickle
import re

import numpy as np
import pytest
from datasets import load_dataset

from hf_longalign.endpoint.protocol import RunStopped
from hf_longalign.synthesis.journal import Journal

from .fakes import GIVEN, PAIRS, FakeGenerator, build, made, make_pairs, make_text, rows


def check_row(row, texts):
    content = row["messages"][0]["content"]
    spans = [content[part["start"] : part["end"]] for part in row["parts"]]
    assert [part["kind"] for part in row["parts"]] == ["context"] * row["n_contexts"] + ["question"]
    assert all(part["message"] == 0 for part in row["parts"])
    assert row["messages"][1] == {"role": "assistant", "content": row["answer"]}
    assert row["context_ids"][row["gold_index"]] == row["seed_id"]
    assert len(set(row["context_ids"])) == row["n_contexts"]
    for span, source in zip(spans, row["context_ids"], strict=False):
        assert span == texts[source]
    assert spans[-1].endswith(f"Question: {row['instruction']}\n\nAnswer:")
    assert content.startswith("You are given a story") and content.endswith(spans[-1])


def test_contexts_are_written_checked_and_composed(tmp_path):
    generator = FakeGenerator()
    builder = build(tmp_path, generator=generator)
    texts = {pair["id"]: make_text(number) for number, pair in enumerate(PAIRS)}
    found = rows(builder)
    assert [row["seed_id"] for row in found] == [pair["id"] for pair in PAIRS]
    for row in found:
        check_row(row, texts)
        assert (row["generator"], row["model"], row["attempts"]) == ("fake", "fake", 1)
        assert {check["outcome"] for check in row["checks"]} <= {"passed", "open"}
        assert [check["name"] for check in row["checks"]][-2:] == ["duplicate", "conflict"]
    assert len({row["gold_index"] for row in found}) > 3
    assert len(generator.asked) == 24


def test_the_other_configurations_cost_nothing_again(tmp_path):
    generator = FakeGenerator(fail=[3, 4])
    build(tmp_path, generator=generator)
    asked = len(generator.asked)
    assert asked == 22 + 2 * 3
    contexts = rows(build(tmp_path, "contexts", generator=generator))
    rejected = rows(build(tmp_path, "rejected", generator=generator))
    assert len(contexts) == 22 and contexts[0]["title"] == "The dam of village 0" and contexts[0]["words"] > 50
    assert [row["seed_id"] for row in rejected] == ["narrativeqa-3", "narrativeqa-4"]
    assert rejected[0]["reason"].startswith('parse: "Context:" was missing') and rejected[0]["attempts"] == 3
    assert rejected[0]["origin"] == "seeds:4"
    build(tmp_path, generator=generator, n_distractors=2)
    assert len(generator.asked) == asked


@pytest.mark.parametrize("config_name", ["chat", "contexts", "rejected"])
def test_rows_are_the_same_for_any_number_of_processes_and_streamed(tmp_path, config_name):
    seeds = [pair if number % 7 else {**pair, "answer": "Rome"} for number, pair in enumerate(GIVEN)]
    bytes_of, streamed = [], None
    for num_proc in (None, 2, 3):
        folder = tmp_path / str(num_proc)
        builder = build(folder, config_name, num_proc, seeds=seeds, checks=["length", "support"])
        path = folder / "data.parquet"
        builder.as_dataset(split="train").to_parquet(path)
        bytes_of.append(path.read_bytes())
        streamed = list(builder.as_streaming_dataset(split="train"))
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]
    assert streamed == load_dataset("parquet", data_files=str(path), split="train").to_list()


def test_streaming_needs_no_preparation(tmp_path):
    generator = FakeGenerator()
    streamed = made(tmp_path, generator=generator).as_streaming_dataset()
    assert list(streamed["train"]) == rows(build(tmp_path, generator=generator)) and len(generator.asked) == 24


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path):
    whole = build(tmp_path / "whole", generator=FakeGenerator(fail=[5]))
    whole.as_dataset(split="train").to_parquet(tmp_path / "whole.parquet")
    asked = []
    for stop_after in (4, 7, 1, None):
        generator = FakeGenerator(fail=[5], stop_after=stop_after)
        try:
            builder = build(tmp_path / "parts", generator=generator)
        except RunStopped:
            assert stop_after is not None
        asked += [request.key for request in generator.asked]
    builder.as_dataset(split="train").to_parquet(tmp_path / "parts.parquet")
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert len(asked) == len(set(asked)) == 23 + 3


def test_two_journals_merged_give_the_rows_of_one(tmp_path):
    whole = rows(build(tmp_path / "whole", generator=FakeGenerator()))
    for part in (0, 1):
        half = PAIRS[part::2]
        build(tmp_path / f"half{part}", generator=FakeGenerator(), seeds=half, journal=tmp_path / f"{part}.sqlite")
    with Journal(tmp_path / "merged.sqlite") as journal:
        for part in (0, 1):
            journal.merge(tmp_path / f"{part}.sqlite")
    nobody = FakeGenerator(stop_after=0)
    merged = build(tmp_path / "merged", generator=nobody, journal=tmp_path / "merged.sqlite")
    assert rows(merged) == whole and nobody.asked == []


def test_a_test_split_shares_no_context_with_train(tmp_path):
    builder = build(tmp_path, seeds=GIVEN, checks=["support"], test_share=0.3, n_distractors=4)
    train, test = rows(builder, "train"), rows(builder, "test")
    assert len(train) + len(test) == 24 and 3 <= len(test) <= 12
    held_out = {row["seed_id"] for row in test}
    assert not held_out & {source for row in train for source in row["context_ids"]}
    again = build(tmp_path / "other", seeds=GIVEN[::-1], checks=["support"], test_share=0.3, n_distractors=4)
    assert {row["seed_id"] for row in rows(again, "test")} == held_out


def test_a_token_budget(tmp_path, tokenizer):
    given = make_pairs(24, context=lambda n: make_text(n, 60 if n else 4000))
    options = {"seeds": given, "tokenizer": tokenizer, "target_tokens": 3000, "n_distractors": None}
    found = rows(build(tmp_path, **options))
    assert len(found) == 23
    for row in found:
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]
        assert len(ids) == row["total_tokens"] <= 3000 and row["total_tokens"] >= 0.98 * 3000
        assert 0.8 * row["total_tokens"] < row["context_tokens"] < row["total_tokens"]
    rejected = rows(build(tmp_path, "rejected", **options))
    assert [row["seed_id"] for row in rejected] == ["narrativeqa-0"]
    assert rejected[0]["reason"].startswith("budget: the gold context and its prompt have ")
    first = rows(build(tmp_path / "two", "rejected", num_proc=2, hard_share=0.5, **options))
    assert first == rejected


def test_a_budget_that_leaves_a_split_without_rows(tmp_path, tokenizer):
    options = {"checks": ["support"], "n_distractors": 0, "tokenizer": tokenizer, "test_share": 0.2}
    whole = build(tmp_path / "all", seeds=GIVEN, **options)
    held_out = [row["seed_id"] for row in rows(whole, "test")]
    # Whatever else `datasets` takes for a split.
    assert len(whole.as_dataset(split="train[:2]")) == 2 and len(whole.as_dataset(split="train+test")) == 24
    with pytest.raises(ValueError, match="Unknown split"):
        whole.as_dataset(split="tset")
    given = [{**pair, "context": make_text(n, 4000 if pair["id"] in held_out else 60)} for n, pair in enumerate(GIVEN)]
    builder = build(tmp_path / "train", seeds=given, target_tokens=2000, **options)
    assert len(rows(builder)) == 24 - len(held_out) and rows(builder, "test") == []
    assert len(builder.as_dataset(split="train[:2]")) == 2
    folder = builder.export(tmp_path / "out")
    assert set(load_dataset(str(folder), "chat", cache_dir=tmp_path / "hf")) == {"train"}
    # What a model writes may be longer than the fewest words that it must have.
    written = {"generator": FakeGenerator(), "min_words": 1, **options}
    with pytest.raises(ValueError, match=r"`target_tokens` must be at least \d+") as caught:
        build(tmp_path / "none", target_tokens=1, **written)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    with pytest.raises(ValueError, match=rf"No row fits into `target_tokens`, {least}: .* fewer `context_words`"):
        build(tmp_path / "none", target_tokens=least, **written).export(tmp_path / "out")


def test_a_summary_is_told_which_context_is_meant(tmp_path):
    reports = [
        {"instruction": "What is a summary?", "answer": f"Dam {n} was finished.", "task": "govreport", "context": text}
        for n, text in enumerate(map(make_text, range(12)))
    ]
    options = {"seeds": reports, "checks": ["length"], "n_distractors": 3}
    for row in rows(build(tmp_path / "id", **options)):
        content = row["messages"][0]["content"]
        gold = content[row["parts"][row["gold_index"]]["start"] :]
        name = row["reference"].removeprefix("the report with the ID ")
        assert gold.startswith(f"ID: {name}\n") and content.count(name) == 2
        assert content.endswith(f"Now, write a one-page summary of the report with the ID {name}.\n\nSummary:")
        assert content.startswith("You are given several reports") and content.count("\nID: ") == 4
    titled = [{**report, "title": f"Dam {n}"} for n, report in enumerate(reports)]
    row = rows(build(tmp_path / "title", **{**options, "seeds": titled}))[5]
    assert row["reference"] == 'the report titled "Dam 5"' and "\nTitle: Dam 5\n" in row["messages"][0]["content"]
    alone = rows(build(tmp_path / "alone", **{**options, "n_distractors": 0}))[0]
    assert alone["reference"] is None and alone["n_contexts"] == 1 and alone["gold_depth"] == 0.0
    plain = rows(build(tmp_path / "none", reference="none", **options))[0]
    assert plain["reference"] is None and "ID:" not in plain["messages"][0]["content"]


def test_conflicting_contexts_are_passed_over_and_vague_instructions_named(tmp_path):
    given = make_pairs(12, context=make_text)
    given[1] = {**given[1], "instruction": given[0]["instruction"]}
    options = {"seeds": given, "checks": ["support", "conflict"], "n_distractors": 11}
    by_id = {row["seed_id"]: row for row in rows(build(tmp_path / "a", **options))}
    assert "narrativeqa-1" not in by_id["narrativeqa-0"]["context_ids"]
    assert by_id["narrativeqa-0"]["checks"][-1] == {"name": "conflict", "outcome": "passed", "detail": "1 passed over"}
    assert by_id["narrativeqa-5"]["n_contexts"] == 12
    free = rows(build(tmp_path / "b", **{**options, "checks": ["support"]}))[0]
    assert "narrativeqa-1" in free["context_ids"]
    vague = [{**pair, "instruction": "What was finished?"} for pair in given]
    assert all(row["reference"] for row in rows(build(tmp_path / "c", **{**options, "seeds": vague})))


def test_hard_distractors_come_from_the_nearest(tmp_path):
    asked = PAIRS[0]["instruction"]
    texts = {
        n: f"{make_text(n)} {f'Whether {asked} is not told here.' if n in (9, 12, 20) else ''}" for n in range(24)
    }
    options = {"seeds": make_pairs(24, context=texts.get), "checks": ["support"], "n_distractors": 3}
    row = rows(build(tmp_path, hard_share=1.0, **options))[0]
    assert set(row["context_ids"]) == {f"narrativeqa-{n}" for n in (0, 9, 12, 20)}
    easy = rows(build(tmp_path, **options))[0]
    assert set(easy["context_ids"]) != set(row["context_ids"])


def test_what_is_prepared_first_takes_nothing_from_the_others(tmp_path, tokenizer):
    """`rejected` composes to see what exceeds the budget, before the nearest texts are known."""
    options = {"seeds": GIVEN, "tokenizer": tokenizer, "target_tokens": 3000, "hard_share": 1.0}
    options["n_distractors"] = None
    chat, other = build(tmp_path / "a", **options), made(tmp_path / "b", **options)
    other.other("rejected").download_and_prepare()
    other.download_and_prepare()
    assert rows(chat) == rows(other)


def test_distractors_from_documents_and_other_tasks(tmp_path):
    (tmp_path / "essay.txt").write_text("An essay on whales, which are mammals.")
    seeds = make_pairs(3, context=make_text) + make_pairs(3, "qmsum", context=lambda n: make_text(n + 50))
    sources = {"distractor_sources": ["documents", "same_task", "other_tasks"], "documents": [str(tmp_path / "*.txt")]}
    found = rows(build(tmp_path / "cache", seeds=seeds, checks=["length"], n_distractors=6, **sources))
    assert all(row["n_contexts"] == 7 and any(i.startswith("doc-") for i in row["context_ids"]) for row in found)


def test_general_data_is_mixed_in_by_share(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(40)))
    options = {"seeds": GIVEN, "checks": ["support"], "general_data": [str(path)], "general_share": 0.4}
    found = rows(build(tmp_path / "a", num_proc=2, **options))
    assert len(found) == 40 and [row["messages"] == chat for row in found] == [False] * 24 + [True] * 16
    general = found[-1]
    assert general["parts"] == [] and general["gold_index"] is None and general["task"] is None
    assert general["seed_id"].startswith("general:general.jsonl:")


def test_contaminated_seeds_are_rejected_with_the_overlap(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps({"input": GIVEN[7]["instruction"]}) + "\n" + json.dumps({"context": make_text(9)}))
    rejected = rows(build(tmp_path / "a", "rejected", seeds=GIVEN, decontaminate_against=[str(path)]))
    assert [row["seed_id"] for row in rejected] == ["narrativeqa-7", "narrativeqa-9"]
    assert rejected[0]["reason"].startswith("contaminated: 'in which year did hope ada finish dam")
    assert rejected[0]["reason"].endswith("stands in bench.jsonl:1") and rejected[1]["reason"].endswith("jsonl:2")
    generator = FakeGenerator()
    written = rows(build(tmp_path / "b", "rejected", generator=generator, decontaminate_against=[str(path)]))
    assert [row["seed_id"] for row in written] == ["narrativeqa-7", "narrativeqa-9"]
    assert len(generator.asked) == 23  # what is known to be contaminated is not paid for; context 9 is new
    noted = make_pairs(24, context=lambda n: f"A note on dam {n}, which is not what the rows hold.")
    anew = build(tmp_path / "c", "rejected", seeds=noted, generator=FakeGenerator(), decontaminate_against=[str(path)])
    assert [row["seed_id"] for row in rows(anew)] == ["narrativeqa-7", "narrativeqa-9"]


def test_near_duplicates_are_written_anew(tmp_path):
    class Repeater(FakeGenerator):
        def write(self, request):
            if "village 6?" in request.messages[-1][1] and "nearly repeats" not in request.messages[-1][1]:
                return f"Context:\n{make_text(2).replace('1802', '1802, and not in 1806')}"
            return super().write(request)

    generator = Repeater()
    contexts = {row["seed_id"]: row for row in rows(build(tmp_path, "contexts", generator=generator))}
    assert contexts["narrativeqa-6"]["context"] == make_text(6) and contexts["narrativeqa-6"]["attempts"] == 2
    assert len(generator.asked) == 25
    rejected = rows(build(tmp_path / "b", "rejected", generator=Repeater(), retries=0))
    assert rejected[0]["reason"].startswith("duplicate: it nearly repeats another context")


def test_difficulty_is_measured_before_contexts_are_paid_for(tmp_path):
    generator = FakeGenerator()
    options = {"generator": generator, "difficulty": "closed_book", "difficulty_use": "select"}
    found = rows(build(tmp_path, **options))
    assert [int(row["answer"]) % 2 for row in found] == [0] * 12
    assert {row["closed_book"] for row in found} == {0.0}
    purposes = [request.purpose for request in generator.asked]
    assert purposes.count("closed_book") == 24 and purposes.count("context") == 12
    rejected = rows(build(tmp_path, "rejected", **options))
    assert {row["reason"] for row in rejected} == {"difficulty: not chosen by closed_book"}
    assert {row["closed_book"] for row in rejected} == {1.0} and len(rejected) == 12


def test_answerability_and_a_judge_of_another_model(tmp_path):
    writer, judge = FakeGenerator(), FakeGenerator("judge")
    found = rows(build(tmp_path, generator=writer, judge=judge, answerability=True))
    assert {row["answerable_with"] for row in found} == {1.0}
    assert [row["answerable_without"] for row in found] == [float(n % 2) for n in range(24)]
    assert {request.purpose for request in judge.asked} == {"open_book", "closed_book"}
    assert {request.purpose for request in writer.asked} == {"context"}


def test_instruction_synthesis_writes_pairs_for_chunks(tmp_path):
    class Asker(FakeGenerator):
        def write(self, request):
            number = request.messages[-1][1].split("dam of the village ")[1].split(" ")[0]
            return f"Question: In which year was dam {number} of that valley finished?\nAnswer: {1800 + int(number)}"

    for n in range(6):
        (tmp_path / f"{n}.txt").write_text(make_text(n, 400))
    options = {"method": "instruction", "seeds": None, "chunk_words": 10_000, "n_distractors": 3}
    found = rows(build(tmp_path / "cache", generator=Asker(), documents=[str(tmp_path / "*.txt")], **options))
    assert [row["answer"] for row in found] == [str(1800 + n) for n in range(6)]
    assert all(row["task"] == "general" and row["n_contexts"] == 4 for row in found)
    assert found[0]["messages"][0]["content"].endswith("In which year was dam 0 of that valley finished?")


def test_facts_first_sections_and_a_custom_template_reach_the_generator(tmp_path):
    template = tmp_path / "prompt.txt"
    template.write_text("Tell of {instruction} and {answer} in {words} words.")
    generator = FakeGenerator()
    build(tmp_path / "a", generator=generator, prompt_template=str(template), context_words=77)
    assert generator.asked[0].messages[1][1].startswith(f"Tell of {PAIRS[0]['instruction']} and 1800 in 77 words.")


def test_a_judge_decides_where_strings_do_not_tell(tmp_path):
    given = [{**pair, "answer": "yes"} for pair in GIVEN]
    judge = FakeGenerator("judge")
    row = rows(build(tmp_path / "a", seeds=given, judge=judge, checks=["support", "judge"]))[0]
    assert [(check["name"], check["outcome"]) for check in row["checks"]] == [
        ("support", "passed"),
        ("judge", "passed"),
    ]
    assert {request.purpose for request in judge.asked} == {"judge"} and row["journal_keys"] == [judge.asked[0].key]
    judge, short = FakeGenerator("judge"), [{**given[0], "context": "Too short."}, *given[1:]]
    build(tmp_path / "c", seeds=short, judge=judge, checks=["length", "support", "judge"], min_words=5)
    assert len(judge.asked) == len(given) - 1, "what fails anyway is not judged"
    writer = FakeGenerator()
    build(tmp_path / "b", seeds=make_pairs(24), generator=writer, checks=["support", "judge"])
    assert {request.purpose for request in writer.asked} == {"context"}


def test_replies_of_a_real_model_that_cannot_write_are_all_rejected(tmp_path, tiny_model):
    from hf_longalign.synthesis.local import TransformersGenerator

    generator = TransformersGenerator(tiny_model, batch_size=8, device="cpu")
    options = {"seeds": PAIRS[:6], "generator": generator, "max_tokens": 8, "retries": 1}
    with pytest.raises(ValueError, match=r"No seed of 6 was accepted\. The first was rejected: parse:"):
        build(tmp_path, **options)
    with Journal(next(tmp_path.rglob("journal.sqlite"))) as journal:
        assert journal.totals().replies == 12


def test_a_configuration_without_rows_is_empty(tmp_path):
    builder = build(tmp_path, "rejected", num_proc=2, seeds=GIVEN, checks=["support"])
    assert len(builder.as_dataset(split="train")) == len(builder.as_dataset()["train"]) == 0
    assert "reason" in builder.as_dataset(split="train").column_names


def test_nothing_accepted_is_an_error_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match=r"No seed of 6 was accepted\. The first was rejected: parse:"):
        build(tmp_path / "few", generator=FakeGenerator(fail=range(6)), seeds=PAIRS[:6], n_distractors=2)
    generator = FakeGenerator(fail=range(24))
    with pytest.raises(RunStopped, match=r"None of the last 20 replies can be used\. The first: parse:"):
        build(tmp_path / "many", generator=generator)
    assert 20 <= len(generator.asked) <= 20 + 2 * generator.concurrency


def test_the_builder_can_be_sent_to_processes(tmp_path):
    builder = build(tmp_path, generator=FakeGenerator())
    builder.pipeline.generator.lock = open(__file__)  # noqa: SIM115 - cannot be pickled
    copied = pickle.loads(pickle.dumps(builder))
    assert next(iter(copied._generate_examples([3])))[1]["seed_id"] == "narrativeqa-3"
    builder.pipeline.generator.lock.close()


def test_the_seed_changes_the_composition_and_not_the_contexts(tmp_path):
    one, two = (rows(build(tmp_path, seeds=GIVEN, checks=["support"], seed=seed)) for seed in (0, 1))
    assert [row["seed_id"] for row in one] == [row["seed_id"] for row in two]
    assert [row["context_ids"] for row in one] != [row["context_ids"] for row in two]


def test_gold_depth_is_spread_evenly(tmp_path):
    found = rows(build(tmp_path, seeds=make_pairs(300, context=make_text), checks=["support"], n_distractors=4))
    counts = np.bincount([row["gold_index"] for row in found], minlength=5)
    assert ((counts - 60) ** 2 / 60).sum() < 18.5  # 4 degrees of freedom, p = 0.001


def test_all_configurations_are_made_from_one_reading_of_the_seeds(tmp_path, monkeypatch, caplog):
    """Each thing is said once, and each reply goes into the journal once."""
    from hf_longalign.synthesis import pipeline

    read, put = [], []
    read_seeds, put_reply = pipeline.read_seeds, Journal.put
    monkeypatch.setattr(pipeline, "read_seeds", lambda *args, **more: read.append(1) or read_seeds(*args, **more))
    monkeypatch.setattr(Journal, "put", lambda *args: put.append(args[1].key) or put_reply(*args))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*PAIRS, {**PAIRS[0], "answer": ""}])))
    builder = made(tmp_path / "cache", generator=FakeGenerator(fail=[3]), seeds=str(path), on_bad_seed="skip")
    folder = builder.export(tmp_path / "out", num_proc=2)
    for name, number in (("chat", 23), ("contexts", 23), ("rejected", 1)):
        assert load_dataset(str(folder), name, split="train", cache_dir=tmp_path / "hf").num_rows == number
    assert len(read) == 1 and caplog.text.count("Skipped 1 seeds: empty (`answer`)") == 1
    assert len(put) == len(set(put)) == 23 + 3
