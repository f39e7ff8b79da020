"""The puzzles: what retrieval alone does not solve.

| task | skill | close to |
| --- | --- | --- |
| `graph_walk` | nodes exactly d steps from a node | Graphwalks |
| `graph_parents` | nodes with an edge to a node | Graphwalks |
| `repeated_request` | the i-th of n answers to one request in a long conversation | MRCR |
| `key_chain` | following keys from box to box to a number | NIAH chains |
| `count` | adding up what is spread over the text | aggregation |
| `latest` | the last of statements that contradict each other | knowledge updates |
| `association` | a line joined to the question by the world alone | NoLiMa |
| `unanswerable` | a value that may not be in the text | abstention |

Every task is a function of a random generator and of the part its words come from.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hf_longalign.puzzles.puzzle import UNANSWERABLE, Line, Puzzle, lengthen, seeded_rng


LIST = "Answer with the names alone, separated by commas."
ONE = "Answer with the name alone."
NUMBER = "Answer with the number alone."
GRAPH = "The text below names the edges of a directed graph, one in a line, among other sentences."
# The words come in two parts that share none: what is trained on is never asked for. Names are invented and spelled in
# capitals, so that they are found in an answer whatever stands around them, and so that no tokenizer knows them as
# words. There are hundreds of thousands of them, enough for a million tokens of text.
PARTS = ("evaluation", "training")
_ONSETS = (
    *("B", "BR", "C", "CL", "D", "DR", "F", "FL", "G", "GR", "H", "J", "K", "KL", "L", "M", "N", "P", "PR", "R"),
    *("S", "ST", "T", "TR", "V", "Z"),
)
_VOWELS = ("A", "E", "I", "O", "U")
_CODAS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "X")

GOODS = {
    "evaluation": ("salt", "copper", "honey", "timber", "linen", "barley", "amber", "paper"),
    "training": ("wool", "silver", "pepper", "marble", "cotton", "rye", "ivory", "glass"),
}
TOPICS = {
    "evaluation": ("an otter", "a lighthouse", "the first snow", "a broken clock", "two neighbours", "a night train"),
    "training": ("a heron", "a windmill", "the last harvest", "a lost glove", "three brothers", "a ferry"),
}
FORMS = {
    "evaluation": ("riddle", "toast", "limerick", "postcard"),
    "training": ("ballad", "speech", "haiku", "letter"),
}
# What a person is said to do, and what is asked for: the two share no word but such as "in" and "a".
ASSOCIATIONS = {
    "evaluation": (
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
    "training": (
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
}


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


def draw_puzzle(task: str, seed: int, index: int, part: str = "evaluation") -> Puzzle:
    """Return a puzzle of a task.

    Args:
        task: a key of `TASKS`.
        seed: of all randomness, with task, part and index: the same on every platform.
        index: number of the sample.
        part: "evaluation" or "training", which share no name and no word that is asked for.

    Raises:
        ValueError: no such task or part.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {sorted(TASKS)}, got {task!r}. Set one of them.")
    if part not in PARTS:
        raise ValueError(f"`part` must be one of {list(PARTS)}, got {part!r}. Set one of them.")
    return TASKS[task](seeded_rng("puzzle", task, part, seed, index), part)


def graph_walk(rng: np.random.Generator, part: str, depth: int = 2) -> Puzzle:
    """Ask for the nodes that are exactly `depth` steps from a node; every line is an edge."""
    name = namer(rng, part)
    root = name()
    # A tree: each node has one parent on the level before, so the only path to it has as many steps as its level.
    parents: dict[str, str] = {}
    level = [root]
    for _ in range(depth):
        children = [name() for _ in range(int(rng.integers(2, 4)))]
        parents |= {child: level[int(rng.integers(len(level)))] for child in children}
        level = children
    needed = set(level)
    for _ in range(depth - 1):
        needed |= {parents[node] for node in needed if node in parents}
    lines = [Line(_edge(parent, child), child in needed) for child, parent in parents.items()]
    question = f"Which nodes are exactly {depth} steps from {root}, following the arrows? {LIST}"
    # Other edges run between nodes that no path from the root reaches.
    return Puzzle("graph_walk", GRAPH, tuple(lines), lambda: _edge(name(), name()), question, tuple(level))


