"""The text a needle is hidden in: texts from anywhere, or sentences made here, between which needles go.

RULER's noise repeats five sentences (https://github.com/NVIDIA/RULER, "The grass is green. The sky is blue. …"): a
text with a period, in which a needle stands out by being no repetition. The sentences that [`noise`] puts together
about a small town hardly ever repeat, hold no digits, and never speak of numbers or magic.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hf_longalign.rows import read_texts
from hf_longalign.text import UNSPACED, sentence_ends


PARAGRAPH = "\n\n"

# More would be measured for nothing: about a million tokens of English.
_MOST_CHARACTERS = 4_000_000
# A text without full stops still needs places for needles.
_LONGEST_SENTENCE = 600
# Without the limit of 30 a line of a log or of base64 would be one unit, and no prompt could be cut inside it.
_UNIT = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]{{1,30}})")

_WHO = """
the baker|the gardener|the old sailor|a young teacher|the postman|her neighbour|the clockmaker|a quiet student
|the ferryman|the miller's daughter|a travelling singer|the librarian|his uncle|the carpenter|the shepherd
|an elderly couple|the doctor|the fisherman's wife|a painter from the coast|the night watchman|the innkeeper
|their cousin|the cellist|a tired messenger
""".replace("\n", "").split("|")
_DID = """
carried|repaired|painted|sold|borrowed|forgot|described|cleaned|found|hid|admired|measured|photographed
|exchanged|wrapped|delivered|dropped|sketched|collected|polished|bought|brought back|looked for|gave away
|asked about
""".replace("\n", "").split("|")
_WHAT = """
a basket of apples|the broken lantern|an empty suitcase|the blue kite|a jar of honey|some woollen blankets
|a wooden flute|the garden bench|a map of the valley|the copper kettle|two loaves of bread|an old bicycle
|the silver spoon|a bundle of letters|the kitchen chairs|a sack of flour|the church bell|a pair of boots
|the torn sail|a bunch of tulips|the grey umbrella|a bowl of cherries|the heavy curtain|a birdcage
|the mirror from the hall|a bottle of ink|the rowing boat|a box of candles
""".replace("\n", "").split("|")
_WHERE = """
across the bridge|behind the mill|near the harbour|at the market|in the orchard|by the river
|under the chestnut tree|in front of the bakery|on the village green|beside the railway station|along the canal
|at the edge of the forest|in the courtyard|on the hill|close to the lighthouse|in the attic
|at the foot of the stairs|outside the theatre|next to the well|in the narrow lane
""".replace("\n", "").split("|")
_WHEN = """
in the morning|after lunch|before the storm|late in the evening|on a warm day|during the fair
|when the bells rang|at dawn|towards the end of winter|on the way home|while it snowed|after the concert
|early in spring|at noon|one Sunday|as the fog lifted|on market day|shortly before dark|the following week
|in the last days of autumn
""".replace("\n", "").split("|")
_STATE = """
The streets were quiet and the shutters closed.|A light rain fell on the roofs.|Nobody could say why.
|The wind had turned to the west.|It smelled of wood smoke and fresh bread.
|The children watched from the window.|Everyone agreed that it had been a good year.
|The water in the canal stood low.|Somewhere a dog barked.|The afternoon passed slowly.
|There was little else to do.|The swallows had come back.|No one seemed to mind.
|Snow still lay on the northern slopes.|The last boat had already left.|Tea was served in the garden.
|The road was dry and full of dust.|A clock struck in the distance.|The shop stayed open a little longer.
|The fields were yellow with mustard.
""".replace("\n", "").split("|")
_FORMS = (
    "{when}, {who} {did} {what} {where}.",
    "{who} {did} {what} {where}.",
    "{where}, {who} {did} {what}.",
    "{who} {did} {what} {when}, and {other} {did2} {what2}.",
    "{when}, {who} met {other} {where}.",
    "{other} said that {who} {did} {what} {when}.",
    "{who} waited {where} until {other} {did} {what}.",
    "Because {who} {did} {what}, {other} stayed {where}.",
)


def noise(*, paragraphs: int = 2500, seed: int = 0) -> list[str]:
    """Return paragraphs of four to nine sentences, about 100 tokens each; the first ones are the same for any number.

    By default they are about 250,000 tokens, after which a longer haystack begins again.
    """
    rng = np.random.default_rng(seed)

    def pick(choices: Sequence[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    def sentence() -> str:
        if rng.random() < 0.15:
            return pick(_STATE)
        who, other = (_WHO[index] for index in rng.choice(len(_WHO), 2, replace=False))
        what, what2 = (_WHAT[index] for index in rng.choice(len(_WHAT), 2, replace=False))
        # In another order the draws would make another text, and reports of before would not compare.
        form, did, did2, where, when = (pick(choices) for choices in (_FORMS, _DID, _DID, _WHERE, _WHEN))
        text = form.format(who=who, other=other, what=what, what2=what2, did=did, did2=did2, where=where, when=when)
        return text[0].upper() + text[1:]

    return [" ".join(sentence() for _ in range(rng.integers(4, 10))) for _ in range(paragraphs)]


def load_texts(source: str | None, seed: int = 0, option: str = "haystack") -> Iterable[str]:
    """Return the texts of a source, read as they are needed.

    Args:
        source: what [`~hf_longalign.rows.read_texts`] takes, or a folder, whose `.txt` files are the texts, by name.
            `None`: the built-in sentences, see [`noise`].
        seed: of the built-in sentences.
        option: that the user gave the source by, for messages.

    Raises:
        ValueError: a path to nothing, or what is no text; here or when the texts are read.
        ConnectionError: the data set cannot be had; when the texts are read.
    """
    if source is None:
        return noise(seed=seed)
    files = [source]
    if Path(source).is_dir():
        files = sorted(str(file) for file in Path(source).glob("*.txt") if file.is_file())
        if not files:
            raise ValueError(f"`{option}` must be a folder with .txt files, got none in {source!r}. Put some there.")
    return (text for file in files for text, _ in read_texts(file, option, streaming=True))


def as_many_as_needed(texts: Iterable[str]) -> list[str]:
    """Return the first texts, up to 4 million characters: a data set may be larger than any haystack.

    Raises:
        ValueError: something is no text.
    """
    found: list[str] = []
    characters = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"`haystack` must be texts, got {type(text).__name__} at row {index}. Choose another column."
            )
        found.append(text)
        characters += len(text)
        if characters >= _MOST_CHARACTERS:
            break
    return found


def sentences_of(texts: Iterable[str]) -> list[str]:
    """Return the sentences of texts, in order, each with the blank or the empty line that stands before it.

    Raises:
        ValueError: there is no sentence in them, or see [`as_many_as_needed`].

    >>> sentences_of(["Mr. Fox came in. He sat down.\\n\\nIt rained."])
    ['\\n\\nMr. Fox came in.', ' He sat down.', '\\n\\nIt rained.']
    """
    sentences = [sentence for text in as_many_as_needed(texts) for sentence in split_sentences(text)]
    if not sentences:
        raise ValueError("`haystack` must hold at least one sentence, got none. Give it texts.")
    return sentences


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with what stands before it: an empty line, a blank or nothing.

    Line breaks and runs of blanks become one blank, empty lines stay; a sentence of more than 600 characters is cut at
    a blank.

    >>> split_sentences("It was 5 p.m. and late.  Who\\ncame? 他来了。然后走了。")
    ['\\n\\nIt was 5 p.m. and late.', ' Who came?', ' 他来了。', '然后走了。']
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        line, before, start = " ".join(paragraph.split()), PARAGRAPH, 0
        for end in [*sentence_ends(line), len(line)]:
            while start < end:
                stop = end
                if end - start > _LONGEST_SENTENCE:
                    blank = line.rfind(" ", start + 1, start + _LONGEST_SENTENCE)
                    stop = blank if blank > 0 else start + _LONGEST_SENTENCE
                sentences.append(before + line[start:stop])
                before, start = "", stop
    return sentences


def split_units(sentence: str) -> list[str]:
    """Return the smallest parts a sentence may be cut into: words, single characters of scripts without blanks.

    >>> split_units(" Who came? 他来")
    [' Who', ' came?', ' 他', '来']
    """
    return _UNIT.findall(sentence)
