"""The quickstart's data: short notes that hide code words, questions about them, and the same notes made long.

A training sample is a conversation of at most 64 tokens, here with line breaks for the eye:

    user:       The old boat drifts. Amber: copper. The red bell waits.
                Lemon: raven. The tall gate shines.
                Find amber
    assistant:  copper
    user:       Find lemon
    assistant:  raven

Codes and their meanings come from one list of words, so that only the text of the notes tells the answer.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_longalign.evaluation.needles import NeedleTask, Pools, Wording, needle_prompts
from hf_longalign.evaluation.prompt import Prompt, token_counter


TRAIN_TOKENS = 64
EXAM_LENGTHS = tuple(factor * TRAIN_TOKENS for factor in (1, 2, 4, 8, 16))
EXAM_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_FACTS = 8
NOTES = 4
CODES = (
    "amber anchor apple arrow basil beacon birch bronze candle canyon cedar cherry clover cobalt copper coral cotton "
    "crystal dagger dragon eagle ember falcon feather fern flint garnet ginger granite harbor hazel helmet honey "
    "indigo ivory jasmine juniper kettle lantern lemon lilac magnet maple marble meadow mirror nectar nickel olive "
    "onyx opal orchid pearl pepper quartz raven ribbon saffron silver thistle tulip velvet walnut willow"
).split()
ADJECTIVES = "old red tall grey quiet narrow warm broken bright dusty early late small white empty heavy".split()
NOUNS = "boat bell gate road train roof river market garden tower bridge stove window wagon clock field".split()
VERBS = (
    "drifts waits shines rattles sleeps moves hums stands fades turns glows creaks rests leans rises settles".split()
)
WORDS_IN_SENTENCE, WORDS_IN_FACT, WORDS_IN_QUESTION = 4, 2, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words that reads over case and punctuation."""
    words = ["<pad>", "<unk>", "the", "find", *CODES, *ADJECTIVES, *NOUNS, *VERBS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )


def make_chats(count: int, rng: np.random.Generator, *, tokens: int = TRAIN_TOKENS, turns: int = 8) -> list[dict]:
    """Make conversations of at most `tokens` words.

    Args:
        count: number of rows.
        rng: source of randomness.
        tokens: largest length; what the questions leave is filled with notes.
        turns: questions in a row; one code may be asked for again.

    Returns:
        Rows of `messages` (TRL's conversational format) and `parts`: where each note and the first question stand in
        the first message.
    """
    return [_chat(rng, tokens - turns * (WORDS_IN_QUESTION + 1), turns) for _ in range(count)]


def _chat(rng: np.random.Generator, note_tokens: int, turns: int) -> dict[str, Any]:
    facts = _facts(rng, min(int(rng.integers(1, MAX_FACTS + 1)), note_tokens // WORDS_IN_FACT))
    sentences = _shuffled(rng, [_fact(*pair) for pair in facts] + _filler(rng, note_tokens, len(facts)))
    notes = _split(rng, sentences, min(NOTES, len(sentences)))
    asked = [facts[index] for index in rng.integers(0, len(facts), turns)]
    messages = []
    for code, meaning in asked:
        messages.append({"role": "user", "content": f"Find {code}"})
        messages.append({"role": "assistant", "content": meaning})
    pieces = [*notes, messages[0]["content"]]
    messages[0]["content"] = "\n".join(pieces)
    ends = np.cumsum([len(piece) + 1 for piece in pieces]) - 1
    parts = [
        {"message": 0, "start": int(end) - len(piece), "end": int(end)}
        for piece, end in zip(pieces, ends, strict=True)
    ]
    return {"messages": messages, "parts": parts}


@lru_cache
def make_prompts(seed: int, samples: int) -> tuple[Prompt, ...]:
    """Make the exam: needle prompts whose needles are facts, one of as many as a training sample has at most.

    Args:
        seed: source of randomness.
        samples: prompts per length and depth.
    """
    sentences = " ".join(_filler(np.random.default_rng(seed), 4 * EXAM_LENGTHS[-1], 0))
    prompts = needle_prompts(
        haystack=[sentences],
        count=token_counter(make_tokenizer(), chat=True),
        lengths=EXAM_LENGTHS,
        depths=EXAM_DEPTHS,
        tasks=[NeedleTask("multi_key", distractors=MAX_FACTS - 1)],
        samples=samples,
        seed=seed,
        max_new_tokens=1,
        wording=Wording(header="", needle="{key}: {value}.", question="Find {keys}", answer="{keys}"),
        pools=Pools(keys=CODES[: len(CODES) // 2], values=CODES[len(CODES) // 2 :]),
    )
    return tuple(prompts)


def _facts(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    words = [CODES[index] for index in rng.permutation(len(CODES))[: 2 * count]]
    return list(zip(words[:count], words[count:], strict=True))


def _fact(code: str, meaning: str) -> str:
    return f"{code.capitalize()}: {meaning}."


def _filler(rng: np.random.Generator, tokens: int, facts: int) -> list[str]:
    """As many sentences as `tokens` hold next to that many facts."""
    count = (tokens - facts * WORDS_IN_FACT) // WORDS_IN_SENTENCE
    picks = rng.integers(0, (len(ADJECTIVES), len(NOUNS), len(VERBS)), (count, 3))
    return [f"The {ADJECTIVES[i]} {NOUNS[j]} {VERBS[k]}." for i, j, k in picks]


def _shuffled(rng: np.random.Generator, items: list[str]) -> list[str]:
    return [items[index] for index in rng.permutation(len(items))]


def _split(rng: np.random.Generator, sentences: list[str], count: int) -> list[str]:
    """Cut sentences into `count` notes at random places."""
    cuts = np.sort(rng.permutation(len(sentences) - 1)[: count - 1] + 1)
    return [" ".join(sentences[a:b]) for a, b in zip([0, *cuts], [*cuts, len(sentences)], strict=True)]
