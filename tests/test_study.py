"""The study: its data, its arithmetic against a naive reference, and a small run that is killed and resumed."""

import json
import os
import re
import signal
import sys
import time
from collections import defaultdict
from functools import partial
from itertools import product, takewhile
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
from loopback_hub import Hub
from synthesis.fakes import FakeGenerator
from tiny import hotpot_rows, tiny_llama, tiny_tokenizer
from trl import TrlParser

from hf_longalign.evaluation.intervals import student_quantile


ROOT = Path(__file__).parents[1]
ARMS = ["scaled", "ordinary", "skip_parts", "skip_turns", "long_rows", "plain"]
TRAINED = ARMS[1:-1]
CELLS = ["1536:2", "3072:1"]


@pytest.fixture(scope="module")
def recipes():
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        import study
        import study_arms
        import study_data
        import study_publish
        import study_report
    finally:
        sys.path.remove(str(ROOT / "recipes"))
    return SimpleNamespace(study=study, arms=study_arms, data=study_data, report=study_report, publish=study_publish)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A folder of pairs and, line by line, contexts."""
    folder = tmp_path_factory.mktemp("seeds")
    rows = list(hotpot_rows(60))
    for kind in ("seed_instruction", "seed_context"):
        (folder / kind).mkdir()
        for number, task in enumerate(("hotpotqa", "2wikiqa", "musique")):
            own = rows[number::3]
            lines = [{"instruction": row["question"], "answer": row["answer"]} for row in own]
            if kind == "seed_context":
                texts = [zip(row["context"]["title"], row["context"]["sentences"], strict=True) for row in own]
                lines = [{"context": "\n\n".join(f"{title}\n{''.join(facts)}" for title, facts in t)} for t in texts]
            (folder / kind / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_both_kinds_of_seeds_are_read_and_no_gold_passage_is_in_two_splits(recipes, seeds, tmp_path):
    data = recipes.data
    from datasets import Dataset

    Dataset.from_list(list(hotpot_rows(60))).to_parquet(tmp_path / "train.parquet")
    found = [data.read_pairs(str(source)) for source in (seeds, tmp_path)]
    assert len(found[0]) == len(found[1]) == 60
    for pairs in found:
        pair = next(pair for pair in pairs if pair.answer == "ware 7")
        assert (
            pair.gold
            == ("Town 7\nTown 7 sold ware 7. It was so.", "Mill 7\nMill 7 is in town 7. It was so.")[: len(pair.gold)]
        )
        splits = data.split_pairs(pairs, lambda text: len(text.split()), rows=20, gold_tokens=40)
        golds = [{passage for pair in own for passage in pair.gold} for own in splits.values()]
        assert [len(own) for own in splits.values()] == [20, 10, 30]
        assert not golds[0] & golds[1] and not golds[0] & golds[2] and not golds[1] & golds[2]
    with pytest.raises(ValueError, match=r"`rows` must leave pairs to ask about, got 58 of 60. Set less."):
        data.split_pairs(found[0], len, rows=58, gold_tokens=1000)


def common_beginning(texts):
    return "".join(chars[0] for chars in takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False)))


def test_questions_share_one_text_that_holds_all_answers_and_fits(recipes, seeds):
    data = recipes.data
    tokenizer = tiny_tokenizer()

    def count(text, prefix=""):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return len(ids) + len(tokenizer(prefix)["input_ids"])

    pairs = data.read_pairs(str(seeds))
    asked = data.questions(pairs, count, length=3072, text=0, seed=1)
    assert asked == data.questions(pairs, count, length=3072, text=0, seed=1)
    tasks = defaultdict(list)
    for prompt in asked:
        tasks[prompt.task].append(prompt)
        assert all(answer in prompt.text for answer in prompt.answers)
        assert 0.7 * 3072 < count(prompt.text, prompt.prefix) <= 3072 - prompt.max_new_tokens
    shared = common_beginning([prompt.text for prompt in asked])
    assert all(prompt.text.startswith(shared) and len(prompt.text) - len(shared) < 350 for prompt in asked)
    assert len(tasks["multi_key"]) == 16 and len(tasks["multi_query"]) == 4 and len(tasks["passages"]) > 4
    assert len({prompt.answers for prompt in tasks["multi_key"]}) == 16
    for several in tasks["multi_query"]:  # and the four that are asked for one by one belong to the same sample
        alone = [prompt.answers[0] for prompt in tasks["multi_key"] if prompt.parts == several.parts]
        assert tuple(alone) == several.answers
    places = [shared.index(prompt.answers[0]) / len(shared) for prompt in tasks["multi_key"]]
    assert np.corrcoef(places, [prompt.depth for prompt in tasks["multi_key"]])[0, 1] > 0.95
    other = data.questions(pairs, count, length=3072, text=1, seed=2)
    assert not {prompt.answers for prompt in asked} & {p.answers for p in other if p.task == "multi_key"}
    with pytest.raises(ValueError, match=r"`cells` must have room for needles and the passages of a pair, got 500"):
        data.questions(pairs, count, length=500, text=0, seed=1)


def test_rows_to_train_on_tell_their_parts(recipes, seeds, tmp_path):
    data = recipes.data
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    pairs = data.read_pairs(str(seeds))[:12]
    recipes.data.compose_rows(pairs, tmp_path / "data", tokenizer=str(tmp_path / "model"), tokens=1024)
    rows = recipes.data.composed_rows(tmp_path / "data")
    assert len(rows) == 12
    for row in rows:
        content = row["messages"][0]["content"]
        kinds = [part["kind"] for part in row["parts"]]
        assert kinds.count("context") > 1 and kinds[-1] == "question"
        assert row["messages"][1]["content"] in content


def test_the_pilot_hides_one_needle_in_a_text_or_asks_for_it_alone(recipes, seeds, tmp_path):
    data = recipes.data

    def count(text):
        return len(text.split())

    pairs = data.read_pairs(str(seeds))
    tokens = {"general": 0, "needles_bare": 700, "needles_short": 700, "needles_long": 1500}
    rows = {}
    for kind, length in tokens.items():
        recipes.data.compose_pilot(pairs, tmp_path / kind, count, kind=kind, tokens=length)
        rows[kind] = [row["messages"] for row in recipes.data.composed_rows(tmp_path / kind, parts=False)]
    general = rows["general"]
    assert [answer["content"] for _, answer in general] == [pair.answer for pair in pairs]
    assert all(
        passage in chat[0]["content"] for chat, pair in zip(general, pairs, strict=True) for passage in pair.gold
    )
    for kind in ("needles_bare", "needles_short", "needles_long"):
        assert rows[kind][: len(pairs)] == general and len(rows[kind]) == 2 * len(pairs)
        for question, answer in rows[kind][len(pairs) :]:
            key, value = re.fullmatch(
                r".* for (.+) mentioned in the provided text is (\d+)\.", answer["content"]
            ).groups()
            asked = question["content"]
            assert key in asked and (value in asked) == (kind != "needles_bare")
            assert count(asked) <= tokens[kind] and (count(asked) < 20) == (kind == "needles_bare")
    longest, short = (max(count(chat[0]["content"]) for chat in rows[f"needles_{kind}"]) for kind in ("long", "short"))
    assert longest > 1.5 * short


class Writer(FakeGenerator):
    """Writes a text with the answer for a pair, and a pair for a text."""

    def write(self, request):
        ware = re.search(r"ware \d+|mill \d+", request.messages[-1][1])[0].replace("mill", "ware")
        if request.purpose == "context":
            return f"Context: Many came to buy {ware}. " + " ".join(f"On day {n} they ate {ware}." for n in range(20))
        return f"Question: What is told of here?\nAnswer: {ware}"


def test_rows_are_written_for_pairs_or_pairs_for_their_passages(recipes, seeds, tmp_path):
    pairs, writer, paid = recipes.data.read_pairs(str(seeds))[:12], Writer(), {}
    for number, kind in product((1, 5), ("contexts", "instructions")):
        folder, before = tmp_path / f"{kind}_{number}", len(writer.asked)
        recipes.data.compose_written(pairs, folder, writer, kind=kind, contexts=number, words=60, general=None)
        paid[kind, number] = len(writer.asked) - before
        rows = recipes.data.composed_rows(folder, parts=False)["messages"]
        assert rows[:12] == recipes.data.general_chats(pairs, None) and len(rows) == 24
        for question, answer in rows[12:]:
            asked, own = question["content"], f"{answer['content']}."
            if kind == "contexts":
                assert asked.count("Many came to buy ware") == number and f"Many came to buy {own}" in asked
            else:
                assert asked.count(" sold ware") == number and f" sold {own}" in asked
    assert paid == {("contexts", 1): 12, ("instructions", 1): 12, ("contexts", 5): 0, ("instructions", 5): 0}


def test_every_config_of_a_study_is_one(recipes):
    configs = [path for path in (ROOT / "recipes" / "smollm2-135m").glob("*.yaml") if "arms:" in path.read_text()]
    assert len(configs) == 7
    for path in configs:
        (options,) = TrlParser([recipes.arms.StudyOptions]).parse_args_and_config(["--config", str(path)])
        assert set(options.arms) <= set(recipes.arms.ARMS) and options.grid


def test_a_report_tells_who_wrote_rows_where_rows_were_written_and_no_address(recipes, tmp_path):
    given = {"writer": str(tmp_path), "writer_endpoints": ["http://10.0.0.7:8000/v1"]}
    for arms, told in ((["general", "contexts_5"], {"writer": tmp_path.name, "context_words": 300}), (["pose"], {})):
        found = recipes.arms.settings(recipes.arms.StudyOptions(arms=arms, **given))
        assert {name: found.get(name) for name in ("writer", "context_words") if name in found} == told
        assert "10.0.0.7" not in json.dumps(found)


def naive_difference(scores, reference, arm, tasks, depths, length):
    """Mean over samples of the mean difference over their questions, seeds averaged, and its half width."""
    by_sample = defaultdict(list)
    for key in scores[reference]:
        there = key[0] in tasks and (key[3] is None or depths[0] <= key[3] < depths[1])
        if key in scores[arm] and there and length in (0, key[1]):
            by_sample[key[2]].append(np.mean(scores[arm][key]) - np.mean(scores[reference][key]))
    means = [np.mean(values) for values in by_sample.values()]
    half = student_quantile(len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
    return np.mean(means), half, len(means)


def test_the_report_equals_a_naive_reference(recipes, tmp_path):
    report = recipes.report
    rng = np.random.default_rng(0)
    scores = {arm: defaultdict(list) for arm in ("scaled", "ordinary", "skip_parts")}
    losses = defaultdict(list)
    for arm, own in scores.items():
        for seed in {"scaled": (0,), "ordinary": (0, 1)}.get(arm, (0, 1, 2)):
            folder = tmp_path / "arms" / f"{arm}-{seed}"
            (folder / "report").mkdir(parents=True)
            if arm != "scaled":
                told = {"seconds": 9.0, "steps": 3, "tokens": 99, "loss_first": 2.0, "loss_last": 1.0}
                (folder / "training.json").write_text(json.dumps(told))
            for length in (1024, 4096):
                made = [("multi_key", length, f"{length}/{n // 4}", (n + 0.5) / 16) for n in range(16)]
                made += [("passages", length, f"pair {n}", None) for n in range(6)]
                rows = []
                for key in made:
                    value = float(rng.random() < 0.5) if key[0] == "multi_key" else float(rng.random())
                    own[key].append(value)
                    rows.append(dict(zip(("task", "length", "sample", "depth"), key, strict=True), score=value))
                (folder / "report" / f"{length}-0.json").write_text(json.dumps({"scores": rows, "seconds": 1.0}))
            own_losses = [[float(100 * (2 + rng.random())), 100] for _ in range(4)]
            losses[arm].append(own_losses)
            bins = {"edges": [0, 512, 1024, 2048], "sums": [9.0, 10.0 + seed, 30.0], "counts": [9, 10, 10]}
            told = {"losses": own_losses, "positions": bins, "seconds": 1.0}
            (folder / "report" / "perplexity.json").write_text(json.dumps(told))
    titles = {arm: f"the {arm} one" for arm in scores}
    path = report.write_study(tmp_path, titles, "report", {"model": "m"}, complete=False)
    found = json.loads((tmp_path / "report.json").read_text())
    # Groups that were asked, pairs of arms, two lengths and both together.
    assert len(found["differences"]) == 5 * 3 * 3
    for one in found["differences"]:
        _, tasks, depths = report.GROUPS[one["group"]]
        mean, half, samples = naive_difference(scores, one["reference"], one["arm"], tasks, depths, one["length"])
        assert one["value"] == pytest.approx(mean, abs=1e-4) and one["samples"] == samples
        assert one["high"] == pytest.approx(min(1.0, mean + half), abs=2e-4)
    for arm in scores:
        every = np.mean([[total / tokens for total, tokens in own] for own in losses[arm]], axis=0)
        assert found["perplexity below 2,048"][arm] == pytest.approx(np.exp(every.mean()), abs=1e-3)
    assert found["perplexity by position"][1] == {
        "arm": "ordinary",
        "512 to 1,024": pytest.approx(np.exp(1.05), abs=1e-4),
        "1,024 to 2,048": pytest.approx(np.exp(3), abs=1e-4),
    }
    text = path.read_text()
    assert "| the ordinary one | 2.86 | 20.09 |" in text
    assert "Not all that was planned is done" in text and "the skip_parts one − the ordinary one" in text
    assert "| the ordinary one | 1 | 3 | 99 | 9 | 2.0 | 1.0 |" in text
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("accuracy_by_length.png", "heatmap.png"))


def command(folder, seeds, output, *more):
    options = ["--model", folder, "--seeds", seeds, "--output_dir", output, "--arms", *ARMS, "--rows", 12]
    options += ["--row_tokens", 768, "--gold_tokens", 100, "--batch_size", 4, "--micro_batch_size", 2]
    options += ["--target_length", 4096, "--dtype", "float32", "--cells", *CELLS, "--most_golds", 3, "--lora_r", 2]
    options += ["--perplexity_documents", 2, "--distances", 1536, 3072]
    return [sys.executable, str(ROOT / "recipes" / "study.py"), *map(str, options), *more]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(initializer_range=0.3, max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(output):
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("arms/*/training.json")}


def asked(output):
    files = sorted(output.glob("arms/*/report/answers/*.jsonl"))
    return [json.loads(line)["key"] for file in files for line in file.read_text().splitlines() if line.endswith("}")]


def start(words):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return forked.Popen(words, env=environment)


def kill_when(process, ready):
    deadline = time.monotonic() + 300
    try:
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_killed_twice_it_goes_on_and_two_share_the_rest(model, seeds, tmp_path):
    words = command(model, seeds, tmp_path)
    kill_when(start(words), lambda: len(trained(tmp_path)) == 2)
    first = trained(tmp_path)
    kill_when(start(words), lambda: tmp_path.exists() and len(asked(tmp_path)) > 30)
    second, answered = trained(tmp_path), asked(tmp_path)
    assert first.items() <= second.items(), "no finished arm is trained again"
    # Launched together, each is one by itself.
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml")]
    process = start([words[0], *launcher, *words[1:]])
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    assert output.count("report.md") == 2
    assert {name.rpartition("-")[0] for name in trained(tmp_path)} == set(TRAINED)
    assert second.items() <= trained(tmp_path).items()
    keys = asked(tmp_path)
    assert set(answered) < set(keys) and len(keys) == len(set(keys)), "nothing is asked twice"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] and not list(tmp_path.rglob("*.part"))
    read = {one.pop("arm"): one for one in report["perplexity by position"]}
    assert set(read) == set(ARMS) and "2,048 to 4,096" in read["ordinary"] and "2,048 to 4,096" not in read["plain"]
    seen = {(one["arm"], one["length"]) for one in report["scores"]}
    assert {(arm, 3072) for arm in ARMS} - seen == {("plain", 3072)}, "nobody asks a model past its range"
    assert {(one["arm"], one["length"]) for one in report["distances"]} == {
        (a, n) for a in TRAINED for n in (1536, 3072)
    }
    pairs = {(one["arm"], one["reference"]) for one in report["differences"]}
    assert len(pairs) == len(ARMS) * (len(ARMS) - 1) / 2 and ("skip_parts", "ordinary") in pairs
    assert str(model) not in (tmp_path / "report.json").read_text() + (tmp_path / "report.md").read_text()
    records = {
        arm: json.loads((tmp_path / f"arms/{arm}-0/adapter/longalign_config.json").read_text()) for arm in TRAINED
    }
    assert {arm: record["positions"]["strategy"] for arm, record in records.items()} == {
        "ordinary": "none",
        "skip_parts": "skip_all",
        "skip_turns": "skip_all",
        "long_rows": "none",
    }
    trained_on = {one["arm"]: one for one in report["training"]}
    assert trained_on["long_rows"]["tokens"] / trained_on["long_rows"]["steps"] > 1.5 * (
        trained_on["ordinary"]["tokens"] / trained_on["ordinary"]["steps"]
    )
    assert records["skip_parts"]["coverage"] != records["skip_turns"]["coverage"]


def test_an_arm_may_have_a_share_of_its_own(recipes, model, seeds, tmp_path):
    given = {"rows": 12, "gold_tokens": 100, "dtype": "float32", "skip_probability": 0.3, "cells": CELLS}
    arms = {"skip_context": 0.3, "skip_context_20": 0.2, "skip_context_100": 1.0}
    options = recipes.arms.StudyOptions(str(model), seeds=str(seeds), output_dir=str(tmp_path), arms=[*arms], **given)
    study = recipes.study.Study(options)
    study.compose("data")
    assert {arm: study.trainer(arm, 0)[0].args.skip_probability for arm in arms} == arms


def test_arms_seeds_and_texts_may_be_added_and_nothing_else_changed(recipes, model, seeds, tmp_path):
    given = {"rows": 12, "gold_tokens": 100, "seeds": str(seeds), "output_dir": str(tmp_path), "cells": CELLS}
    options = partial(recipes.arms.StudyOptions, str(model), **{**given, "arms": ["ordinary"]})
    recipes.study.Study(options())
    for more in ({"arms": ["ordinary", "contexts_1"]}, {"training_seeds": [0, 1]}, {"cells": [*CELLS, "2048:1"]}):
        recipes.study.Study(options(**more))
    for name, value in {"perplexity_texts": str(tmp_path), "context_words": 9, "rope_type": "linear"}.items():
        with pytest.raises(
            ValueError, match=f"`{name}` must be .* as in the results in .*, got .*another `output_dir`"
        ):
            recipes.study.Study(options(**{name: value}))


def test_distances_that_rank_as_needles_do(recipes, tmp_path):
    report = recipes.report
    for seed in range(5):
        folder = tmp_path / "arms" / f"ordinary-{seed}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "report").mkdir()
        record = {"distances": {"lengths": [1024], "rows": 4, "before": [9.0], "after": [5.0 - seed**2 / 10]}}
        (folder / "adapter" / "longalign_config.json").write_text(json.dumps(record))
        score = {"task": "multi_key", "length": 1024, "sample": "1024/0/0", "depth": 0.5, "score": seed / 5}
        (folder / "report" / "1024-0.json").write_text(json.dumps({"scores": [score], "seconds": 1.0}))
    (told,) = report.Found(tmp_path, ["ordinary"], "report").agreement()
    assert told == {"length": 1024, "models": 5, "spearman": pytest.approx(-1)}


def test_an_arm_that_was_not_asked_at_one_length_is_drawn_at_the_others(recipes, tmp_path, monkeypatch):
    report = recipes.report
    for arm, lengths in {"ordinary": (1024, 2048, 4096), "pose": (2048, 4096), "plain": (1024,)}.items():
        folder = tmp_path / "arms" / f"{arm}-0" / "report"
        folder.mkdir(parents=True)
        for length in lengths:
            score = {"task": "multi_key", "length": length, "sample": f"{length}/0/0", "depth": 0.5, "score": 1.0}
            (folder / f"{length}-0.json").write_text(json.dumps({"scores": [score], "seconds": 1.0}))
    drawn = []
    monkeypatch.setattr(
        report, "plot_accuracy_by_length", lambda curves, lengths, *_, **__: drawn.append((curves, lengths))
    )
    found = report.Found(tmp_path, ["ordinary", "pose", "plain"], "report")
    assert report.draw(found, {arm: arm for arm in found.scores}, tmp_path) == [*report.PICTURES]
    assert drawn == [({"ordinary": [1.0, 1.0], "pose": [1.0, 1.0]}, [2048, 4096])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "skipp_parts"], "`arms` must be among plain, scaled"),
        (
            ["--learning_rate", "1e-3"],
            "`learning_rate` must be 0.0003, as in the results in .*or another `output_dir`",
        ),
        (["--cells", "3072:1", "256:1"], "`cells` must have room for needles and the passages of a pair, got 256"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    recipes, model, seeds, tmp_path, monkeypatch, options, message
):
    words = command(model, seeds, tmp_path)[1:]
    (given,) = TrlParser([recipes.arms.StudyOptions]).parse_args_and_config(words[1:])
    recipes.study.Study(given)
    monkeypatch.setattr(sys, "argv", [*words, *options])
    with pytest.raises(ValueError, match=message):
        recipes.study.main()
    assert [path.name for path in tmp_path.rglob("*.json")] == ["settings.json"]


def test_what_was_not_asked_is_not_published(recipes, model, seeds, tmp_path, monkeypatch):
    words = command(model, seeds, tmp_path)[2:]
    words = ["study_publish.py", *words, "--hub_model_id", "user/arm", "--push_dry_run", "look"]
    monkeypatch.setattr(sys, "argv", words)
    # Before the rows are pushed: an adapter could not follow them.
    with pytest.raises(ValueError, match="`base_name` must be the Hub id of the model, got none for the folder"):
        recipes.publish.main()
    monkeypatch.setattr(sys, "argv", [*words, "--base_name", "org/base"])
    with pytest.raises(
        ValueError, match=r"`arms` must hold scaled, asked everything, got [1-9].* Run the study to its"
    ):
        recipes.publish.main()
    assert not list(tmp_path.rglob("README.md"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--arm", "plain"])
    with pytest.raises(ValueError, match=r"`arm` must be one of ordinary, skip_parts, skip_turns, .* got 'plain'"):
        recipes.publish.main()


def test_an_arm_is_published_with_its_rows_its_answers_and_the_study(model, seeds, tmp_path):
    study, look = tmp_path / "study", tmp_path / "look"
    arms = ["--arms", "scaled", "ordinary", "skip_context", "--cells", "1536:1", "3072:1", "--base_name", "org/base"]
    words = command(model, seeds, study, *arms)
    publish = [words[0], str(ROOT / "recipes" / "study_publish.py"), *words[2:], "--hub_model_id", "user/arm"]
    publish += ["--license", "mit"]
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        assert forked.run(words, env=environment).returncode == 0
        kept = {path: path.read_bytes() for path in study.rglob("*") if path.is_file() and "claims" not in path.parts}
        done = forked.run([*publish, "--push_dry_run", str(look)], env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not hub.repos and (look / "adapter" / "README.md").exists()
        done = forked.run(publish, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        rows, adapter = hub.files("user/arm-rows"), hub.files("user/arm", "models")
    assert "chat/train-00000-of-00001.parquet" in rows and b"hf_longalign:begin" in rows["README.md"]
    card = adapter["README.md"].decode()
    assert "- user/arm-rows" in card and "base_model: org/base" in card
    report = json.loads(adapter["report.json"])
    assert [one["label"] for one in report["models"]] == ["scaled", "ordinary", "adapter"]
    of_study = json.loads((study / "report.json").read_text())
    told = {(one["group"], one["arm"]): one["value"] for one in of_study["scores"] if one["length"] == 0}
    tasks = {task["task"]: task for suite in report["suites"] for task in suite["tasks"]}
    for group, task in {"one key": "multi_key", "several keys": "multi_query", "passages": "passages"}.items():
        for arm, label in {"scaled": "scaled", "skip_context": "adapter"}.items():
            assert tasks[task]["scores"][label]["value"] == pytest.approx(told[group, arm], abs=0.02)
    ours, _, theirs = card.partition("hf_longalign:end -->")
    assert "## The study it comes from" in ours and "| skip_context − ordinary positions |" in ours
    assert not theirs.strip() and "license: mit" in card
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", card))
    assert "assets/study_heatmap.png" in shown and shown <= adapter.keys()
    assert str(tmp_path) not in card + adapter["report.json"].decode()
    assert all(path.read_bytes() == old for path, old in kept.items() if path.parent != study), "as it was"
