from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longalign.synthesis.conflicts import Rivals
from hf_longalign.synthesis.distractors import bm25_scores, embedding_scores, nearest, offer, shuffled
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
    order = list(offer(groups, np.random.default_rng(seed), nearest=[22, 6, 99], hard_share=hard_share))
    assert sorted(order) == [*range(5, 12), *range(20, 23)]
    easy = [index for index in order if index not in (22, 6)]
    assert easy == sorted(easy, key=lambda index: index >= 20)


def test_the_share_of_hard_ones():
    rng = np.random.default_rng(0)
    first = [next(offer([np.arange(100)], rng, nearest=[7], hard_share=0.5)) for _ in range(2000)]
    assert 0.46 < first.count(7) / 2000 < 0.55
    assert list(offer([np.arange(100)], rng, nearest=[7, 8, 9], hard_share=1.0))[:3] == [7, 8, 9]


def test_bm25_ranks_what_shares_rare_words_first():
    everything = [[np.arange(4)]] * 2
    found = nearest(bm25_scores(["Who built the dam of Ashby?", "Are whales mammals?"], TEXTS), everything, 3)
    assert found[0].tolist()[:2] == [2, 0] and found[1][0] == 3
    assert found.dtype == np.int32 and found.shape == (2, 3)


def test_the_nearest_are_ranked_within_their_source_and_padded():
    groups = [[np.array([0, 1]), np.array([2, 3])]]
    found = nearest(bm25_scores(["Who built the dam of Ashby?"], TEXTS), groups, 3)
    assert found.tolist() == [[0, 1, -1, 2, 3, -1]]


def test_embeddings_rank_the_text_itself_first(tmp_path):
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
    found = nearest(embedding_scores(TEXTS, TEXTS, str(tmp_path)), [[np.arange(4)]] * 4, 2)
    assert found[:, 0].tolist() == [0, 1, 2, 3] and found.shape == (4, 2)


def test_rivals_share_what_is_asked_for():
    rivals = Rivals(TEXTS)
    question = "Who finished the dam of Ashby in 1913?"
    assert [rivals.covers(question, content_words(text)) for text in TEXTS] == [False, False, True, False]
    assert rivals.covers("What is it?", content_words(TEXTS[3]))  # nothing but common words: every text could be meant
