"""LongBench's questions as prompts a model is asked, cut to a length where they are longer."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_longalign.evaluation.encoding import encode_text
from hf_longalign.evaluation.longbench.data import read_rows
from hf_longalign.evaluation.longbench.metrics import chinese_words
from hf_longalign.evaluation.longbench.tasks import V2, expand_tasks, find_task
from hf_longalign.evaluation.prompt import Prompt


def longbench_prompts(
    tasks: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    longbench_length: int | None = None,
    source: str | Path | None = None,
    limit: int | None = None,
    chat: bool = True,
) -> Iterator[Prompt]:
    """Yield the prompts of LongBench's tasks, each short enough to be read with its answer.

    Scores compare with published ones where prompts were cut to the same length, `longbench_length`: the tables of
    LongBench v1 have 3,500 tokens for models of 4k, 7,500 for 8k, 15,500 for 16k and 31,500 for 32k, those of v2
    120,000 for 128k. v2's script draws its answers at a temperature of 0.1; here all are greedy.

    Args:
        tasks: names of tasks, "hotpotqa_e" for a LongBench-E variant, or of sets: "all", "context_synthesis", "even",
            "v2".
        tokenizer: the model's.
        max_length: tokens a model reads and writes together.
        longbench_length: tokens that a longer prompt is cut to, as LongBench's scripts cut it: counted without the
            chat template, with the tokenizer's own special tokens. `None`: as many as `max_length` has room for
            beside the answer and the template.
        source: where the data are, see [`read_rows`].
        limit: rows of each task, the first ones; `None`: all.
        chat: go through the chat template; never in the few-shot and code tasks, as LongBench has it.

    Raises:
        ValueError: an unknown task, a bad row, or a length without room.
        FileNotFoundError: the source does not have a task.
        ConnectionError: the Hub could not be asked.
        ImportError: a task whose answers are scored word by word in Chinese, without jieba.
    """
    if longbench_length is not None and not 2 <= longbench_length <= max_length:
        raise ValueError(
            f"`longbench_length` must be from 2 to the model's range of {max_length:,} tokens, got "
            f"{longbench_length!r}. Set 3500 for a model of 4k tokens, 7500 for 8k, 31500 for 32k."
        )
    for name in expand_tasks(tasks):
        task = find_task(name)
        with_template = chat and task.chat
        if task.metric in ("qa_f1_zh", "rouge_l_zh"):
            chinese_words("")  # told now that jieba is missing, and not when all is answered
        room = max_length - task.max_new_tokens
        for index, row in enumerate(islice(read_rows(name, source), limit)):
            whole = task.template.format(context=row.context, input=row.input)
            if longbench_length is None:
                text = cut_to_fit(whole, tokenizer, room, chat=with_template, joined=name == V2)
            else:
                text = cut_middle(whole, tokenizer, longbench_length, joined=name == V2)
                length = len(encode_text(tokenizer, text, chat=with_template))
                if length > room:
                    raise ValueError(
                        f"`longbench_length` must leave room for the template and {task.max_new_tokens} tokens of "
                        f"answer in the model's range of {max_length:,}, got {longbench_length!r}, with which prompt "
                        f"{index} of {name} takes {length:,}. Set {longbench_length - (length - room)} or less."
                    )
            yield Prompt(
                suite="longbench",
                task=name,
                index=index,
                text=text,
                answers=row.answers,
                max_new_tokens=task.max_new_tokens,
                chat=with_template,
                stop=task.stop,
                classes=row.classes,
                shortened=text != whole,
                parts=row.parts,
            )


def cut_middle(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, *, joined: bool = False) -> str:
    """Return the text, its middle left out where it takes more than so many tokens, as LongBench's scripts do it.

    Instructions stand at both ends of a prompt. The first and the last half of the tokens, special ones counted and
    then left out, are decoded apart and put together (v1, `pred.py`), or put together and decoded (v2). So the text
    can take some tokens more or less than asked for, and a character that was cut in two becomes U+FFFD.

    Args:
        text: the prompt without chat template.
        tokenizer: the model's.
        tokens: how many to keep, at least 2.
        joined: put together, then decode.
    """
    return _ends(text, _tokens(text, tokenizer), tokenizer, tokens, joined)


def cut_to_fit(
    text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, chat: bool, joined: bool = False
) -> str:
    """Return the text cut as by [`cut_middle`] to the most tokens with which all fits, template included.

    Args:
        text: what the user says.
        tokenizer: the model's.
        max_tokens: what the model may be given.
        chat: whether the text goes through the chat template.
        joined: see [`cut_middle`].

    Raises:
        ValueError: `max_tokens` leaves no room for the text, or `chat` without a chat template.
    """
    surplus = len(encode_text(tokenizer, text, chat=chat)) - max_tokens
    if surplus <= 0:
        return text
    token_ids = _tokens(text, tokenizer)
    kept, shortened = len(token_ids), text
    # The joint and the template change the count, so it is taken again until the whole fits.
    while surplus > 0:
        kept -= surplus
        if kept < 2:
            raise ValueError(
                f"`max_length` must leave room for a prompt beside the answer and the chat template, got {max_tokens} "
                "tokens without the answer's. Set it to more."
            )
        shortened = _ends(text, token_ids, tokenizer, kept, joined)
        surplus = len(encode_text(tokenizer, shortened, chat=chat)) - max_tokens
    return shortened


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Without `verbose`, tokenizers warn that the text exceeds a range that it is just being cut to.
    return tokenizer(text, verbose=False)["input_ids"]


def _ends(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, tokens: int, joined: bool) -> str:
    if len(ids) <= tokens:
        return text
    # v2's script keeps the odd token, v1's does not.
    ends = [ids[: tokens // 2] + ids[-tokens // 2 :]] if joined else [ids[: tokens // 2], ids[-(tokens // 2) :]]
    return "".join(str(tokenizer.decode(end, skip_special_tokens=True)) for end in ends)
