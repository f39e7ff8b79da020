"""LongBench's questions as prompts a model is asked."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_longalign.evaluation.longbench.chinese import words
from hf_longalign.evaluation.longbench.data import HUB_ID, read_rows
from hf_longalign.evaluation.longbench.tasks import expand_tasks, find_task
from hf_longalign.evaluation.longbench.truncation import cut_middle
from hf_longalign.evaluation.prompt import Prompt


def longbench_prompts(
    tasks: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str | Path = HUB_ID,
    limit: int | None = None,
    chat: bool = True,
) -> Iterator[Prompt]:
    """Yield the prompts of LongBench's tasks, each short enough to be read with its answer.

    Args:
        tasks: names of tasks, "hotpotqa_e" for a LongBench-E variant, or of sets: "all", "context_synthesis", "even".
        tokenizer: the model's.
        max_length: tokens a model reads and writes together; longer prompts lose their middle.
        source: where the data are, see `read_rows`.
        limit: rows of each task, the first ones; `None`: all.
        chat: go through the chat template; never in the few-shot and code tasks, as LongBench has it.

    Raises:
        ValueError: an unknown task, a bad row, or a `max_length` without room.
        FileNotFoundError: the source does not have a task.
        ConnectionError: the Hub could not be asked.
        ImportError: a task whose answers are scored word by word in Chinese, without jieba.
    """
    for name in expand_tasks(tasks):
        task = find_task(name)
        with_template = chat and task.chat
        if task.metric in ("qa_f1_zh", "rouge_l_zh"):
            words("")  # told now that jieba is missing, and not when all is answered
        for index, row in enumerate(islice(read_rows(name, source), limit)):
            text = task.template.format(context=row.context, input=row.input)
            yield Prompt(
                suite="longbench",
                task=name,
                index=index,
                text=cut_middle(text, tokenizer, max_length - task.max_new_tokens, chat=with_template),
                answers=row.answers,
                max_new_tokens=task.max_new_tokens,
                chat=with_template,
                stop=task.stop,
                classes=row.classes,
            )
