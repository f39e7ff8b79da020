"""What RULER's thirteen tasks are: their settings, the words around a sample, and how an answer is scored.

Source: https://arxiv.org/abs/2404.06654 and its generator, https://github.com/NVIDIA/RULER.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hf_longalign.evaluation.prompt import Prompt


@dataclass(frozen=True)
class RulerTask:
    """A task of RULER.

    Attributes:
        name: as in lm-eval.
        kind: "niah", "vt", "cwe", "fwe" or "qa".
        max_new_tokens: room for the answer.
        haystack: "noise", "essay" or "needle" (niah).
        keys: "words" or "uuids" (niah).
        values: "numbers" or "uuids" (niah).
        n_keys: keys in the text (niah).
        n_values: values of each key (niah).
        n_queries: keys asked for (niah).
        hops: evidence documents of a question (qa).
    """

    name: str
    kind: str
    max_new_tokens: int
    haystack: str = "noise"
    keys: str = "words"
    values: str = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    hops: int = 1


TASKS = {
    task.name: task
    for task in (
        RulerTask("niah_single_1", "niah", 128),
        RulerTask("niah_single_2", "niah", 128, "essay"),
        RulerTask("niah_single_3", "niah", 128, "essay", values="uuids"),
        RulerTask("niah_multikey_1", "niah", 128, "essay", n_keys=4),
        RulerTask("niah_multikey_2", "niah", 128, "needle"),
        RulerTask("niah_multikey_3", "niah", 128, "needle", keys="uuids", values="uuids"),
        RulerTask("niah_multivalue", "niah", 128, "essay", n_values=4),
        RulerTask("niah_multiquery", "niah", 128, "essay", n_keys=4, n_queries=4),
        RulerTask("ruler_vt", "vt", 30),
        RulerTask("ruler_cwe", "cwe", 120),
        RulerTask("ruler_fwe", "fwe", 50),
        RulerTask("ruler_qa_squad", "qa", 32),
        RulerTask("ruler_qa_hotpot", "qa", 32, hops=2),
    )
}

# The words around a sample, and how its answer begins.
TEMPLATES = {
    "niah": (
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
        "provided text?",
        " The special magic {kind} for {query} mentioned in the provided text are",
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned "
        "the value {query}, they are: ",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa": (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. "
        "Only give me the answer and do not output any other words.\n\nQuestion: {query}",
        " Answer:",
    ),
}


def score_ruler(prompt: Prompt, answer: str) -> dict[str, float]:
    """Return RULER's score of an answer: of questions whether any answer is named, else the share that is.

    >>> score_ruler(Prompt("ruler", "ruler_vt", 0, "", ("ABCDE", "FGHIJ"), 30), " ABCDE only")
    {'string_match': 0.5}
    """
    return {"string_match": string_match(answer, prompt.answers, every=TASKS[prompt.task].kind != "qa")}


def string_match(answer: str, references: Sequence[str], *, every: bool) -> float:
    """Return RULER's score of an answer, 0 to 1.

    The share of the references that stand in the answer (`every`), or whether any does, case aside.

    >>> string_match("They are A1 and b2.", ["a1", "B2", "c3", "d4"], every=True)
    0.5
    >>> string_match("In Paris, France.", ["Paris", "Paris, France"], every=False)
    1.0
    """
    text = re.sub("[\x00-\x1f]", "\n", answer).strip().lower()
    found = [reference.lower() in text for reference in references]
    return sum(found) / len(found) if every else float(any(found))
