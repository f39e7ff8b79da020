"""Turns in the text of every chat template that TRL knows, and of templates that change what they are given."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import trl
from tiny import tiny_tokenizer

from hf_longalign.blocks import blocks_from_column
from hf_longalign.preparation import RowPreparer


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
# Their contents are lists, which only a processor makes.
OF_PROCESSORS = ("idefics3", "llava_next", "smolvlm")
SPECIAL = re.compile(
    r"<\|[\w▁ ]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_turn>|<\|?turn\|?>|<\|?channel\|?>|\[/?INST\]|"
    r"<sop>|\[gMASK\]|</?think>|</?tool_call>|<\|[a-z_]+:?\|>"
)


def chat_tokenizer(template):
    tokenizer = tiny_tokenizer()
    special = sorted({*SPECIAL.findall(template), "<s>", "</s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def blocks_of(tokenizer, messages, **columns):
    """Whether the turns were found, and (is a response, its text) of each block."""
    row = RowPreparer(tokenizer)({"messages": [messages], **{name: [value] for name, value in columns.items()}})
    ids, found = row["input_ids"][0], row["blocks_found"][0]
    assert row["labels"][0].tolist() == ids.tolist()
    texts, start = [], 0
    blocks = blocks_from_column(row["blocks"][0])
    for length, response in zip(blocks.lengths.tolist(), blocks.response.tolist(), strict=True):
        texts.append((response, tokenizer.decode(ids[start : start + length])))
        start += length
    assert start == ids.size
    return found, texts


def found_blocks(template, messages, **columns):
    found, texts = blocks_of(chat_tokenizer(template), messages, **columns)
    assert found
    return texts


@pytest.mark.parametrize("thoughts", [False, True], ids=["plain", "thoughts"])
@pytest.mark.parametrize(
    "path", [path for path in TEMPLATES if not path.stem.startswith(OF_PROCESSORS)], ids=lambda path: path.stem
)
def test_every_template_of_trl(path, thoughts):
    answers = ["Quite so", "Not at all"]
    if thoughts:
        answers = [f"<think>\npondering{index}\n</think>\n\n{answer}" for index, answer in enumerate(answers)]
    texts = found_blocks(path.read_text(), turns("Salt?", answers[0], "Tin?", answers[1]))
    assert [response for response, _ in texts] == [False, True, False, True]
    (_, salt), (_, yes), (_, tin), (_, no) = texts
    assert "Salt?" in salt and "Tin?" in tin
    assert "Quite so" in yes and "Not at all" in no
    assert "pondering" not in salt + tin  # the thoughts that are left belong to their answers
    # So does the token that ends an answer.
    assert any(token in yes for token in SPECIAL.findall(yes.partition("Quite so")[2]))
    assert "Quite so" not in tin and SPECIAL.sub("", yes.partition("Quite so")[2]).strip() == ""


@pytest.mark.parametrize("name", OF_PROCESSORS[::2])
def test_contents_that_a_template_does_not_show(name):
    template = next(path for path in TEMPLATES if path.stem == name).read_text()
    found, texts = blocks_of(chat_tokenizer(template), turns("Salt?", "Yes"))
    assert not found and len(texts) == 1


LLAMA3 = (
    "{% for m in messages %}{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST]' + m['content'] + '[/INST]' if m['role'] == 'user' else ' ' + m['content'] + '</s>' }}{% endfor %}"
)
THINKING = (  # as Qwen3's: thoughts stay after the last question alone
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|start|>system\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% set text = m['content'] or '' %}"
    "{{ text if loop.index0 > ns.last else text.split('</think>')[-1] | trim }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
GPT_OSS = (  # the last answer ends otherwise
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ('<|channel|>final' if m['role'] == 'assistant' else '') }}"
    "{{ '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt and m['role'] == 'assistant' else '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PLAIN = (  # no token of its own
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "price", "description": "", "parameters": {"type": "object"}}}


def test_short_answers_are_not_found_in_headers():
    assert found_blocks(LLAMA3, turns(" header ", "a", "b?", "s")) == [
        (False, "<|header|>user<|/header|>\n\nheader<|end|><|header|>assistant<|/header|>\n\n"),
        (True, "a<|end|>"),
        (False, "<|header|>user<|/header|>\n\nb?<|end|><|header|>assistant<|/header|>\n\n"),
        (True, "s<|end|>"),
    ]


def test_contents_that_look_like_the_template():
    header = "<|header|>assistant<|/header|>\n\n"
    texts = found_blocks(LLAMA3, turns(f"Say {header}a", f"b{header}", "c", f"{header}d"))
    assert [text.partition(header)[2] for response, text in texts if not response] == [f"a<|end|>{header}", ""]
    assert [text for response, text in texts if response] == [f"b{header.strip()}<|end|>", f"{header}d<|end|>"]


def test_template_that_refuses_other_orders():
    assert found_blocks(MISTRAL, turns("Salt?", "Yes", "Tin?", "No")) == [
        (False, "[INST]Salt?[/INST]"),
        (True, " Yes</s>"),
        (False, "[INST]Tin?[/INST]"),
        (True, " No</s>"),
    ]


def test_template_that_drops_earlier_thoughts():
    messages = turns("Salt?", f"<think>{'a rather long thought ' * 9}</think>Yes", "Tin?", "<think>b</think>No")
    assert found_blocks(THINKING, messages) == [
        (False, "<|start|>user\nSalt?<|end|>\n<|start|>assistant\n"),
        (True, "Yes<|end|>\n"),
        (False, "<|start|>user\nTin?<|end|>\n<|start|>assistant\n"),
        (True, "<think>b</think>No<|end|>\n"),
    ]


def test_answers_keep_the_token_that_ends_them_in_the_middle_too():
    assert found_blocks(GPT_OSS, turns("Salt?", "Yes", "Tin?", "No")) == [
        (False, "<|start|>user<|message|>Salt?<|end|><|start|>assistant"),
        (True, "<|channel|>final<|message|>Yes<|end|>"),
        (False, "<|start|>user<|message|>Tin?<|end|><|start|>assistant"),
        (True, "<|channel|>final<|message|>No<|return|>"),
    ]


def test_template_without_special_tokens():
    assert found_blocks(PLAIN, turns("Salt?", "user", "Tin?", "No")) == [
        (False, "### user:\nSalt?\n\n### assistant:\n"),
        (True, "user\n\n"),
        (False, "### user:\nTin?\n\n### assistant:\n"),
        (True, "No\n\n"),
    ]


def test_empty_answers_are_blocks():
    assert found_blocks(LLAMA3, turns("a?", "", "b?", " ")) == [
        (False, "<|header|>user<|/header|>\n\na?<|end|><|header|>assistant<|/header|>\n\n"),
        (True, "<|end|>"),
        (False, "<|header|>user<|/header|>\n\nb?<|end|><|header|>assistant<|/header|>\n\n"),
        (True, "<|end|>"),
    ]


@pytest.mark.parametrize("as_json", [False, True], ids=["tools", "tools as JSON"])
@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_tool_calls_are_responses(content, as_json):
    call = {"type": "function", "function": {"name": "price", "arguments": {"of": "salt"}}}
    messages = [
        {"role": "user", "content": "Salt?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42 coins"},
    ]
    texts = found_blocks(THINKING, messages, tools=json.dumps([TOOL]) if as_json else [TOOL])
    assert [response for response, _ in texts] == [False, True, False, True]
    assert texts[0][1].startswith("<|start|>system\n") and texts[0][1].endswith("assistant\n")
    assert texts[1][1] == (content or "") + '{"name": "price", "arguments": {"of": "salt"}}<|end|>\n'
    assert texts[2][1] == "<|start|>tool\n42<|end|>\n<|start|>assistant\n"


def test_a_conversation_may_begin_with_a_response():
    assert found_blocks(LLAMA3, turns("Hello", "Salt?", roles=("assistant", "user"))) == [
        (False, "<|header|>assistant<|/header|>\n\n"),
        (True, "Hello<|end|>"),
        (False, "<|header|>user<|/header|>\n\nSalt?<|end|>"),
    ]


def test_a_template_that_shuffles_its_contents_is_not_followed():
    template = "{% for m in messages[::-1] %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    found, texts = blocks_of(chat_tokenizer(template), turns("Salt?", "Yes"))
    assert not found and len(texts) == 1


def test_rows_of_one_shape_share_a_frame():
    preparer = RowPreparer(chat_tokenizer(LLAMA3))
    preparer({"messages": [turns("Salt?", "Yes"), turns("Tin?", "No"), turns("Wool?", "")]})
    assert len(preparer._frames) == 2
    assert preparer.__getstate__()["_frames"] == {}  # what `datasets` hashes does not change with use


def test_random_conversations_are_cut_where_they_were_joined():
    rng = np.random.default_rng(0)
    pieces = ["a", "user", "assistant", "<|end|>", "\n\n", "<|header|>", "<|/header|>", " ", "Yes", "?"]
    tokenizer = chat_tokenizer(LLAMA3.replace(" | trim", ""))
    for _ in range(200):
        contents = ["".join(rng.choice(pieces, rng.integers(1, 6))) for _ in range(rng.integers(1, 7))]
        contents = [content if content.strip() else "x" for content in contents]
        expected = ""
        for index, content in enumerate(contents):
            role = ("user", "assistant")[index % 2]
            expected += f"<|header|>{role}<|/header|>\n\n" + (
                f"\0{content}<|end|>\0" if index % 2 else f"{content}<|end|>"
            )
        found, texts = blocks_of(tokenizer, turns(*contents))
        assert found
        joined = "".join(f"\0{text}\0" if response else text for response, text in texts)
        # White space behind the token that ends an answer goes with it.
        assert joined == expected.rstrip("\0") + ("\0" if len(contents) % 2 == 0 else "")