def graph_parents(rng: np.random.Generator, part: str) -> Puzzle:
    """Ask for the nodes with an edge to a node."""
    name = namer(rng, part)
    node = name()
    parents = tuple(name() for _ in range(int(rng.integers(2, 5))))
    lines = tuple(Line(_edge(parent, node), True) for parent in parents)
    # Edges from the node look most alike of all.
    lines += tuple(Line(_edge(node, name())) for _ in range(2))
    question = f"Which nodes have an arrow that leads to {node}? {LIST}"
    return Puzzle("graph_parents", GRAPH, lines, lambda: _edge(name(), name()), question, parents)


def _edge(start: str, end: str) -> str:
    return f"{start} -> {end}"


def repeated_request(rng: np.random.Generator, part: str, times: int = 4) -> Puzzle:
    """Ask for the i-th of several answers to one request; the conversation holds other requests too."""
    name = namer(rng, part)
    form, topic = str(rng.choice(FORMS[part])), str(rng.choice(TOPICS[part]))
    others = [(f, t) for f in FORMS[part] for t in TOPICS[part] if (f, t) != (form, topic)]
    signers = [name() for _ in range(times)]
    wanted = int(rng.integers(times))
    # Without one of the earlier answers the count comes out wrong, so all up to the wanted one are evidence.
    lines = tuple(Line(_turn(form, topic, signer), i <= wanted) for i, signer in enumerate(signers))

    def alike() -> str:
        return _turn(*others[int(rng.integers(len(others)))], name())

    question = (
        f"Who signed answer number {wanted + 1} to the request for a {form} about {topic}, in the order of the "
        f"conversation? {ONE}"
    )
    header = "Below is a conversation, one request and its answer in a line, among other sentences."
    return Puzzle("repeated_request", header, lines, alike, question, (signers[wanted],), shuffled=False)


def _turn(form: str, topic: str, signer: str) -> str:
    return f"User: Write a {form} about {topic}. Assistant: Here is your {form}, signed {signer}."


def key_chain(rng: np.random.Generator, part: str, hops: int = 3) -> Puzzle:
    """Ask for the number in the last of a chain of boxes."""
    name = namer(rng, part)
    boxes = [name() for _ in range(hops + 1)]
    code = str(int(rng.integers(10_000, 100_000)))
    lines = [Line(_key(*pair), True) for pair in pairwise(boxes)]
    lines.append(Line(_code(boxes[-1], code), True))

    def alike() -> str:
        return _key(name(), name()) if rng.random() < 0.5 else _code(name(), str(int(rng.integers(10_000, 100_000))))

    question = (
        f"Begin with box {boxes[0]} and open box after box with the key found in each, until a box holds a code. "
        f"Which code is it? {NUMBER}"
    )
    header = "The text below says what boxes hold, among other sentences."
    return Puzzle("key_chain", header, tuple(lines), alike, question, (code,))


def _key(box: str, other: str) -> str:
    return f"Box {box} holds the key to box {other}."


def _code(box: str, code: str) -> str:
    return f"Box {box} holds the code {code}."


def count(rng: np.random.Generator, part: str) -> Puzzle:
    """Ask for a sum over lines that are spread over the text."""
    name = namer(rng, part)
    good, *others = (str(word) for word in rng.permutation(GOODS[part]))
    amounts = [int(rng.integers(2, 10)) for _ in range(int(rng.integers(3, 7)))]
    lines = tuple(Line(_sale(name(), amount, good), True) for amount in amounts)

    def alike() -> str:
        return _sale(name(), int(rng.integers(2, 10)), others[int(rng.integers(len(others)))])

    question = f"How many crates of {good} were sold in all? {NUMBER}"
    header = "The text below holds the sales of a market, one in a line, among other sentences."
    return Puzzle("count", header, lines, alike, question, (str(sum(amounts)),))


