"""Which language a text is in, offline, by py3langid (97 languages, a 4 MB model inside the package)."""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from hf_longalign.synthesis.extras import require


_LEAST_LETTERS = 60
_SAMPLE = 4000


@lru_cache(maxsize=1)
def _identifier() -> Any:
    langid = require("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)


def identify_language(text: str) -> str | None:
    """Return the two-letter code of the language of `text`, or `None` where it is too short to tell.

    Example:

    >>> identify_language("The dam was built in 1912, and the village below it was moved to the bank of the river.")
    'en'
    """
    sample = text[:_SAMPLE]
    if sum(char.isalpha() for char in sample) < _LEAST_LETTERS:
        return None
    return str(_identifier().classify(sample)[0])


def majority_language(texts: Iterable[str]) -> str | None:
    """Return the language of most of the texts that are long enough to tell, or `None`.

    Instructions are too short to be told one by one, so a data set is told as a whole.
    """
    sample = " ".join(texts)
    pieces = [sample[start : start + _SAMPLE] for start in range(0, min(len(sample), 20 * _SAMPLE), _SAMPLE)]
    found = Counter(language for language in map(identify_language, pieces) if language)
    return found.most_common(1)[0][0] if found else None
