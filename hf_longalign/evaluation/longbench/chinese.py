"""Chinese texts cut into words by jieba, as LongBench's metrics need them."""

import logging
import string
from typing import Any


# LongBench's list (https://github.com/THUDM/LongBench, `metrics.py`).
_PUNCTUATION = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    + "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def _jieba() -> Any:
    try:
        import jieba
    except ImportError as error:
        raise ImportError(
            'LongBench\'s Chinese tasks need jieba. Run: pip install "hf_longalign[eval]", or leave them out.'
        ) from error
    jieba.setLogLevel(logging.WARNING)
    return jieba


def words(text: str) -> list[str]:
    """Return the words of a text, punctuation and white space included.

    Raises:
        ImportError: jieba is missing.
    """
    return list(_jieba().cut(text, cut_all=False))


def normalized_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and white space.

    Raises:
        ImportError: jieba is missing.
    """
    cleaned = ("".join("".join(c for c in word.lower() if c not in _PUNCTUATION).split()) for word in words(text))
    return [word for word in cleaned if word]
