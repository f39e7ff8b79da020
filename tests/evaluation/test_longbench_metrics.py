"""LongBench's metrics against values worked out by hand and against another copy of its script."""

import difflib
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longalign.evaluation import longbench_metrics as metrics
from hf_longalign.evaluation.longbench import EVEN_TASKS, GROUPS, TASKS, find_task, score_longbench
from hf_longalign.evaluation.longbench_metrics import METRICS, rouge_l
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.evaluation.results import group_means
from hf_longalign.records.report import Score, TaskResult


ENGLISH = st.lists(
    st.sampled_from(
        ["the", "An", "cat", "cat's", "Cat", "sat", "3-1", "12", ".", "...", " ", "\n", "`x`", "#", "on."]
    ),
    max_size=12,
).map(" ".join)
CHINESE = st.lists(
    st.sampled_from(["北京", "是", "中国的首都", "，", "。", "A", "b", " ", "段落", "12", "会议", "讨论了", "预算"]),
    max_size=10,
).map("".join)


def _prompt(task, *answers, classes=()):
    return Prompt("longbench", task, 0, "text", answers, 8, classes=classes)


def _harness():
    """lm-eval's copy of LongBench's metrics, which calls jieba, rouge and fuzzywuzzy itself."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")
    pytest.importorskip("rouge", reason="rouge is not installed (extra: test)")
    copy = pytest.importorskip("lm_eval.tasks.longbench.metrics", reason="fuzzywuzzy is not installed (extra: test)")
    copy.fuzz.SequenceMatcher = difflib.SequenceMatcher  # whatever else is installed
    return copy


@pytest.mark.parametrize(
    ("task", "answer", "references", "expected"),
    [
        ("hotpotqa", "The Georgia Peach", ["Georgia Peach"], 1.0),
        ("hotpotqa", "Ty Cobb, the Georgia Peach", ["Georgia Peach"], 2 * (2 / 4 * 1) / (2 / 4 + 1)),
        ("hotpotqa", "no", ["yes"], 0.0),
        ("qasper", "a BERT model", ["unanswerable", "model of BERT"], 2 * (1 * 2 / 3) / (1 + 2 / 3)),
        ("narrativeqa", "cat cat", ["cat"], 2 * (1 / 2 * 1) / (1 / 2 + 1)),
        # Empty pieces between full stops are dropped; "" behind the last one with a blank is a word of its own.
        ("gov_report", "", ["a report"], 0.0),
        ("gov_report", "dams leak.", ["dams leak."], 2 / (2 + 1e-8)),
        ("qmsum", "b a", ["a b"], 2 * (0.5 * 0.5 / (1 + 1e-8))),
        ("multi_news", "a b. c", ["c. a b"], 2 / (2 + 1e-8)),
        ("samsum", "\n\nAmy left.\nDialogue: more", ["Amy left."], 2 / (2 + 1e-8)),
        ("triviaqa", "Paris\nPassage: London", ["Paris"], 1.0),
        ("passage_count", "There are 12 of 30", ["12"], 0.5),
        ("passage_count", "many", ["12"], 0.0),
        ("passage_retrieval_en", "Paragraph 3, 3 or 4", ["Paragraph 3"], 2 / 3),
        ("passage_retrieval_zh", "段落7", ["段落7"], 1.0),
        ("lcc", "\n```python\n# sum\nreturn a + b", ["return a + b"], 1.0),
        # difflib: "abc" and "cadb" share "a" and "b" alone, 2 * 2 / 7; Levenshtein's ratio would be the same by luck.
        ("lcc", "abc", ["cadb"], 0.57),
        # "ab" is taken first, at the ends, so nothing else matches: 2 * 2 / 12, where Levenshtein's ratio is 0.67.
        ("repobench-p", "ababab", ["aaaaab"], 0.33),
        ("repobench-p", "# only a comment", ["x = 1"], 0.0),
        ("longbench_v2", "The correct answer is **(C)** because", ["C"], 1.0),
        ("longbench_v2", "The correct answer is C.", ["C"], 1.0),
        ("longbench_v2", "The correct answer is A, no: The correct answer is (B)", ["B"], 1.0),
        ("longbench_v2", "The correct answer is A or The correct answer is D", ["D"], 0.0),
        ("longbench_v2", "the correct answer is (C)", ["C"], 0.0),
        ("longbench_v2", "C", ["C"], 0.0),
    ],
)
def test_scores_worked_out_by_hand(task, answer, references, expected):
    score = score_longbench(_prompt(task, *references), answer)
    assert score == {find_task(task).metric: pytest.approx(expected, abs=1e-9)}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Individual", 1.0),
        ("Individual or City", 0.5),
        ("Group or organization of person", 0.0),
        ("nothing", 0.0),
        ("Individual\nType: City", 1.0),
    ],
)
def test_classification_shares_the_point_among_the_classes_named(answer, expected):
    classes = ("Group or organization of person", "Individual", "City")
    assert score_longbench(_prompt("trec", "Individual", classes=classes), answer)["classification"] == expected


def test_a_shorter_class_inside_the_right_one_does_not_count_but_its_neighbour_does():
    classes = ["Other", "Other location", "Other location, city"]
    # "Other" is taken out, which skips "Other location"; so two classes remain.
    assert metrics.classification("Other location, city", "Other location, city", classes) == 0.5


def test_a_retrieval_reference_without_a_number_is_refused():
    with pytest.raises(ValueError, match=r"`answers` must hold 'Paragraph ' and a number, got 'twelve'"):
        score_longbench(_prompt("passage_retrieval_en", "twelve"), "12")


@settings(deadline=None)
@given(answer=ENGLISH, reference=ENGLISH)
def test_english_metrics_equal_the_script(answer, reference):
    copy = _harness()
    assert metrics.qa_f1(answer, reference) == pytest.approx(copy.qa_f1_score(answer, reference), abs=1e-12)
    assert rouge_l(answer, reference) == pytest.approx(copy.rouge_score(answer, reference), abs=1e-12)
    assert metrics.number_share(answer, "12") == copy.count_score(answer, "12")
    assert metrics.retrieval(answer, "Paragraph 12", word="Paragraph ") == copy.retrieval_score(answer, "Paragraph 12")
    line = answer.replace("`", "").replace("#", "").replace("\n", "") + "x"  # lm-eval's copy skips blank lines
    assert metrics.code_similarity(line, reference) == copy.code_sim_score(line, reference)


@settings(deadline=None, max_examples=50)
@given(answer=CHINESE, reference=CHINESE)
def test_chinese_metrics_equal_the_script(answer, reference):
    copy = _harness()
    pytest.importorskip("jieba", reason="jieba is not installed (extra: eval)")
    assert METRICS["qa_f1_zh"](answer, reference, ()) == pytest.approx(
        copy.qa_f1_zh_score(answer, reference), abs=1e-12
    )
    assert METRICS["rouge_l_zh"](answer, reference, ()) == pytest.approx(
        copy.rouge_zh_score(answer, reference), abs=1e-12
    )
    assert METRICS["retrieval_zh"](answer, "段落12", ()) == copy.retrieval_zh_score(answer, "段落12")


@given(
    classes=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=8, unique=True),
    answer=st.text("ab ", max_size=8),
    data=st.data(),
)
def test_classification_equals_the_script(classes, answer, data):
    reference = data.draw(st.sampled_from(classes))
    expected = _harness().classification_score(answer, reference, all_classes=classes)
    assert metrics.classification(answer, reference, classes) == expected


def test_rouge_scores_long_sentences_on_which_the_package_runs_out_of_stack():
    assert rouge_l("a b " * 500, "a c " * 500) == pytest.approx(2 * (0.25 / (1 + 1e-8)))


def test_missing_jieba_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r'pip install "hf_longalign\[eval\]"'):
        score_longbench(_prompt("dureader", "北京"), "北京")


def test_averages_equal_the_published_table():
    # GPT-3.5-Turbo-16k's row in LongBench's README, English: tasks, then groups, then the average of the groups.
    scores = {
        "narrativeqa": 23.6,
        "qasper": 43.3,
        "multifieldqa_en": 52.3,
        "hotpotqa": 51.6,
        "2wikimqa": 37.7,
        "musique": 26.9,
        "gov_report": 29.5,
        "qmsum": 23.4,
        "multi_news": 26.7,
        "trec": 68.0,
        "triviaqa": 91.4,
        "samsum": 41.7,
        "passage_count": 4.5,
        "passage_retrieval_en": 71.0,
        "lcc": 54.7,
        "repobench-p": 53.6,
    }
    tasks = [TaskResult(task, scores={"gpt": Score(score)}) for task, score in scores.items()]
    groups = {result.group: result.scores["gpt"] for result in group_means(tasks, GROUPS)}
    del groups["average"]
    published = [39.8, 38.7, 26.5, 67.1, 37.8, 54.1]
    assert list(groups) == list(GROUPS)[:6]
    assert list(groups.values()) == pytest.approx(published, abs=0.1)
    assert sum(groups.values()) / 6 == pytest.approx(44.0, abs=0.05)


def test_every_task_is_in_one_group():
    assert sorted(task for tasks in GROUPS.values() for task in tasks) == sorted([*TASKS, *EVEN_TASKS])
