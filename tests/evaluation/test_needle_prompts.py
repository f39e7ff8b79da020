"""Needle prompts, taken apart again as text: the needles are cut out of it and the real tokens before them counted."""

import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_longalign.evaluation.haystack import load_texts, noise, sentences_of
from hf_longalign.evaluation.needles import ONE, SEVERAL, TASKS, NeedleTask, Pools, Wording, needle_prompts
from hf_longalign.evaluation.prompt import Prompt, token_counter


ESSAYS = Path(__file__).parents[3] / "shared/data/haystack"
# As Llama 3's template: it takes blanks from both ends of a message.
TRIMMING_TEMPLATE = CHAT_TEMPLATE.replace("message['content'] +", "message['content'] | trim +")
NEEDLE = re.compile(r"\s?One of the special magic numbers for [\w-]+ is: (\d+)\.")
KINDS = ("byte-level BPE", "Metaspace Unigram", "WordPiece")
TEXTS = noise(paragraphs=60)


@lru_cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|start|>", "<|end|>", "[UNK]", "[CLS]", "[SEP]"]
    options = {"vocab_size": 700, "special_tokens": special, "show_progress": False}
    if kind == "byte-level BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "Metaspace Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", **options)
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    made.train_from_iterator(TEXTS, trainer)
    if kind == "WordPiece":
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        )
    result = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", unk_token="[UNK]")
    result.chat_template = CHAT_TEMPLATE if kind == "byte-level BPE" else TRIMMING_TEMPLATE
    return result


def words(text: str) -> int:
    return len(text.split())


def grid(**changes) -> list[Prompt]:
    options = {
        "haystack": TEXTS,
        "count": words,
        "lengths": [700],
        "depths": [0.5],
        "samples": 1,
        "max_new_tokens": 20,
    }
    return list(needle_prompts(**{**options, **changes}))


def haystack_of(prompt: Prompt) -> str:
    """The prompt without what stands before and after its haystack."""
    header, *middle, _ = prompt.text.split("\n\n")
    assert header in (ONE.header, SEVERAL.header)
    return "\n\n".join(middle)


def around(prompt: Prompt, number: int = 0) -> tuple[str, str]:
    """The haystack before and after one of the needles asked for, without any needle."""
    found = next(m for m in NEEDLE.finditer(haystack_of(prompt)) if m[1] == prompt.answers[number])
    before, after = found.string[: found.start()], found.string[found.end() :]
    return NEEDLE.sub("", before), NEEDLE.sub("", after)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_depths_in_the_tokens_of_the_model(kind, chat):
    count = token_counter(tokenizer(kind), chat=chat)
    plain = token_counter(tokenizer(kind), chat=False)
    longest = max(plain(sentence) for sentence in sentences_of(TEXTS))
    depths = [0.0, 0.2, 0.5, 0.77, 1.0]
    prompts = grid(count=count, lengths=[1500, 6000], depths=depths, samples=2, chat=chat)
    assert len(prompts) == 4 * 2 * 5 * 2
    for prompt in prompts:
        assert 0.99 * prompt.length <= count(prompt.text) + prompt.max_new_tokens <= prompt.length
        before, after = around(prompt)
        total = plain(before) + plain(after)
        assert abs(plain(before) - prompt.depth * total) <= 0.5 * longest + 3
        assert re.search(r"(^|[.!?]|\.\.\.)$", before) and re.match(r"\s|$", after)
        assert (before == "") == (prompt.depth == 0) and (after == "") == (prompt.depth == 1)


@pytest.mark.parametrize("name", TASKS)
def test_each_needle_stands_in_the_text_once(name):
    for prompt in grid(tasks=[name], depths=[0.0, 0.5, 1.0], samples=5):
        task = TASKS[name]
        found = [match[1] for match in NEEDLE.finditer(haystack_of(prompt))]
        assert len(found) == len(set(found)) == task.expected + task.distractors
        assert set(prompt.answers) <= set(found) and len(prompt.answers) == task.expected
        keys = re.search(r"for ([\w, -]+) mentioned in the provided text\?$", prompt.text)[1]
        for key in re.split(r", (?:and )?", keys):
            assert f"for {key} is: " in prompt.text
        assert (prompt.suite, prompt.task, prompt.length, prompt.chat, prompt.stop) == ("needle", name, 700, True, ())


