import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longalign.synthesis.compose import FILL_TOLERANCE, BudgetError, Piece, Ruler, compose


PROMPT = ("Read.\n\n", "Question: who?\nAnswer:")
ANSWER = "Ada Lovelace."

# Ways to count: three that tokenizers come near, and two that are not additive; one of these makes every joint far
# dearer than it looks.
COUNTS = {
    "words": lambda text: len(text.split()),
    "characters": len,
    "pieces": lambda text: len(re.findall(r"\w{1,4}|[^\w\s]|\n+", text)),
    "dear joints": lambda text: len(text.split()) + (6 * text.count("\n\n") if text.split() else 1),
    "not additive": lambda text: len(text.split()) + max(map(len, text.split()), default=0) + text.count("\n\n") % 3,
}
WORDS = st.lists(
    st.sampled_from(["a", "dam", "was", "built", "in", "1912.", "naïve", "水坝。"]), min_size=1, max_size=60
)


def ruler(count, budget):
    return Ruler(budget, count, lambda content: 5 + count(content) + count(ANSWER))


def pieces(texts, count=lambda text: 0):
    return [Piece(text, number, count(text)) for number, text in enumerate(texts)]


def check_offsets(made, gold, texts):
    """Raise where a span is not what it says, and return how many texts were cut."""
    cut = 0
    assert made.content[slice(*made.contexts[made.gold_index])] == gold.text
    assert made.content[slice(*made.question)] == PROMPT[1] and made.question[1] == len(made.content)
    for number, (span, source) in enumerate(zip(made.contexts, made.sources, strict=True)):
        if number == made.gold_index:
            continue
        whole, shown = texts[source], made.content[slice(*span)]
        assert shown and whole.startswith(shown)
        cut += shown != whole
    joined = "\n\n".join(made.content[slice(*span)] for span in made.contexts)
    assert made.content == f"{PROMPT[0]}{joined}\n\n{PROMPT[1]}"
    return cut


@given(st.lists(WORDS.map(" ".join), max_size=12), WORDS.map(" ".join), st.integers(0, 15), st.integers(0, 2**32))
def test_a_number_of_contexts(texts, text, limit, seed):
    gold = Piece(text, -1)
    made = compose(gold, iter(pieces(texts)), PROMPT, np.random.default_rng(seed), limit=limit)
    assert len(made.contexts) == 1 + min(limit, len(texts))
    assert made.tokens == 0
    assert sorted(made.sources) == [-1, *range(min(limit, len(texts)))]
    assert check_offsets(made, gold, texts) == 0
    sizes = [end - start for start, end in made.contexts]
    others = sum(sizes) - sizes[made.gold_index]
    assert made.gold_depth == (sum(sizes[: made.gold_index]) / others if others else 0.0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(WORDS.map(" ".join), max_size=40),
    WORDS.map(" ".join),
    st.sampled_from(sorted(COUNTS)),
    st.integers(100, 3000),
    st.integers(0, 2**32),
    st.none() | st.integers(0, 20),
)
def test_a_budget_is_never_exceeded_and_filled_while_material_lasts(texts, text, name, budget, seed, limit):
    count = COUNTS[name]
    held = ruler(count, budget)
    gold = Piece(text, -1, count(text))
    candidates = iter(pieces(texts, count))
    if held.measure(f"{PROMPT[0]}{text}\n\n{PROMPT[1]}") > budget:
        with pytest.raises(BudgetError, match=f"the budget is {budget}"):
            compose(gold, candidates, PROMPT, np.random.default_rng(seed), limit=limit, ruler=held)
        return
    made = compose(gold, candidates, PROMPT, np.random.default_rng(seed), limit=limit, ruler=held)
    assert made.tokens == held.measure(made.content) <= budget
    assert limit is None or len(made.contexts) <= 1 + limit
    check_offsets(made, gold, texts)
    material_left = next(candidates, None) is not None and (limit is None or len(made.contexts) <= limit)
    if material_left and budget >= 500 and name not in ("not additive", "dear joints"):
        assert made.tokens >= (1 - FILL_TOLERANCE) * budget


def test_the_gold_context_is_as_likely_at_every_index():
    rng = np.random.default_rng(0)
    indices = [
        compose(Piece("x" * 5, -1), iter(pieces(["y" * 5] * 9)), PROMPT, rng, limit=9).gold_index for _ in range(4000)
    ]
    counts = np.bincount(indices, minlength=10)
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_the_depth_under_a_budget_is_uniform_too():
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 200, 400)
    texts = ["w " * int(size) for size in sizes]
    count = COUNTS["words"]
    depths = []
    for _ in range(600):
        order = rng.permutation(len(texts))
        candidates = (Piece(texts[number], int(number), int(sizes[number])) for number in order)
        depths.append(
            compose(Piece("gold " * 80, -1, 80), candidates, PROMPT, rng, ruler=ruler(count, 3000)).gold_depth
        )
    ordered = np.sort(depths)
    distance = np.abs(ordered - (np.arange(600) + 0.5) / 600).max()
    assert distance < 0.08  # Kolmogorov-Smirnov, p = 0.001


def test_a_cut_ends_at_a_sentence_where_little_is_lost():
    count = COUNTS["words"]
    text = "One two three. " * 400
    made = compose(Piece("Gold.", -1, 1), iter(pieces([text], count)), PROMPT, np.random.default_rng(0),
                   ruler=ruler(count, 500))  # fmt: skip
    assert made.content[slice(*made.contexts[1 - made.gold_index])].endswith("three.")
    assert 490 <= made.tokens <= 500


@pytest.mark.parametrize("hidden", range(1, 9))
def test_what_the_estimate_does_not_see_is_trimmed_off(hidden):
    words = COUNTS["words"]
    held = Ruler(500, words, lambda content: words(content) + hidden * content.count("\n\n"))
    texts = ["word " * 40] * 5 + ["word " * 2000]
    made = compose(Piece("Gold.", -1, 1), iter(pieces(texts, words)), PROMPT, np.random.default_rng(0), ruler=held)
    assert 490 <= made.tokens == held.measure(made.content) <= 500


def test_counting_is_cheap():
    calls = []
    count = COUNTS["pieces"]

    def counting(text):
        calls.append(len(text))
        return count(text)

    texts = [f"Sentence {number} of a text about dams. " * 60 for number in range(200)]
    candidates = pieces(texts, count)
    measured = []
    held = Ruler(20_000, counting, lambda content: measured.append(content) or count(content))
    compose(Piece("Gold.", -1, 2), iter(candidates), PROMPT, np.random.default_rng(0), ruler=held)
    assert len(calls) < 15 and max(calls) <= len(texts[0])
    assert len(measured) == 2  # the gold context alone, and the whole
