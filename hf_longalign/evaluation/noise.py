"""A haystack that needs no download: plain sentences about a small town, put together by chance.

RULER's noise repeats five sentences (https://github.com/NVIDIA/RULER, "The grass is green. The sky is blue. …"): a
text with a period, in which a needle stands out by being no repetition. These sentences hardly ever repeat, hold no
digits, and never speak of numbers or magic.
"""

import numpy as np


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

    Args:
        paragraphs: how many; by default about 250,000 tokens, after which a longer haystack begins again.
        seed: other sentences for another seed.

    Example:

    >>> noise(paragraphs=1) == noise(paragraphs=2)[:1]
    True
    """
    rng = np.random.default_rng(seed)
    return [" ".join(_sentence(rng) for _ in range(rng.integers(4, 10))) for _ in range(paragraphs)]


def _sentence(rng: np.random.Generator) -> str:
    if rng.random() < 0.15:
        return _pick(_STATE, rng)
    who, other = (_WHO[index] for index in rng.choice(len(_WHO), 2, replace=False))
    what, what2 = (_WHAT[index] for index in rng.choice(len(_WHAT), 2, replace=False))
    text = _pick(_FORMS, rng).format(
        who=who,
        other=other,
        what=what,
        what2=what2,
        did=_pick(_DID, rng),
        did2=_pick(_DID, rng),
        where=_pick(_WHERE, rng),
        when=_pick(_WHEN, rng),
    )
    return text[0].upper() + text[1:]


def _pick(choices: list[str] | tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]
