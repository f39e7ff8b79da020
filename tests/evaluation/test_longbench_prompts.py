"""LongBench's rows and prompts: files in its format, its texts, and middles cut out to fit."""

import ast
import importlib.util
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_longalign.evaluation.longbench import (
    EVEN_TASKS,
    TASKS,
    V2,
    cut_middle,
    cut_to_fit,
    expand_tasks,
    longbench_prompts,
    read_rows,
    score_longbench,
)
from hf_longalign.evaluation.options import SuiteOptions
from hf_longalign.evaluation.prompt import encode_text
from hf_longalign.longbench_prompts import TEMPLATES
from tests.tiny import tiny_tokenizer


SEEDS = Path(__file__).parents[3] / "shared/data"
# What each task's answers look like, so that the gold answer scores 1.
ANSWERS = {"passage_count": "12", "passage_retrieval_en": "Paragraph 12", "passage_retrieval_zh": "段落12"}
# lm-eval moved white space of these into its own copy of the data.
MOVED = {"triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"}


def _row(**changes):
    row = {
        "input": "Which town sold salt?",
        "context": "Ardel sold salt. {Bemo} sold wool.",
        "answers": ["Ardel", "the town of Ardel"],
        "length": 6,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "0",
    }
    return {**row, **changes}


def _v2_row(**changes):
    row = {
        "_id": "0",
        "domain": "Single-Document QA",
        "difficulty": "hard",
        "length": "short",
        "question": " Which town sold salt? ",
        "choice_A": "Bemo",
        "choice_B": "Ardel ",
        "choice_C": "Cato {input}",
        "choice_D": "Dunra",
        "answer": "B",
        "context": "\nArdel sold salt. {Bemo} sold wool.\n",
    }
    return {**row, **changes}


def bos_tokenizer():
    """One that begins every text with a special token, as Llama's do, and decodes words without the first blank."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(
        [*TEMPLATES.values(), "Ardel sold salt, glass and honey. The fair was in May."], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    made.chat_template = "{{ bos_token }}[INST]{{ messages[0]['content'] }}[/INST]"
    return made


def published_cut(prompt, tokenizer, max_length):
    """The cut of LongBench v1's script, step by step, in plain lists."""
    read = tokenizer(prompt, truncation=False).input_ids
    if not len(read) > max_length:
        return prompt
    half = int(max_length / 2)
    begin = tokenizer.decode([read[place] for place in range(half)], skip_special_tokens=True)
    end = tokenizer.decode([read[place] for place in range(len(read) - half, len(read))], skip_special_tokens=True)
    return begin + end


def _write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _prompts(tasks, source, **options):
    return list(
        longbench_prompts(tasks, source=source, **{"tokenizer": tiny_tokenizer(), "max_length": 100_000, **options})
    )


def test_a_prompt_is_the_task_s_template_with_the_row(tmp_path):
    _write(tmp_path / "hotpotqa.jsonl", _row(), _row(answers=["no {input}"]))
    first, second = _prompts(["hotpotqa"], tmp_path)
    assert first.text == (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nThe following are given passages.\nArdel sold salt. {Bemo} sold wool.\n\n"
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\n"
        "Question: Which town sold salt?\nAnswer:"
    )
    assert (first.suite, first.task, first.index, second.index) == ("longbench", "hotpotqa", 0, 1)
    assert (first.answers, first.max_new_tokens, first.chat, first.stop) == (
        ("Ardel", "the town of Ardel"),
        32,
        True,
        (),
    )
    assert (first.length, first.depth, first.classes) == (None, None, ())
    assert first.key != second.key


