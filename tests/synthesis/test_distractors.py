import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longalign.synthesis.pool import Pool, Rivals, by_bm25, by_embeddings, nearest, offer, shuffled
from hf_longalign.synthesis.seeds import Document
from hf_longalign.text import content_words


TEXTS = [
    "The dam of Thornwick was finished in 1912 by Ada Lovell.",
    "The film Swans was shot in Paris and released in 1976.",
    "The dam of Ashby was finished in 1913 by Eve Holt.",
    "Whales are mammals and live in every ocean.",
]


@given(st.lists(st.integers(), unique=True), st.integers(0, 2**32))
def test_shuffled_is_a_permutation(items, seed):
    assert sorted(shuffled(items, np.random.default_rng(seed))) == sorted(items)


def test_every_order_is_as_likely():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(shuffled([0, 1, 2], rng)) for _ in range(6000))
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5  # 5 degrees of freedom, p = 0.001


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_every_context_is_offered_once_and_the_first_source_first(seed, hard_share):
    groups = [np.arange(5, 12), np.arange(20, 23)]
    near = [[6, -1], [22, -1]]
    order = list(offer(groups, np.random.default_rng(seed), own=8, nearest=near, hard_share=hard_share))
    assert sorted(order) == [5, 6, 7, 9, 10, 11, 20, 21, 22]
    assert order == sorted(order, key=lambda index: index >= 20)


def test_the_share_of_hard_ones():
    rng = np.random.default_rng(0)
    first = [next(offer([np.arange(100)], rng, nearest=[[7]], hard_share=0.5)) for _ in range(2000)]
    assert 0.46 < first.count(7) / 2000 < 0.55
    assert list(offer([np.arange(100)], rng, nearest=[[7, 8, 9]], hard_share=1.0))[:3] == [7, 8, 9]


def make_pool(rows, documents=(), test=(), folder=None):
    """A pool of (task, instruction, context) rows."""
    columns = {
        "seed_id": [f"s{number}" for number in range(len(rows))],
        "task": [task for task, _, _ in rows],
        "title": [None] * len(rows),
        "instruction": [instruction for _, instruction, _ in rows],
        "context": [context for _, _, context in rows],
        "checks": [[{"name": "support", "outcome": "passed", "detail": ""}]] * len(rows),
    }
    in_test = np.isin(np.arange(len(rows)), list(test))
    return Pool(pa.table(columns), [Document(text, "d.txt") for text in documents], in_test, folder)


QUESTIONS = [
    "Who built the dam of Thornwick?",
    "Who shot Swans?",
    "Who built the dam of Ashby?",
    "Are whales mammals?",
]
ROWS = [("qasper", question, text) for question, text in zip(QUESTIONS, TEXTS, strict=True)]


def test_groups_hold_what_a_row_may_take():
    tasks = ["qasper", "qmsum", "qasper", "qmsum", "qasper"]
    pool = make_pool([(task, "Why?", "x") for task in tasks], ["one", "two"], test=[2, 3])
    sources = ["same_task", "other_tasks", "documents"]
    assert [group.tolist() for group in pool.groups(0, sources)] == [[0, 4], [1], [5, 6]]
    # A row of the test split may see what is trained on, not the other way round.
    assert [group.tolist() for group in pool.groups(2, sources)] == [[0, 2, 4], [1, 3], [5, 6]]
    assert pool.groups(0, sources)[0] is pool.groups(4, sources)[0]  # nothing is looked for row by row


def test_bm25_ranks_what_shares_rare_words_first():
    pool = make_pool(ROWS)
    found = nearest(pool, ["same_task"], by_bm25(pool, QUESTIONS), neighbours=2)
    assert found.shape == (4, 1, 2) and found.dtype == np.int32
    assert found[:, 0, 0].tolist()[0] == 2 and found[:, 0, 0].tolist()[2] == 0


@pytest.mark.parametrize("compared", [1000, 25])
def test_the_nearest_are_those_of_a_full_ranking(compared):
    rng = np.random.default_rng(0)
    tasks = [("qasper", "qmsum")[number % 3 == 0] for number in range(60)]
    pool = make_pool([(task, "Why?", "x") for task in tasks], ["d"] * 1, test=range(0, 60, 7))
    scores = rng.integers(0, 20, (60, 61)).astype(float)  # ties too
    sources = ["same_task", "other_tasks", "documents"]
    found = nearest(pool, sources, lambda texts: lambda row: scores[row][texts], neighbours=5, compared=compared)
    for row in range(60):
        for place, group in enumerate(pool.groups(row, sources)):
            allowed = [int(index) for index in group if index != row]
            kept = [int(index) for index in found[row, place] if index >= 0]
            assert set(kept) <= set(allowed) and len(set(kept)) == len(kept)
            best = sorted(allowed, key=lambda index: (-scores[row, index], index))[:5]
            if compared == 1000:
                assert kept == best
            else:
                assert kept == sorted(kept, key=lambda index: (-scores[row, index], index))
                assert len(kept) >= min(len(allowed), 1)


def test_embeddings_rank_the_most_alike_first(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = sorted({word for text in TEXTS for word in text.lower().replace(".", " .").split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pool = make_pool(ROWS)
    asked = [TEXTS[2], TEXTS[0], TEXTS[3], TEXTS[1]]
    found = nearest(pool, ["same_task"], by_embeddings(pool, asked, str(tmp_path)), neighbours=2)
    assert found[:, 0, 0].tolist() == [2, 0, 3, 1]


def test_rivals_share_what_is_asked_for(tmp_path):
    rivals = Rivals(tmp_path / "texts", TEXTS)
    asked = rivals.asked("Who finished the dam of Ashby in 1913?")
    assert [rivals.covers(asked, index) for index in range(4)] == [False, False, True, False]
    # Nothing but common words: every text could be meant.
    assert rivals.covers(rivals.asked("What is it?"), 3)
    short = Rivals(tmp_path / "short", ["", "dam of dam"])
    assert [len(short.words(index)) for index in range(2)] == [0, 1]
    assert Rivals(tmp_path / "none", [""]).covers(short.asked("What is it?"), 0)


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6), st.sampled_from(QUESTIONS))
def test_hashed_words_decide_as_words_do(texts, question):
    with tempfile.TemporaryDirectory() as folder:
        rivals = Rivals(Path(folder), texts)
    asked = content_words(question)
    counts = {word: sum(word in content_words(text) for text in texts) for word in asked}
    weight = {word: np.log((len(texts) + 1) / (counts[word] + 1)) for word in asked}
    total = sum(weight.values())
    for index, text in enumerate(texts):
        held = sum(weight[word] for word in asked & content_words(text))
        assert rivals.covers(rivals.asked(question), index) == (held >= 0.8 * total - 1e-9)


def test_a_distractor_conflicts_where_it_asks_the_same_or_holds_what_is_asked(tmp_path):
    more = ("qasper", "Who built the dam of thornwick", "Nothing.")
    pool = make_pool([*ROWS, more], ["Ada built the dam of Thornwick."], folder=tmp_path)
    conflicts = pool.conflict(0)
    assert [conflicts(other) for other in range(1, 6)] == [False, False, False, True, True]
