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

from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


TRAIN_TOKENS = 64
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


class Prompt(NamedTuple):
    """A question over a text of any length: the user's message and the one word that answers it."""

    text: str
    answer: str


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


def make_prompts(count: int, rng: np.random.Generator, *, tokens: int, depth: float) -> list[Prompt]:
    """Make questions over long notes: as many facts as a training sample has at most, the rest is filler.

    Args:
        count: number of prompts.
        rng: source of randomness.
        tokens: largest length, the answer included; all prompts of a call are equally long.
        depth: place of the fact that is asked for: 0 at the beginning, 1 right before the question. The other facts
            lie anywhere.
    """
    prompts = []
    for _ in range(count):
        (code, meaning), *others = _facts(rng, MAX_FACTS)
        room = tokens - WORDS_IN_QUESTION - 1
        sentences = _shuffled(rng, [_fact(*pair) for pair in others] + _filler(rng, room, MAX_FACTS))
        sentences.insert(round(depth * len(sentences)), _fact(code, meaning))
        prompts.append(Prompt(f"{' '.join(sentences)}\nFind {code}", meaning))
    return prompts


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