def test_few_shot_and_code_tasks_never_go_through_the_chat_template(tmp_path):
    for task in TASKS:
        _write(tmp_path / f"{task}.jsonl", _row(all_classes=["Ardel", "Bemo"]))
    plain = {prompt.task for prompt in _prompts(["all"], tmp_path) if not prompt.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert not any(prompt.chat for prompt in _prompts(["all"], tmp_path, chat=False))
    assert [p.classes for p in _prompts(["trec"], tmp_path)] == [("Ardel", "Bemo")]
    assert [p.task for p in _prompts(["all"], tmp_path) if p.stop] == ["samsum"]


@pytest.mark.parametrize("task", TASKS)
def test_a_gold_answer_scores_one_and_junk_nothing(task, tmp_path):
    gold = ANSWERS.get(task, "Ardel")
    _write(tmp_path / f"{task}.jsonl", _row(answers=[gold], all_classes=["Ardel", "Bemo"]))
    if task in {"multifieldqa_zh", "dureader", "vcsum"}:
        pytest.importorskip("jieba", reason="jieba is not installed (extra: eval)")
    (prompt,) = _prompts([task], tmp_path)
    assert score_longbench(prompt, gold) == {TASKS[task].metric: pytest.approx(1, abs=1e-7)}
    assert score_longbench(prompt, "zzz 77\n") == {TASKS[task].metric: pytest.approx(0, abs=1e-7)}


def test_templates_are_those_of_another_copy():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0])
    tree = ast.parse((folder / "tasks/longbench/_generate_config.py").read_text(encoding="utf-8"))
    copies = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("dataset2prompt", "dataset2maxlen")
    }
    ours = {task: template for task, template in TEMPLATES.items() if task not in MOVED}
    assert ours == {task: copies["dataset2prompt"][task].replace("{question}", "{input}") for task in ours}
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == copies["dataset2maxlen"]
    assert list(TEMPLATES) == list(TASKS)


