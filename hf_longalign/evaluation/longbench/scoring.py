"""The score of an answer: its task's metric, the best over the references, as LongBench's `eval.py` takes it."""

from collections.abc import Callable, Sequence

from hf_longalign.evaluation.longbench import chinese, metrics
from hf_longalign.evaluation.longbench.rouge import rouge_l
from hf_longalign.evaluation.longbench.tasks import find_task
from hf_longalign.evaluation.prompt import Prompt


def _qa_f1_zh(answer: str, reference: str) -> float:
    return metrics.token_f1(chinese.normalized_words(answer), chinese.normalized_words(reference))


def _rouge_l_zh(answer: str, reference: str) -> float:
    return rouge_l(" ".join(chinese.words(answer)), " ".join(chinese.words(reference)))


# From the answer, a reference and all classes to a score from 0 to 1.
METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": lambda answer, reference, classes: metrics.qa_f1(answer, reference),
    "qa_f1_zh": lambda answer, reference, classes: _qa_f1_zh(answer, reference),
    "rouge_l": lambda answer, reference, classes: rouge_l(answer, reference),
    "rouge_l_zh": lambda answer, reference, classes: _rouge_l_zh(answer, reference),
    "classification": metrics.classification,
    "count": lambda answer, reference, classes: metrics.number_share(answer, reference),
    "retrieval": lambda answer, reference, classes: metrics.retrieval(answer, reference, word="Paragraph "),
    "retrieval_zh": lambda answer, reference, classes: metrics.retrieval(answer, reference, word="段落"),
    "code_similarity": lambda answer, reference, classes: metrics.code_similarity(answer, reference),
}


def score_longbench(prompt: Prompt, text: str) -> dict[str, float]:
    """Return the score of an answer from 0 to 1 under the name of its task's metric.

    Args:
        prompt: of the suite "longbench", with its references and classes.
        text: what the model answered.

    Raises:
        ValueError: no such task, or a reference its metric cannot read.
        ImportError: a Chinese task without jieba.

    Example:

    >>> prompt = Prompt("longbench", "trec", 0, "Question: Who?\\nType:", ("Person",), 64, classes=("Person", "Date"))
    >>> score_longbench(prompt, "\\nPerson\\nQuestion: When?\\nType: Date")
    {'classification': 1.0}
    """
    task = find_task(prompt.task)
    if task.first_line_only:
        text = text.lstrip("\n").split("\n")[0]
    metric = METRICS[task.metric]
    return {task.metric: max(metric(text, reference, prompt.classes) for reference in prompt.answers)}
