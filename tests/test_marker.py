"""Block marks against the decoded tokens of each block."""

import json

import numpy as np
import pytest
from tiny import chats, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_longalign.blocks import IGNORE, blocks_from_labels, unmark_labels
from hf_longalign.marker import BlockMarker


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def chat_row(tokenizer, messages, **columns):
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    labels = [
        token if target else IGNORE
        for token, target in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    return {"messages": messages, "input_ids": encoded["input_ids"], "labels": labels, **columns}


def decoded_blocks(tokenizer, row):
    """(is a response, its text) of each block of a marked row; checks that the labels come back unchanged."""
    marked = np.array(BlockMarker(tokenizer, "text")(row)["labels"])
    assert unmark_labels(marked).tolist() == row["labels"]
    blocks = blocks_from_labels(marked)
    texts, start = [], 0
    for length, response in zip(blocks.lengths.tolist(), blocks.response.tolist(), strict=True):
        texts.append((response, tokenizer.decode(row["input_ids"][start : start + length])))
        start += length
    return texts


@pytest.mark.parametrize("masked", [True, False], ids=["assistant_only", "all_targets"])
def test_turns_of_a_chat(tokenizer, masked):
    row = chat_row(tokenizer, chats(3)[2])
    if not masked:
        row["labels"] = list(row["input_ids"])
    first, answer, second, reply = (message["content"] for message in row["messages"])
    assert decoded_blocks(tokenizer, row) == [
        (False, f"<|start|>user\n{first}<|end|>\n<|start|>assistant\n"),
        (True, f"{answer}<|end|>\n"),
        (False, f"<|start|>user\n{second}<|end|>\n<|start|>assistant\n"),
        (True, f"{reply}<|end|>\n"),
    ]


def test_parts_of_a_message(tokenizer):
    contexts = ["Ardel sold salt.", "Bemo sold wool.", "Cato sold glass."]
    content = "Read.\n\n" + "\n\n".join(contexts) + "\n\nWhat did Bemo sell?"
    parts = [
        {"message": 0, "start": content.index(text), "end": content.index(text) + len(text), "kind": "context"}
        for text in contexts
    ]
    row = chat_row(
        tokenizer,
        [{"role": "user", "content": content}, {"role": "assistant", "content": "wool"}],
        parts=parts,
    )
    texts = decoded_blocks(tokenizer, row)
    assert [text.strip() for _, text in texts[1:4]] == contexts
    assert texts[0] == (False, "<|start|>user\nRead.\n\n")
    assert texts[4][1].strip().startswith("What did Bemo sell?")


def test_prompt_and_completion_as_text(tokenizer):
    prompt, completion = "What did Ardel sell? ", "Salt.<|end|>"
    input_ids = tokenizer(prompt + completion)["input_ids"]
    row = {"prompt": prompt, "completion": completion, "input_ids": input_ids, "labels": list(input_ids)}
    assert decoded_blocks(tokenizer, row)[0][1].strip() == prompt.strip()


def test_block_lengths_column_wins(tokenizer):
    row = {"input_ids": [5, 6, 7, 8], "labels": [IGNORE, IGNORE, IGNORE, 8], "block_lengths": [1, 2, 1]}
    assert BlockMarker(tokenizer, "text")(row)["labels"] == [-101, -101, IGNORE, -1017]


def test_plain_text_is_left_alone(tokenizer):
    row = {"text": "Ardel sold salt.", "input_ids": [5, 6], "labels": [5, 6]}
    assert BlockMarker(tokenizer, "text")(row)["labels"] == [5, 6]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"message": 4, "start": 0, "end": 2}, "message and character offsets inside it"),
        ({"message": 0, "start": 4, "end": 4}, "message and character offsets inside it"),
        ({"message": 0, "start": 0, "end": 9999}, "message and character offsets inside it"),
    ],
)
def test_bad_parts_are_named(tokenizer, part, message):
    with pytest.raises(ValueError, match=message):
        BlockMarker(tokenizer, "text")(chat_row(tokenizer, chats(1)[0], parts=[part]))


