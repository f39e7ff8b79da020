import json
import re
import sys
from pathlib import Path

import forked
import pytest
from datasets import Dataset, load_dataset
from fake_endpoint import FakeEndpoint

from hf_longalign.cli import main
from hf_longalign.commands import synthesize
from hf_longalign.commands.coherence import compare, without_contexts
from hf_longalign.synthesis.journal import Journal

from .fakes import make_pairs, make_text


RECIPES = Path(__file__).parents[2] / "recipes"


DOCUMENTS = ("--min_words", 20, "--n_distractors", 4)


def run(name, *arguments):
    return main([name, *map(str, arguments)])


def asking(server, seeds, *more):
    """The options of a run that asks an endpoint for contexts, all of which pass."""
    url = server if isinstance(server, str) else server.url
    asked = ("--generator", "openai", "--model", "tiny", "--endpoints", url, "--seeds", seeds)
    return (*asked, "--checks", "duplicate", "--n_distractors", 3, *more)


def load(folder, name="chat", **options):
    return load_dataset(str(folder), name, cache_dir=folder.parent / "hf", **{"split": "train", **options})


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def given(tmp_path):
    return lines(tmp_path / "pairs.jsonl", make_pairs(24, context=make_text))


def test_rejected_seeds_are_written_with_their_reasons(tmp_path):
    pairs = [pair | ({} if n % 8 else {"answer": "Rome"}) for n, pair in enumerate(make_pairs(24, context=make_text))]
    seeds = lines(tmp_path / "pairs.jsonl", pairs)
    arguments = ("--seeds", seeds, *DOCUMENTS, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out")
    assert run("synthesize", *arguments) == 0
    rejected = load(tmp_path / "out", "rejected")
    assert rejected["origin"] == [f"pairs.jsonl:{line}" for line in (1, 9, 17)]
    assert "3 seeds were rejected" in (tmp_path / "out" / "README.md").read_text()


def test_documents_are_composed_written_and_loaded(tmp_path, given, capsys):
    for folder, num_proc in (("one", 1), ("two", 2)):
        arguments = ("--seeds", given, "--cache_dir", tmp_path / folder, "--output_dir", tmp_path / f"{folder}-out")
        assert run("synthesize", *arguments, *DOCUMENTS, "--num_proc", num_proc, "--test_share", 0.2) == 0
    written = files(tmp_path / "one-out")
    assert written == files(tmp_path / "two-out") and len(written) == 6
    chat = load(tmp_path / "one-out", split=None)
    assert set(chat) == {"train", "test"} and len(chat["train"]) + len(chat["test"]) == 24
    card = (tmp_path / "one-out" / "README.md").read_text()
    assert "No seed was rejected." in card and "config_name: rejected" not in card
    assert "task `narrativeqa`." in card and "no model wrote anything" in card and str(tmp_path) not in card
    assert "| `pairs.jsonl` | narrativeqa | 24 |" in card and "license:" not in card and "| cost |" not in card
    assert "![Lengths and depths](assets/lengths.png)" in card and "language:\n- en\n" in card


def test_an_endpoint_writes_and_a_rerun_asks_nothing(tmp_path, capsys):
    seeds = lines(tmp_path / "pairs.jsonl", make_pairs(12))
    with FakeEndpoint() as server:
        for folder in ("one", "two"):
            prices = ("--prompt_price", 1, "--completion_price", 2)
            more = (*prices, "--license", "cc-by-4.0", "--seeds_license", "cc0-1.0")
            where = ("--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / folder)
            assert run("synthesize", *asking(server, seeds, *where, *more)) == 0
        assert len(server.log) == 12
    assert files(tmp_path / "one") == files(tmp_path / "two")
    card = (tmp_path / "one" / "README.md").read_text()
    with Journal(next((tmp_path / "cache").rglob("journal.sqlite"))) as journal:
        entries = list(journal.entries())
    sent, got = (sum(getattr(entry, name) for entry in entries) for name in ("prompt_tokens", "completion_tokens"))
    cost = f"12 replies, {sent:,} prompt tokens and {got:,} completion tokens, less than $0.01"
    assert cost in card and "license: cc-by-4.0" in card and "Licence of the seeds: `cc0-1.0`." in card
    assert "| written by | `tiny`, OpenAI-compatible endpoint |" in card and server.url not in card
    rows = load(tmp_path / "one")
    assert set(rows["model"]) == {"tiny"} and set(rows["generator"]) == {"openai"}
    journal = next((tmp_path / "cache").rglob("journal.sqlite"))
    capsys.readouterr()
    run("journal", "list", journal, "--purpose", "context")
    listed = capsys.readouterr().out
    assert listed.count(" context ") == 12 and "12 context; in all 12 replies, 0 faults" in listed
    run("journal", "show", journal, rows[0]["journal_keys"][0])
    assert rows[0]["instruction"] in capsys.readouterr().out
    run("journal", "export", journal, tmp_path / "replies.jsonl")
    run("journal", "merge", tmp_path / "merged.sqlite", journal)
    run("journal", "export", tmp_path / "merged.sqlite", tmp_path / "merged.jsonl")
    assert (tmp_path / "replies.jsonl").read_bytes() == (tmp_path / "merged.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="no such journal"):
        run("journal", "list", tmp_path / "none.sqlite")


def test_null_in_the_yaml_leaves_an_option_out(tmp_path, capsys):
    seeds = lines(tmp_path / "pairs.jsonl", make_pairs(4))
    settings = tmp_path / "settings.yaml"
    with FakeEndpoint(refuses={name: f"{name} is unsupported" for name in ("temperature", "top_p", "seed")}) as server:
        arguments = ("--config", settings, "--endpoints", server.url, "--cache_dir", tmp_path / "cache")
        arguments += ("--seeds", seeds, "--output_dir", tmp_path / "out")
        arguments += ("--checks", "duplicate", "--n_distractors", 1)
        settings.write_text("generator: openai\nmodel: tiny\n")
        # Each refusal names the option; with its remedy the next one is met.
        for option in ("temperature", "top_p", "sampling_seed"):
            assert run("synthesize", *arguments) == 1
            remedy = f"{option}: null"
            assert f"Set `{remedy}` in the YAML" in capsys.readouterr().err
            settings.write_text(f"{settings.read_text()}{remedy}\n")
        assert run("synthesize", *arguments) == 0
        bodies = [entry.body for entry in server.log if entry.answered]
    assert [sorted(body) for body in bodies] == [["max_tokens", "messages", "model"]] * 4


def test_a_poisoned_journal_is_saved(tmp_path, capsys):
    pairs = make_pairs(6)
    pairs[2]["instruction"] += " [[ended*2]]"  # the first two replies to each of its prompts are empty
    seeds = lines(tmp_path / "pairs.jsonl", pairs)
    journal = tmp_path / "cache" / "context_synthesis" / "journal.sqlite"
    with FakeEndpoint() as server:
        arguments = asking(server, seeds, "--cache_dir", tmp_path / "cache", "--output_dir")
        assert run("synthesize", *arguments, tmp_path / "poor") == 0
        assert len(load(tmp_path / "poor")) == 5
        assert len(server.log) == 5 + 3
        capsys.readouterr()
        run("journal", "drop", journal, "--reason", "empty")
        told = capsys.readouterr().out
        assert told.startswith("3 replies dropped") and told.count("Removed ") == 5
        assert run("synthesize", *arguments, tmp_path / "rich") == 0
        assert len(load(tmp_path / "rich")) == 6
        assert len(server.log) == 5 + 3 + 2
    with pytest.raises(SystemExit):
        run("journal", "drop", journal, "--reason", "whim")


def test_the_same_command_twice_at_once_gives_one_output(tmp_path, given):
    command = [sys.executable, str(RECIPES / "synthesize.py"), "--seeds", str(given), *map(str, DOCUMENTS)]
    command += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")]
    both = [forked.Popen(command) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0 and "Wrote " in output, errors[-3000:]
    assert load(tmp_path / "out").num_rows == 24
    assert not list(tmp_path.rglob("*.part"))


def test_a_spent_budget_stops_cleanly_and_a_larger_one_goes_on(tmp_path, capsys):
    seeds = lines(tmp_path / "pairs.jsonl", make_pairs(12))
    with FakeEndpoint() as server:
        common = asking(server, seeds, "--max_tokens", 200)
        arguments = (*common, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out")
        assert run("synthesize", *arguments, "--budget_tokens", 3500) == 1
        assert "Stopped: " in capsys.readouterr().err and not (tmp_path / "out").exists()
        assert 0 < len(server.log) < 12
        assert run("synthesize", *arguments, "--budget_tokens", 100_000) == 0
        assert len(server.log) == 12
        whole = (*common, "--cache_dir", tmp_path / "cache2", "--output_dir", tmp_path / "whole")
        assert run("synthesize", *whole) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_dry_run_prints_the_plan_and_asks_nothing(tmp_path, capsys):
    seeds = lines(tmp_path / "pairs.jsonl", [*make_pairs(12), make_pairs(1)[0] | {"answer": ""}])
    with FakeEndpoint() as server:
        more = ("--on_bad_seed", "skip", "--context_words", 300, "--prompt_price", 1, "--completion_price", 2)
        assert run("synthesize", *asking(server, seeds, "--dry_run", *more)) == 0
        assert server.log == []
    plan = capsys.readouterr().out
    assert "seeds      12: narrativeqa 12" in plan and "skipped    1: empty (`answer`)" in plan
    assert "requests   12 context" in plan and "and 4,800 out, without retries" in plan
    assert plan.count(": context ---") == 3 and "about 300 words long" in plan
    # 12 seeds, each asked three times for up to 500,000 tokens: the limit that is sent, not `max_tokens`.
    limit = ("--extra_body", '{"max_completion_tokens": 500000}', "--completion_price", 2, "--on_bad_seed", "skip")
    assert run("synthesize", *asking("http://127.0.0.1:9", seeds, "--dry_run", *limit)) == 0
    assert "; $36.00 if every reply and retry runs to its limit" in capsys.readouterr().out


def test_of_many_seeds_some_are_rehearsed_and_tell_of_all(tmp_path, monkeypatch, capsys):
    plans = []
    for number in (1, 10, 2000):
        monkeypatch.setattr(synthesize, "_SAMPLE", number)
        seeds = lines(tmp_path / "pairs.jsonl", [{**pair, "instruction": "When?"} for pair in make_pairs(37)])
        assert run("synthesize", *asking("http://127.0.0.1:9", seeds, "--dry_run", "--completion_price", 2)) == 0
        plans.append(
            [line for line in capsys.readouterr().out.splitlines() if line[:6] in ("reques", "tokens", "cost  ")]
        )
    assert plans[0] == plans[1] == plans[2] and plans[0][0] == "requests   37 context"


def test_a_lost_endpoint_is_a_message_and_a_status(tmp_path, capsys):
    seeds = lines(tmp_path / "pairs.jsonl", make_pairs(12))
    where = ("--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out")
    assert run("synthesize", *asking("http://127.0.0.1:9", seeds, *where)) == 1
    assert "Stopped: http://127.0.0.1:9" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shared", [True, False], ids=["folder", "journals"])
def test_shards_fill_journals_that_are_merged(tmp_path, capsys, shared):
    seeds, shards = lines(tmp_path / "pairs.jsonl", make_pairs(12)), tmp_path / "shards"
    with FakeEndpoint() as server:
        common = asking(server, seeds)
        for index in (0, 1):
            where = ("--output_dir", shards) if shared else ("--journal", tmp_path / f"{index}.sqlite")
            shard = ("--num_shards", 2, "--shard_index", index, *where, "--cache_dir", tmp_path / "cache")
            for _ in range(2):  # one that is finished is skipped
                assert run("synthesize", *common, *shard) == 0
            assert len(server.log) == 6 * (index + 1)
            merged = [shards] if shared else [tmp_path / f"{index}.sqlite" for index in (0, 1)]
            if shared and not index:
                assert run("journal", "merge", tmp_path / "all.sqlite", shards) == 1
                assert "got 1 without shard-1-of-2.sqlite. Run what is missing" in capsys.readouterr().err
                assert not (tmp_path / "all.sqlite").exists()
        run("journal", "merge", tmp_path / "all.sqlite", *merged)
        whole = ("--journal", tmp_path / "all.sqlite", "--cache_dir", tmp_path / "last", "--output_dir")
        assert run("synthesize", *common, *whole, tmp_path / "out") == 0
        assert len(server.log) == 12
    assert len(load(tmp_path / "out")) == 12


def test_a_shard_has_a_journal_of_its_own(tmp_path, capsys):
    seeds = lines(tmp_path / "pairs.jsonl", [{**pair, "context": "It was so."} for pair in make_pairs(4)])
    shard = ("--seeds", seeds, "--checks", "length", "--min_words", 1, "--n_distractors", 1, "--num_shards", 2)
    places = {"--journal": tmp_path / "j.sqlite", "--output_dir": tmp_path / "shards"}
    both = [part for place in places.items() for part in place]
    with pytest.raises(SystemExit):
        run("synthesize", *shard, *both, "--cache_dir", tmp_path)
    assert "`journal` must be unset where shards go into `output_dir`, got" in capsys.readouterr().err
    for place in places.items():
        assert run("synthesize", *shard, *place, "--cache_dir", tmp_path) == 0


def test_what_is_in_the_way_is_not_overwritten(tmp_path, given, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    where = ("--cache_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert run("synthesize", "--seeds", given, *DOCUMENTS, *where) == 1
    assert "`output_dir` must be absent, empty or an earlier output" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "out" / "chat").mkdir()  # as an earlier output has, which would be replaced
    with FakeEndpoint() as server:
        asks = asking(server, given)
        for more, named in (((), "thesis.txt"), (("--journal", tmp_path / "out" / "j.sqlite"), "j.sqlite")):
            assert run("synthesize", *asks, *more, *where) == 1
            assert re.search(f"`output_dir` must .*`{named}`", capsys.readouterr().err)
        assert not server.log, "refused before anything is asked"
    with pytest.raises(SystemExit):
        run("synthesize", "--seeds", given)
    assert "error: `output_dir` must be given" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((RECIPES / "synthesis").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_complete(tmp_path, path, given, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "essay.txt").write_text(make_text(3))
    sources = ("--documents", tmp_path / "*.txt") if path.stem == "instruction_synthesis" else ("--seeds", given)
    limit = ("--n_distractors", 0) if path.stem == "instruction_synthesis" else ()
    arguments = ("--config", path, *sources, *limit, "--tokenizer", tmp_path / "tokenizer", "--dry_run")
    assert run("synthesize", *arguments, "--cache_dir", tmp_path) == 0
    assert "--- seed 1 of 3" in capsys.readouterr().out or path.stem == "documents"


def test_coherence_data_is_aligned_and_compared(tmp_path, given, capsys):
    run("synthesize", "--seeds", given, *DOCUMENTS, "--cache_dir", tmp_path, "--output_dir", tmp_path / "o")
    run("coherence", "split", tmp_path / "o", tmp_path / "c")
    with_contexts, without = (
        Dataset.from_parquet(str(tmp_path / "c" / kind / "train.parquet"), cache_dir=tmp_path / "hf")
        for kind in ("with", "without")
    )
    assert with_contexts["seed_id"] == without["seed_id"] and with_contexts["answer"] == without["answer"]
    row = without[3]
    assert row["messages"][0]["content"] == row["instruction"] and row["n_contexts"] == 0
    assert row["parts"] == [{"message": 0, "start": 0, "end": len(row["instruction"]), "kind": "question"}]
    assert without_contexts(without).to_list() == without.to_list()
    lines(tmp_path / "a.json", [{"qasper": 30, "niah": {"single": 90.5}}])
    lines(tmp_path / "b.json", [{"qasper": 20, "niah": {"single": 90.5}}])
    capsys.readouterr()
    run("coherence", "compare", tmp_path / "a.json", tmp_path / "b.json", "--output", tmp_path / "r.md")
    report = capsys.readouterr().out
    assert "| qasper | 30.00 | 20.00 | +10.00 |" in report and "| mean | 60.25 | 55.25 | +5.00 |" in report
    assert (tmp_path / "r.md").read_text() == report
    with pytest.raises(ValueError, match=r"same evaluations, got differences in \['qasper'\]"):
        compare({"qasper": 1.0}, {})


def test_a_row_that_looks_private_is_named_and_pushed_where_it_is_allowed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pairs = make_pairs(8, context=lambda n: make_text(n) + " She kept the plans in /home/ann/x.")
    arguments = ("--seeds", lines(tmp_path / "pairs.jsonl", pairs), *DOCUMENTS, "--cache_dir", tmp_path / "cache")
    arguments += ("--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "user/rows")
    arguments += ("--push_dry_run", tmp_path / "look")
    assert run("synthesize", *arguments) == 1
    told = capsys.readouterr().err
    assert re.search(r"a folder of this machine in .*: /home/ann/x\..* in `allow`. The work is done", told)
    assert run("synthesize", *arguments, "--allow", "/home/ann") == 0
    assert (tmp_path / "look" / "README.md").is_file()


def test_a_licence_that_the_hub_does_not_know_is_refused_before_the_work(tmp_path, given, capsys):
    arguments = ("--seeds", given, *DOCUMENTS, "--output_dir", tmp_path / "out", "--seeds_license", "CC BY 4.0")
    with pytest.raises(SystemExit, match="2"):
        run("synthesize", *arguments)
    said = capsys.readouterr().err
    assert "`seeds_license` must be an id of the Hub" in said and "Set 'cc-by-4.0'" in said
    assert not (tmp_path / "out").exists()
