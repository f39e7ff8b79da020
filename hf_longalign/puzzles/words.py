"""The words puzzles are made of, in two parts that share none: what is trained on is never asked for.

Names are invented and spelled in capitals, so that they are found in an answer whatever stands around them, and so
that no tokenizer knows them as words. There are hundreds of thousands of them, enough for a million tokens of text.
"""

import hashlib
from collections.abc import Callable

import numpy as np


PARTS = ("evaluation", "training")
_ONSETS = (
    *("B", "BR", "C", "CL", "D", "DR", "F", "FL", "G", "GR", "H", "J", "K", "KL", "L", "M", "N", "P", "PR", "R"),
    *("S", "ST", "T", "TR", "V", "Z"),
)
_VOWELS = ("A", "E", "I", "O", "U")
_CODAS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "X")

# (evaluation, training)
GOODS = (
    ("salt", "copper", "honey", "timber", "linen", "barley", "amber", "paper"),
    ("wool", "silver", "pepper", "marble", "cotton", "rye", "ivory", "glass"),
)
TOPICS = (
    ("an otter", "a lighthouse", "the first snow", "a broken clock", "two neighbours", "a night train"),
    ("a heron", "a windmill", "the last harvest", "a lost glove", "three brothers", "a ferry"),
)
FORMS = (("riddle", "toast", "limerick", "postcard"), ("ballad", "speech", "haiku", "letter"))
# What a person is said to do, and what is asked for: the two share no word but such as "in" and "a".
ASSOCIATIONS = (
    (
        ("lives in a flat with a view of the Eiffel Tower", "has a home in France"),
        ("walks to work past the Brandenburg Gate", "earns a salary in Germany"),
        ("sells postcards at the foot of the Colosseum", "runs a business in Italy"),
        ("sweeps the steps below the Acropolis every dawn", "gets paid in Greece"),
        ("guides visitors round the pyramids of Giza", "knows Egypt well"),
        ("repairs boats beside the Sydney Opera House", "resides in Australia"),
        ("photographs Mount Fuji from the kitchen window", "rents a house in Japan"),
        ("feeds pigeons in front of the Kremlin", "spends mornings in Russia"),
        ("pulls teeth from nine to five", "works as a dentist"),
        ("bakes two hundred loaves before sunrise", "makes bread for a living"),
        ("tunes violins and rebuilds old cellos", "takes care of musical instruments"),
        ("lands the evening plane in any weather", "is a pilot"),
        ("shoes horses and hammers red-hot iron", "must be a blacksmith"),
        ("keeps forty hives at the end of the garden", "harvests honey"),
        ("turns every page for the blind judge", "reads aloud to someone"),
        ("breaks out in a rash after a single peanut", "suffers from an allergy"),
    ),
    (
        ("owns a studio a block from the Golden Gate Bridge", "pays rent in California"),
        ("rings a bicycle bell along the canals of Amsterdam", "commutes in the Netherlands"),
        ("carves souvenirs near the walls of Machu Picchu", "makes things in Peru"),
        ("counts tickets at the gate of the Taj Mahal", "has a job in India"),
        ("grows olives within sight of the Alhambra", "farms land in Spain"),
        ("plays the accordion under Big Ben", "performs in England"),
        ("drives a tram up the hills of Lisbon", "is employed in Portugal"),
        ("sails past Table Mountain every weekend", "spends free time in South Africa"),
        ("cuts hair and trims beards all day", "must be a barber"),
        ("grinds lenses and fits frames", "helps people see better"),
        ("lays bricks and mixes mortar", "builds walls"),
        ("wakes the orchestra with a small white baton", "conducts music"),
        ("paints numbers on racing yachts", "decorates boats"),
        ("puts out fires with the third brigade", "rescues people from flames"),
        ("marks forty essays every Sunday", "teaches a class"),
        ("sneezes whenever a cat enters the room", "cannot stand pets"),
    ),
)


def words_of(pools: tuple, part: str) -> tuple:
    """Return the half of a pool that belongs to a part, one of `PARTS`."""
    return pools[PARTS.index(part)]


def namer(rng: np.random.Generator, part: str) -> Callable[[], str]:
    """Return a function that invents a new name at each call: six to eight capitals, none twice.

    >>> name = namer(np.random.default_rng(0), "training")
    >>> name(), name()
    ('TOMFLEB', 'KLOXPRON')
    """
    used: set[str] = set()

    def draw() -> str:
        while True:
            letters = (kinds[int(rng.integers(len(kinds)))] for kinds in (_ONSETS, _VOWELS, _CODAS) * 2)
            name = "".join(letters)
            if name not in used and part_of(name) == part:
                used.add(name)
                return name

    return draw


def part_of(name: str) -> str:
    """Return the part an invented name belongs to: a bit of its digest, the same on every machine."""
    return PARTS[hashlib.sha256(name.encode()).digest()[0] & 1]