def test_parts_of_tokens_from_another_text_are_refused(tokenizer):
    row = chat_row(tokenizer, chats(1)[0], parts=[{"message": 0, "start": 0, "end": 4}])
    row["input_ids"], row["labels"] = row["input_ids"][:-1], row["labels"][:-1]
    with pytest.raises(ValueError, match="does not tokenise to the row's `input_ids`"):
        BlockMarker(tokenizer, "text")(row)


def test_trimmed_messages_keep_their_offsets(tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'] | trim +")
    content = "  Ardel sold salt. What?"
    start = content.index("What")
    row = chat_row(
        tokenizer,
        [{"role": "user", "content": content}, {"role": "assistant", "content": "salt"}],
        parts=[{"message": 0, "start": start, "end": len(content)}],
    )
    assert decoded_blocks(tokenizer, row)[1][1].strip().startswith("What?")


LLAMA3 = (
    "{% for m in messages %}{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST]' + m['content'] + '[/INST]' if m['role'] == 'user' else ' ' + m['content'] + '<|end|>' }}{% endfor %}"
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
TOOL = {"type": "function", "function": {"name": "price", "description": "", "parameters": {"type": "object"}}}


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def template_blocks(template, messages, **columns):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    input_ids = tokenizer.apply_chat_template(messages, tools=[TOOL] if columns else None, return_dict=True)[
        "input_ids"
    ]
    return decoded_blocks(
        tokenizer, {"messages": messages, "input_ids": input_ids, "labels": list(input_ids), **columns}
    )


def test_short_answers_are_not_found_in_headers():
    assert template_blocks(LLAMA3, turns(" header ", "a", "b?", "s")) == [
        (False, "<|header|>user<|/header|>\n\nheader<|end|><|header|>assistant<|/header|>\n\n"),
        (True, "a<|end|>"),
        (False, "<|header|>user<|/header|>\n\nb?<|end|><|header|>assistant<|/header|>\n\n"),
        (True, "s<|end|>"),
    ]


def test_template_that_refuses_other_orders():
    assert template_blocks(MISTRAL, turns("Salt?", "Yes", "Tin?", "No")) == [
        (False, "[INST]Salt?[/INST]"),
        (True, " Yes<|end|>"),
        (False, "[INST]Tin?[/INST]"),
        (True, " No<|end|>"),
    ]


def test_template_that_drops_earlier_thoughts():
    messages = turns("Salt?", f"<think>{'a rather long thought ' * 9}</think>Yes", "Tin?", "<think>b</think>No")
    assert template_blocks(THINKING, messages) == [
        (False, "<|start|>user\nSalt?<|end|>\n<|start|>assistant\n"),
        # Where the first answer ends cannot be told; the next question's content can.
        (True, "Yes<|end|>\n<|start|>user\n"),
        (False, "Tin?<|end|>\n<|start|>assistant\n"),
        (True, "<think>b</think>No<|end|>\n"),
    ]


@pytest.mark.parametrize("as_json", [False, True], ids=["tools", "tools as JSON"])
@pytest.mark.parametrize("content", [None, ""])
def test_tool_calls_are_responses(content, as_json):
    call = {"type": "function", "function": {"name": "price", "arguments": {"of": "salt"}}}
    messages = [
        {"role": "user", "content": "Salt?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42 coins"},
    ]
    columns = {"tools": json.dumps([TOOL])} if as_json else {"tools": [TOOL]}
    blocks = template_blocks(THINKING, messages, **columns)
    assert [response for response, _ in blocks] == [False, True, False, True]
    assert blocks[0][1].startswith("<|start|>system\n") and blocks[0][1].endswith("assistant\n")
    assert blocks[1][1] == '{"name": "price", "arguments": {"of": "salt"}}<|end|>\n'
    assert blocks[2][1] == "<|start|>tool\n42<|end|>\n<|start|>assistant\n"


def test_a_conversation_may_begin_with_a_response(tokenizer):
    row = chat_row(tokenizer, turns("Hello", "Salt?", roles=("assistant", "user")))
    assert decoded_blocks(tokenizer, row) == [
        (False, "<|start|>assistant\n"),
        (True, "Hello<|end|>\n"),
        (False, "<|start|>user\nSalt?<|end|>\n"),
    ]
