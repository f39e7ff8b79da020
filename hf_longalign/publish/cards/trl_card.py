"""Telling the card that TRL writes into every output folder from one that a person wrote or changed."""

import re


# Every line of trl/templates/lm_model_card.md and what goes into it (TRL 0.20 to 1.16), code and citations apart.
_LINES = re.compile(
    r"""
    \#\ Model\ Card\ for\ .*
    | This\ model\ is\ a\ fine-tuned\ version\ of\ \[[^\]]*\]\([^)]*\)(\ on\ the\ \[.*\]\(.*\)\ dataset)?\.
    | It\ has\ been\ trained\ using\ \[TRL\]\(https://github\.com/huggingface/trl\)\.
    | \#\#\ (Quick\ start|Training\ procedure|Citations)
    | \#\#\#\ Framework\ versions
    | (\[<img\ src=[^>]*>\]\([^)]*\)\ *)+
    | This\ model\ was\ trained\ with\ \w+(,\ a\ method\ introduced\ in\ \[.*\]\(https://huggingface\.co/papers/.*\))?\.
    | -\ (PEFT|TRL|Transformers|Pytorch|Datasets|Tokenizers):?\ [\w.+]+
    | Cite\ [\w ]+\ as:
    """,
    re.VERBOSE,
)
_QUICK_START = re.compile(
    r"from transformers import pipeline\s+"
    r'question = "If you had a time machine, [^"\n]*"\n'
    r'generator = pipeline\("text-generation", model="[^"\n]*", device(_map)?="[^"\n]*"\)\n'
    r"output = generator\(\[[^\]\n]*\], max_new_tokens=128, return_full_text=False\)\[0\]\n"
    r'print\(output\["generated_text"\]\)\s*'
)
_CITATION = re.compile(r"@\w+\{[\w-]+,\s(?:\s*\w+\s*=\s*\S[^\n]*\n)*\s*\}\s*")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^\s*```[ \t]*$", re.MULTILINE | re.DOTALL)


def is_trl_card(body: str) -> bool:
    """Return whether the body of a card is TRL's own and nothing else: no line in it is a person's.

    Example:

    >>> trl = "# Model Card for x\\nIt has been trained using [TRL](https://github.com/huggingface/trl).\\n"
    >>> is_trl_card(trl), is_trl_card(trl + "My notes.\\n")
    (True, False)
    """
    if "(https://github.com/huggingface/trl)" not in body:
        return False
    known = {"python": _QUICK_START, "bibtex": _CITATION}
    for language, text in _BLOCK.findall(body):
        if language not in known or not known[language].fullmatch(text):
            return False
    return all(_LINES.fullmatch(line.strip()) for line in _BLOCK.sub("", body).splitlines() if line.strip())