def test_other_needles_stand_anywhere():
    prompts = grid(tasks=["multi_query"], depths=[0.5], samples=60)
    shares = [len(before) / (len(before) + len(after)) for prompt in prompts for before, after in [around(prompt, 1)]]
    assert min(shares) < 0.1 and max(shares) > 0.9 and 0.4 < sum(shares) / len(shares) < 0.6


def test_plain_prompts_begin_the_answer():
    single, several = grid(tasks=["single", "multi_value"], chat=False)
    assert re.search(r"text\? The special magic number for [\w-]+ mentioned in the provided text is$", single.text)
    assert re.search(r"text\? The special magic numbers for [\w-]+ mentioned in the provided text are$", several.text)
    assert single.stop == ("\n",) and not single.chat


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    length=st.integers(130, 3000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_haystack_fills_any_length(sizes, length, depth, seed):
    """Tokens of three characters, which join across sentences."""
    haystack = [" ".join("x" * (1 + index % 9) for index in range(size)) + "." for size in sizes]

    def count(text: str) -> int:
        return 7 + len(text) // 3

    (prompt,) = grid(
        haystack=haystack, count=count, lengths=[length + 100], depths=[depth], tasks=["single"], seed=seed
    )
    spare = prompt.length - prompt.max_new_tokens - count(prompt.text)
    assert 0 <= spare <= max(0.01 * prompt.length, 4 + 10 / 3)
    before, after = around(prompt)
    longest = max(map(len, haystack))
    assert abs(len(before) - depth * (len(before) + len(after))) <= longest / 2 + 6


def test_short_prompts_are_exact_to_the_word():
    """Where every word is a token nothing is left over."""
    for length in range(110, 260, 7):
        (prompt,) = grid(lengths=[length], tasks=["multi_key"])
        assert words(prompt.text) + 20 == length


@pytest.mark.parametrize("misled, most", [(False, 1.5), (True, 4)], ids=["additive", "misleading"])
def test_whole_prompts_are_counted_few_times(misled, most):
    """Even where the tokens of a sentence alone tell nothing of those in a text."""
    counted = []

    def count(text: str) -> int:
        counted.append(words(text))
        return 1 if misled and words(text) < 30 else words(text)

    prompts = grid(count=count, lengths=[8000], depths=[0.0, 0.25, 0.5, 0.75, 1.0], samples=2)
    assert all(7920 <= words(prompt.text) + 20 <= 8000 for prompt in prompts)
    assert sum(number > 1000 for number in counted) <= most * len(prompts)


def test_depths_share_the_beginning():
    prompts = grid(lengths=[4000], depths=[0.25, 0.5, 0.75, 1.0], tasks=list(TASKS))
    for one, other in pairwise(prompts):
        if one.task == other.task:
            assert one.answers == other.answers
            shared = next(
                index for index, pair in enumerate(zip(one.text, other.text, strict=False)) if pair[0] != pair[1]
            )
            assert abs(shared / len(one.text) - one.depth) < 0.03


def test_longer_prompts_begin_like_shorter_ones():
    short, long = grid(lengths=[400, 4000], depths=[1.0], tasks=["single"])
    beginning = around(short)[0].removesuffix("...")
    assert len(beginning.split()) > 250 and long.text.startswith(ONE.header + "\n\n" + beginning)
    assert short.answers != long.answers


def test_samples_differ_in_their_needles():
    prompts = grid(tasks=["single"], samples=6)
    assert [prompt.index for prompt in prompts] == list(range(6))
    assert len({prompt.answers for prompt in prompts}) == 6
    assert len({around(prompt)[0][:40] for prompt in prompts}) == 1  # the haystack is the same: it is read once


def test_a_prompt_depends_on_its_own_place_in_the_grid_alone():
    whole = {prompt.key for prompt in grid(lengths=[300, 900], depths=[0.0, 0.4, 1.0], samples=3)}
    assert len(whole) == 4 * 2 * 3 * 3
    for part in (
        grid(lengths=[900, 300], depths=[1.0, 0.4], samples=2, tasks=["multi_value", "single"]),
        grid(lengths=[300], depths=[0.0], samples=1, tasks=["multi_query"]),
        grid(lengths=[900], depths=[0.4], samples=3, tasks=[NeedleTask("multi_key", distractors=3)]),
    ):
        assert {prompt.key for prompt in part} < whole
    assert not whole & {prompt.key for prompt in grid(lengths=[300, 900], depths=[0.0, 0.4, 1.0], seed=1)}


def test_prompts_of_a_sample_come_together():
    prompts = grid(lengths=[300, 900], depths=[0.0, 1.0], samples=2)
    groups = [(prompt.task, prompt.length, prompt.index) for prompt in prompts]
    assert groups[::2] == groups[1::2] and len(set(groups)) == len(groups) // 2


def test_needles_in_other_scripts():
    count = token_counter(tokenizer("byte-level BPE"), chat=True)
    wording = Wording("请记住。", "{key}的密码是{value}。", "{keys}的密码是什么？", "{keys}的密码是", "和")
    pools = Pools(keys=["北京", "上海", "广州", "深圳"], values=["苹果", "香蕉", "Äpfel", "🍎"])
    haystack = ["天空是蓝色的。草是绿色的。太阳是黄色的。我们出发吧。" * 3]
    for prompt in grid(
        haystack=haystack, count=count, lengths=[2000], tasks=["multi_query"], wording=wording, pools=pools
    ):
        assert 0.99 * 2000 <= count(prompt.text) + 20 <= 2000
        assert all(prompt.text.count(f"的密码是{value}。") == 1 for value in pools.values)
        assert prompt.text.startswith("请记住。\n\n") and prompt.text.endswith("的密码是什么？")


def test_a_cut_sentence_is_marked():
    (prompt,) = grid(haystack=["One two three four five six seven eight nine ten."], lengths=[303], tasks=["single"])
    assert re.search(r"\sOne( [a-z]+)*\.\.\.$", haystack_of(prompt))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"lengths": [90], "tasks": ["multi_key"]},
            r"`lengths` must be at least 9\d for the task 'multi_key'.*got 90",
        ),
        ({"lengths": [5000, 60], "tasks": ["single"]}, r"`lengths` must be at least .*got 60"),
        ({"pools": Pools(keys=["long " * 900])}, r"at least 18\d\d for the task 'single'.*shorter needles"),
        ({"max_new_tokens": 690}, r"of the answer 690\), got 700"),
        ({"haystack": []}, "`haystack` must hold at least one sentence"),
        ({"haystack": ["\n", ""]}, "`haystack` must hold at least one sentence"),
        ({"tasks": ["multi_key"], "pools": Pools(values=["a", "b"])}, "`values` must be at least 4"),
    ],
)
def test_what_cannot_be_built_is_told_at_once(changes, message):
    options = {"haystack": TEXTS, "count": words, "lengths": [700], "depths": [0.5], "max_new_tokens": 20}
    with pytest.raises(ValueError, match=message):
        needle_prompts(**{**options, **changes})  # not one prompt is taken from it


def test_the_smallest_length_that_is_named_works():
    with pytest.raises(ValueError, match="at least") as error:
        grid(lengths=[10], tasks=["multi_query"])
    smallest = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(grid(lengths=[smallest], tasks=["multi_query"])) == 1
    with pytest.raises(ValueError, match="at least"):
        grid(lengths=[smallest - 1], tasks=["multi_query"])


@pytest.mark.skipif(not ESSAYS.is_dir(), reason="the essays are not beside the repository")
def test_essays():
    texts = list(load_texts(str(ESSAYS)))
    for prompt in grid(haystack=texts, lengths=[20_000], depths=[0.3]):
        assert 0.99 * 20_000 <= words(prompt.text) + 20 <= 20_000
        before, after = around(prompt)
        assert abs(words(before) / words(before + after) - 0.3) < 0.002