def _sale(merchant: str, amount: int, good: str) -> str:
    return f"{merchant} sold {amount} crates of {good}."


def latest(rng: np.random.Generator, part: str, versions: int = 4) -> Puzzle:
    """Ask for the last of statements that contradict each other; they stand in any order."""
    name = namer(rng, part)
    gate = name()
    days = sorted(int(day) for day in rng.choice(np.arange(1, 1000), versions, replace=False))
    guards = [name() for _ in days]
    lines = tuple(Line(_guard(day, gate, guard), day == days[-1]) for day, guard in zip(days, guards, strict=True))

    def alike() -> str:
        return _guard(int(rng.integers(1, 1000)), name(), name())

    question = f"Who guards gate {gate} according to the entry with the latest day? {ONE}"
    header = "The text below holds entries of a gate book in no order, one in a line, among other sentences."
    return Puzzle("latest", header, lines, alike, question, (guards[-1],))


def _guard(day: int, gate: str, guard: str) -> str:
    return f"Day {day}: gate {gate} is guarded by {guard}."


def association(rng: np.random.Generator, part: str) -> Puzzle:
    """Ask for a person whom only knowledge of the world joins with the question."""
    name = namer(rng, part)
    pairs = ASSOCIATIONS[part]
    wanted = int(rng.integers(len(pairs)))
    person = name()
    others = [fact for i, (fact, _) in enumerate(pairs) if i != wanted]

    def alike() -> str:
        return f"{name()} {others[int(rng.integers(len(others)))]}."

    lines = (Line(f"{person} {pairs[wanted][0]}.", True),)
    question = f"Which person {pairs[wanted][1]}? {ONE}"
    header = "The text below tells of several persons, among other sentences."
    return Puzzle("association", header, lines, alike, question, (person,))


def unanswerable(rng: np.random.Generator, part: str) -> Puzzle:
    """Ask for a code that half of the texts do not hold."""
    name = namer(rng, part)
    box = name()
    code = str(int(rng.integers(10_000, 100_000)))
    told = bool(rng.integers(2))

    def alike() -> str:
        return _code(name(), str(int(rng.integers(10_000, 100_000))))

    # A line about the box that does not answer is there either way.
    lines = (Line(_key(name(), box)), *([Line(_code(box, code), True)] if told else []))
    question = f'Which code does box {box} hold? {NUMBER} If the text does not say it, answer "{UNANSWERABLE}".'
    header = "The text below says what boxes hold, among other sentences."
    return Puzzle("unanswerable", header, lines, alike, question, (code if told else UNANSWERABLE,))


TASKS: dict[str, Callable[[np.random.Generator, str], Puzzle]] = {
    function.__name__: function
    for function in (graph_walk, graph_parents, repeated_request, key_chain, count, latest, association, unanswerable)
}


def training_rows(
    tasks: Sequence[str] = tuple(TASKS),
    *,
    number: int,
    length: int,
    count: Callable[[str], int],
    filler: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return rows in TRL's chat format with the `parts` at which positions may be skipped; of the part "training".

    Args:
        tasks: names of `TASKS`, in turn.
        number: of rows.
        length: tokens of a question at most.
        count: tokens of a text.
        filler: sentences between the lines of a puzzle; without any, lines that look alike.
        seed: of all that is drawn.

    Raises:
        ValueError: an unknown task, or a length without room for it.

    >>> row = training_rows(["latest"], number=1, length=120, count=lambda text: len(text.split()))[0]
    >>> [message["role"] for message in row["messages"]], sorted(row["parts"][0])
    (['user', 'assistant'], ['end', 'message', 'start'])
    """
    rows = []
    for index in range(number):
        puzzle = draw_puzzle(tasks[index % len(tasks)], seed, index, "training")
        rng = np.random.Generator(np.random.PCG64([seed, index]))
        rows.append(lengthen(puzzle, length, count, filler, rng).row())
    return rows