def test_files_folders_and_archives_give_the_same_prompts(tmp_path):
    file = _write(tmp_path / "unpacked/data/hotpotqa_e.jsonl", _row(), _row(input="Which sold wool?"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(file, "data/hotpotqa_e.jsonl")
    sources = [file, file.parent, tmp_path / "unpacked", tmp_path / "data.zip", str(tmp_path / "data.zip")]
    keys = {tuple(prompt.key for prompt in _prompts(["hotpotqa_e"], source)) for source in sources}
    assert len(keys) == 1
    assert len(_prompts(["hotpotqa_e"], file, limit=1)) == 1
    assert [row.parts for row in read_rows("hotpotqa_e", file)] == [("0-4k",)] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: broken JSON at character"),
        ("[]", r"line 2: a JSON list, not an object"),
        (
            json.dumps({"context": "a", "answers": ["b"], "length": 1}),
            r"line 2: `input` must be a text, got no such column",
        ),
        (json.dumps(_row(answers=[])), r"line 2: `answers` must be a list of one or more texts, got \[\]"),
        (json.dumps(_row(answers="Ardel")), r"line 2: `answers` must be a list"),
        (json.dumps(_row(context=None)), r"line 2: `context` must be a text, got None"),
        (json.dumps(_row(length="6")), r"line 2: `length` must be a number of words, got '6'"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(line, message, tmp_path):
    path = tmp_path / "hotpotqa_e.jsonl"
    path.write_text(json.dumps(_row()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"hotpotqa_e\.jsonl, " + message):
        list(read_rows("hotpotqa_e", tmp_path))


def test_a_classification_row_needs_its_classes(tmp_path):
    _write(tmp_path / "trec.jsonl", _row())
    with pytest.raises(ValueError, match=r"line 1: `all_classes` must be a list of texts, got None"):
        _prompts(["trec"], tmp_path)


def test_missing_sources_and_unknown_tasks_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"got 'hotpotQA'\. Set it to one of hotpotqa"):
        expand_tasks(["hotpotQA"])
    with pytest.raises(ValueError, match="must name a task"):
        expand_tasks([])
    with pytest.raises(ValueError, match="got 'hotpotQA'"):  # before a model is loaded
        SuiteOptions(suites=["longbench"], longbench_tasks=["hotpotQA"], output_dir=str(tmp_path)).check()
    with pytest.raises(FileNotFoundError, match=r"must hold musique\.jsonl .*, got the folder"):
        _prompts(["musique"], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl', which is not there"):
        _prompts(["musique"], "nowhere.jsonl")
    path = _write(tmp_path / "hotpotqa.jsonl", _row())
    with pytest.raises(FileNotFoundError, match=r"must be musique\.jsonl to have the task 'musique'"):
        _prompts(["musique"], path)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(path, "data/hotpotqa.jsonl")
    with pytest.raises(FileNotFoundError, match="got the archive"):
        _prompts(["musique"], tmp_path / "data.zip")


def test_without_the_hub_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nobody/data-v1.1"):
        with pytest.raises(ConnectionError, match=rf"'{name}'.*Download its data\.zip .* set `longbench_source`"):
            _prompts(["musique"], name)


def test_a_missing_word_cutter_is_told_before_anything_is_asked(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jieba", None)
    row = _row(answers=["段落1"])
    for task in ("dureader", "passage_retrieval_zh"):
        _write(tmp_path / f"{task}.jsonl", row)
    with pytest.raises(ImportError, match="`jieba` is not installed"):
        _prompts(["dureader"], tmp_path)
    assert _prompts(["passage_retrieval_zh"], tmp_path)


def test_sets_of_tasks():
    assert expand_tasks(["context_synthesis"]) == [
        "narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum", "multi_news",
    ]  # fmt: skip
    assert len(expand_tasks(["all"])) == 21
    assert sorted(EVEN_TASKS) == [
        "2wikimqa_e", "gov_report_e", "hotpotqa_e", "lcc_e", "multi_news_e", "multifieldqa_en_e", "passage_count_e",
        "passage_retrieval_en_e", "qasper_e", "repobench-p_e", "samsum_e", "trec_e", "triviaqa_e",
    ]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(alphabet=st.sampled_from("abc de\n北é🙂"), min_size=60, max_size=300),
    room=st.integers(25, 120),
    chat=st.booleans(),
)
def test_what_is_cut_fits_and_keeps_both_ends(text, room, chat):
    tokenizer = tiny_tokenizer()
    cut = cut_to_fit(text, tokenizer, room, chat=chat)
    length = len(encode_text(tokenizer, cut, chat=chat))
    assert length <= room
    if len(encode_text(tokenizer, text, chat=chat)) <= room:
        assert cut == text
        return
    # The ends stand, but for half a character at the joint, and hardly any of the room is left over.
    head = max(n for n in range(len(cut)) if text.startswith(cut[:n]))
    tail = max(n for n in range(len(cut)) if text.endswith(cut[len(cut) - n :]))
    assert cut[head : len(cut) - tail].strip("\ufffd") == ""
    assert length >= room - 16


def test_ascii_is_cut_in_the_exact_middle():
    tokenizer = tiny_tokenizer()
    text = "".join(chr(33 + index % 90) for index in range(400))
    token_ids = tokenizer(text)["input_ids"]
    overhead = len(encode_text(tokenizer, "x", chat=True)) - 1
    cut = cut_to_fit(text, tokenizer, 100 + overhead, chat=True)
    assert cut == tokenizer.decode(token_ids[:50]) + tokenizer.decode(token_ids[-50:])


def test_a_cut_prompt_leaves_room_for_its_answer(tmp_path):
    _write(tmp_path / "hotpotqa.jsonl", _row(context="Ardel sold salt. " * 400))
    tokenizer = tiny_tokenizer()
    (prompt,) = _prompts(["hotpotqa"], tmp_path, tokenizer=tokenizer, max_length=512)
    length = len(encode_text(tokenizer, prompt.text, chat=True))
    assert 470 <= length <= 512 - 32
    assert prompt.text.startswith("Answer the question") and prompt.text.endswith("sold salt?\nAnswer:")


def test_a_length_without_room_is_refused(tmp_path):
    _write(tmp_path / "gov_report.jsonl", _row())
    with pytest.raises(ValueError, match="`max_length` must leave room"):
        _prompts(["gov_report"], tmp_path, max_length=512)


@pytest.mark.skipif(not SEEDS.is_dir(), reason="seed data are not here")
def test_real_questions_in_longbench_s_format(tmp_path):
    contexts = [json.loads(line)["context"] for line in (SEEDS / "seed_context/hotpotqa.jsonl").open(encoding="utf-8")]
    seeds = [json.loads(line) for line in (SEEDS / "seed_instruction/hotpotqa.jsonl").open(encoding="utf-8")]
    rows = [
        _row(context=context, input=seed["instruction"], answers=[seed["answer"]], length=len(context.split()))
        for context, seed in list(zip(contexts, seeds, strict=True))[:20]
    ]
    _write(tmp_path / "hotpotqa.jsonl", *rows)
    prompts = _prompts(["hotpotqa"], tmp_path, max_length=2048)
    assert len({prompt.key for prompt in prompts}) == 20
    gold = [score_longbench(prompt, prompt.answers[0])["qa_f1"] for prompt in prompts]
    junk = [score_longbench(prompt, "zzz qqq")["qa_f1"] for prompt in prompts]
    assert gold == [1.0] * 20
    assert junk == [0.0] * 20
    assert all(len(encode_text(tiny_tokenizer(), prompt.text, chat=True)) <= 2048 - 32 for prompt in prompts)


@pytest.mark.parametrize("make", [tiny_tokenizer, bos_tokenizer])
@pytest.mark.parametrize("length", [100, 351, 3500])
def test_a_prompt_of_a_published_length_is_cut_token_for_token_as_published(make, length, tmp_path):
    tokenizer = make()
    words = ["Ardel ", "sold", " salt,", "\n", "  ", "glass", "é", "<s>", "."]
    texts = [
        "".join(words[(seed * 7 + place * place + place // 3) % 9] for place in range(60 + 8 * seed))
        for seed in range(100)
    ]
    for task in ("hotpotqa", "lcc"):
        _write(tmp_path / f"{task}.jsonl", *(_row(context=text) for text in texts))
        prompts = _prompts([task], tmp_path, tokenizer=tokenizer, longbench_length=length)
        whole = [TEMPLATES[task].format(context=text, input="Which town sold salt?") for text in texts]
        expected = [published_cut(text, tokenizer, length) for text in whole]
        assert [prompt.text for prompt in prompts] == expected
        assert [prompt.shortened for prompt in prompts] == [
            cut != text for cut, text in zip(expected, whole, strict=True)
        ]
    assert length == 3500 or any(cut != text for cut, text in zip(expected, whole, strict=True))


def test_v2_joins_both_ends_before_it_decodes(tmp_path):
    tokenizer, text = bos_tokenizer(), "Ardel sold salt, glass and honey. " * 40
    ids = tokenizer(text).input_ids
    for length in (90, 91):
        expected = tokenizer.decode([*ids[: length // 2], *ids[-(length - length // 2) :]], skip_special_tokens=True)
        assert cut_middle(text, tokenizer, length, joined=True) == expected
    differs = [
        cut_middle(text, tokenizer, n) != cut_middle(text, tokenizer, n, joined=True) for n in range(20, 120, 2)
    ]
    assert any(differs), "at some joints a blank is lost by decoding the end alone"


def test_a_published_length_must_fit_into_the_range(tmp_path):
    _write(tmp_path / "hotpotqa.jsonl", _row(context="Ardel sold salt. " * 400))
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        ValueError, match=r"leave room for the template and 32 tokens .* range of 512, .* Set (\d+) or"
    ) as info:
        _prompts(["hotpotqa"], tmp_path, tokenizer=tokenizer, max_length=512, longbench_length=500)
    advised = int(re.search(r"Set (\d+) or less", str(info.value))[1])
    (prompt,) = _prompts(["hotpotqa"], tmp_path, tokenizer=tokenizer, max_length=512, longbench_length=advised)
    assert len(encode_text(tokenizer, prompt.text, chat=True)) <= 512 - 32
    for length in (1, 513):
        with pytest.raises(
            ValueError, match=f"`longbench_length` must be from 2 to the model's range of 512 tokens, got {length}"
        ):
            _prompts(["hotpotqa"], tmp_path, tokenizer=tokenizer, max_length=512, longbench_length=length)


def test_longbench_e_rows_know_their_range_of_lengths(tmp_path):
    _write(tmp_path / "hotpotqa_e.jsonl", *(_row(length=length) for length in (3999, 4000, 7999, 8000)))
    _write(tmp_path / "hotpotqa.jsonl", _row(length=9000))
    assert [prompt.parts for prompt in _prompts(["hotpotqa_e"], tmp_path)] == [
        ("0-4k",),
        ("4-8k",),
        ("4-8k",),
        ("8k+",),
    ]
    assert [prompt.parts for prompt in _prompts(["hotpotqa"], tmp_path)] == [()]
    row = _row()
    del row["length"]
    _write(tmp_path / "hotpotqa_e.jsonl", row)
    with pytest.raises(ValueError, match="line 1: `length` must be a number of words, got no such column"):
        _prompts(["hotpotqa_e"], tmp_path)


def test_v2_asks_for_a_letter_in_its_own_words(tmp_path):
    rows = [_v2_row(), _v2_row(answer="D", difficulty="easy", length="long")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    _write(tmp_path / "lines" / "longbench_v2.jsonl", *rows)
    first, second = _prompts(["v2"], tmp_path)
    assert first.text == (
        "Please read the following text and answer the question below.\n\n"
        "<text>\nArdel sold salt. {Bemo} sold wool.\n</text>\n\n"
        "What is the correct answer to this question: Which town sold salt?\n"
        "Choices:\n(A) Bemo\n(B) Ardel\n(C) Cato {input}\n(D) Dunra\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (first.task, first.answers, first.max_new_tokens, first.chat) == (V2, ("B",), 128, True)
    assert [prompt.parts for prompt in (first, second)] == [("hard", "short"), ("easy", "long")]
    assert score_longbench(first, "The correct answer is (B).") == {"choice": 1.0}
    for source in (tmp_path / "data.json", tmp_path / "lines"):
        assert [prompt.key for prompt in _prompts([V2], source)] == [first.key, second.key]
    _write(tmp_path / "lines" / "longbench_v2.jsonl", _v2_row(context="Ardel sold salt. " * 400))
    (prompt,) = _prompts(["v2"], tmp_path / "lines", longbench_length=300)
    whole = first.text.replace("Ardel sold salt. {Bemo} sold wool.", ("Ardel sold salt. " * 400).strip())
    assert prompt.text == cut_middle(whole, tiny_tokenizer(), 300, joined=True) and prompt.shortened


def test_a_bad_v2_row_and_a_folder_without_v2_are_named(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([_v2_row(), _v2_row(answer="E")]))
    with pytest.raises(ValueError, match=r"data\.json, row 2: `answer` must be one of A, B, C, D, got 'E'"):
        _prompts(["v2"], tmp_path)
    (tmp_path / "data.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold data\.json to have LongBench v2"):
        _prompts(["v2"], tmp_path)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", json.dumps(_row()))
    with pytest.raises(FileNotFoundError, match=r"must be data\.json to have LongBench v2"):
        _prompts(["v2"], tmp_path / "data.zip")


def test_v2_comes_from_a_data_set_of_its_own_on_the_hub(monkeypatch, tmp_path):
    asked = []

    def download(name, file, repo_type):
        asked.append((name, file, repo_type))
        raise OSError("no network")

    monkeypatch.setattr("hf_longalign.evaluation.longbench.hf_hub_download", download)
    for task in ("musique", "v2"):
        with pytest.raises(ConnectionError, match="no network"):
            _prompts([task], None)
    assert asked == [("zai-org/LongBench", "data.zip", "dataset"), ("zai-org/LongBench-v2", "data.json", "dataset")]
