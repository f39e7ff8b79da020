"""Prepared rows against TRL's own preparation, and their blocks against the decoded tokens of each."""

import re

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from test_turns import GPT_OSS, LLAMA3, PLAIN, THINKING, TOOL, chat_tokenizer, turns
from tiny import CHAT_TEMPLATE, chats, tiny_llama, tiny_tokenizer
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer
from hf_longalign.blocks import IGNORE, blocks_from_column
from hf_longalign.preparation import RowPreparer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def prepared(tokenizer, row, **options):
    return {
        name: values[0] for name, values in RowPreparer(tokenizer, **options)({k: [v] for k, v in row.items()}).items()
    }


def decoded(tokenizer, row):
    """(is a response, its text) of each block."""
    texts, start = [], 0
    blocks = blocks_from_column(row["blocks"])
    for length, response in zip(blocks.lengths.tolist(), blocks.response.tolist(), strict=True):
        texts.append((response, tokenizer.decode(row["input_ids"][start : start + length])))
        start += length
    return texts


def test_another_version_of_the_package_prepares_rows_anew(tokenizer, monkeypatch):
    """`datasets` finds in its cache what was mapped before by the state of what it maps."""
    before = [Hasher.hash(RowPreparer(tokenizer)) for _ in range(2)]
    monkeypatch.setattr("hf_longalign.preparation.__version__", "0.0.1")
    assert before[0] == before[1] != Hasher.hash(RowPreparer(tokenizer))


# --- against TRL ---


def conversations(template=CHAT_TEMPLATE):
    return [{"messages": messages} for messages in chats(12)]


def tool_rows():
    call = {"type": "function", "function": {"name": "price", "arguments": {"of": "salt"}}}
    rows = []
    for messages in chats(6, turns=1):
        question, answer = messages
        called = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "42"}]
        rows.append({"messages": [question, *called, answer], "tools": [TOOL]})
    return rows


def shareGPT():
    names = {"user": "user", "assistant": "assistant"}
    return [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row]} for row in chats(6)]


DATA = {
    "messages": [{"messages": messages} for messages in chats(12)],
    "from and value": shareGPT(),
    "turns to complete": [{"prompt": messages[:3], "completion": messages[3:]} for messages in chats(8)],
    "prompt and completion": [{"prompt": m[0]["content"] + " ", "completion": m[1]["content"]} for m in chats(8)],
    "text": [{"text": messages[0]["content"]} for messages in chats(8)],
    "tokenised": [{"input_ids": list(range(5, 25)), "labels": [IGNORE] * 10 + list(range(15, 25))}] * 4,
    "masked": [{"input_ids": list(range(5, 25)), "completion_mask": [0] * 10 + [1] * 10}] * 4,
    "tools": tool_rows(),
    "kwargs": [{"messages": m, "chat_template_kwargs": {"bos_token": "<|pad|>"}} for m in chats(4)],
}
PACKED = {"packing": True, "max_length": 128}


@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("messages", {}),
        ("messages", {"assistant_only_loss": True}),
        ("messages", {"assistant_only_loss": True, "max_length": 40}),
        ("messages", {"assistant_only_loss": True, "max_length": 40, "truncation_mode": "keep_end"}),
        ("messages", PACKED),
        ("messages", {**PACKED, "assistant_only_loss": True, "shuffle_dataset": True}),
        ("messages", {**PACKED, "max_length": 48, "packing_strategy": "bfd_split"}),
        ("messages", {"padding_free": True, "max_length": None, "shuffle_dataset": True}),
        ("from and value", {}),
        ("turns to complete", {}),
        ("turns to complete", {"assistant_only_loss": True}),
        ("turns to complete", {"completion_only_loss": False, **PACKED}),
        ("prompt and completion", {}),
        ("prompt and completion", {**PACKED, "completion_only_loss": False}),
        ("text", PACKED),
        ("tokenised", PACKED),
        ("masked", {"completion_only_loss": True}),
        ("masked", {"completion_only_loss": False}),
        ("tools", {}),
        ("kwargs", {}),
    ],
)
def test_tokens_and_labels_are_those_of_trl(tmp_path, name, options, streamed):
    tokenizer = tiny_tokenizer()
    if name == "tools":
        tokenizer.chat_template = THINKING
    rows = Dataset.from_list(DATA[name])
    made = []
    for trainer, config in ((SFTTrainer, SFTConfig), (LongAlignSFTTrainer, LongAlignSFTConfig)):
        args = config(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_steps": 1, **options})
        data = rows.to_iterable_dataset() if streamed else rows
        made.append(trainer(tiny_llama(), args, train_dataset=data, processing_class=tokenizer).train_dataset)
    theirs, ours = map(list, made)
    assert len(ours) == len(theirs) > 0
    for own, their in zip(ours, theirs, strict=True):
        for column in ("input_ids", "labels", "seq_lengths"):
            assert (column in own) == (column in their)
            assert list(own.get(column, [])) == list(their.get(column, []))
        assert len(own["blocks"]) == len(own["input_ids"])
    if not streamed:
        others = set(made[0].column_names) - {"completion_mask", "assistant_masks"}
        assert others <= set(made[1].column_names) and "blocks_found" not in made[1].column_names


def test_a_formatting_function_is_trls(tmp_path):
    rows = Dataset.from_list([{"question": m[0]["content"]} for m in chats(4)])
    made = []
    for trainer, config in ((SFTTrainer, SFTConfig), (LongAlignSFTTrainer, LongAlignSFTConfig)):
        args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        options = {"processing_class": tiny_tokenizer(), "formatting_func": lambda row: "Q: " + row["question"]}
        made.append(trainer(tiny_llama(), args, train_dataset=rows, **options).train_dataset)
    assert made[0]["input_ids"][:] == made[1]["input_ids"][:]


def test_answers_without_marks_are_those_of_the_same_template_with_marks(tokenizer):
    unmarked = tiny_tokenizer()
    for mark in ("{% generation %}", "{% endgeneration %}"):
        unmarked.chat_template = unmarked.chat_template.replace(mark, "")
    assert unmarked.chat_template != tokenizer.chat_template
    for messages in chats(6):
        theirs = prepared(tokenizer, {"messages": messages}, answers_only="marks")
        ours = prepared(unmarked, {"messages": messages}, answers_only="turns")
        assert ours["labels"].tolist() == theirs["labels"].tolist()
        assert 0 < (ours["labels"] != IGNORE).sum() < ours["labels"].size


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (LLAMA3, ["Yes<|end|>", "No<|end|>"]),
        (GPT_OSS, ["<|channel|>final<|message|>Yes<|end|>", "<|channel|>final<|message|>No<|return|>"]),
        (PLAIN, ["Yes\n\n", "No\n\n"]),
    ],
    ids=["llama 3", "gpt-oss", "plain"],
)
def test_answers_without_marks_end_with_their_last_token(template, answers):
    tokenizer = chat_tokenizer(template)
    row = prepared(tokenizer, {"messages": turns("Salt?", "Yes", "Tin?", "No")}, answers_only="turns")
    runs = "".join("\0" if label == IGNORE else tokenizer.decode([label]) for label in row["labels"].tolist())
    assert [run for run in runs.split("\0") if run] == answers


def test_answers_that_cannot_be_found_are_refused(tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages[::-1] %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    with pytest.raises(ValueError, match=r"cannot find the answers of a row.*\{% generation %\}"):
        prepared(tokenizer, {"messages": turns("Salt?", "Yes")}, answers_only="turns")
    with pytest.raises(RuntimeError, match="found no answer in a row"):
        prepared(tiny_tokenizer(), {"messages": turns("Salt?")}, answers_only="marks")


# --- blocks ---


@pytest.mark.parametrize("tokenised", [False, True])
@pytest.mark.parametrize("masked", [True, False], ids=["assistant_only", "all_targets"])
def test_turns_of_a_chat(tokenizer, masked, tokenised):
    row = {"messages": chats(3)[2]}
    result = prepared(tokenizer, row, answers_only="marks" if masked else None)
    if tokenised:
        row |= {name: result[name].tolist() for name in ("input_ids", "labels")}
        result = prepared(tokenizer, row)
    assert result["blocks_found"]
    first, answer, second, reply = (message["content"] for message in row["messages"])
    assert decoded(tokenizer, result) == [
        (False, f"<|start|>user\n{first}<|end|>\n<|start|>assistant\n"),
        (True, f"{answer}<|end|>\n"),
        (False, f"<|start|>user\n{second}<|end|>\n<|start|>assistant\n"),
        (True, f"{reply}<|end|>\n"),
    ]


def with_parts(template=None, before="Read.\n\n"):
    contexts = ["Ardel sold salt.", "Bemo sold wool.", "Cato sold glass."]
    content = before + "\n\n".join(contexts) + "\n\nWhat did Bemo sell?"
    parts = [{"message": 0, "start": content.index(text), "end": content.index(text) + len(text)} for text in contexts]
    return contexts, {"messages": turns(content, "wool"), "parts": parts}


def test_parts_of_a_message(tokenizer):
    contexts, row = with_parts()
    texts = decoded(tokenizer, prepared(tokenizer, row))
    assert [text.strip() for _, text in texts[1:4]] == contexts
    assert texts[0] == (False, "<|start|>user\nRead.\n\n")
    assert texts[4][1].strip().startswith("What did Bemo sell?")
    assert texts[5:] == [(True, "wool<|end|>\n")]


def test_parts_of_a_text_and_of_a_prompt(tokenizer):
    content = "Ardel sold salt. What did Ardel sell? "
    parts = [{"message": 0, "start": content.index("What"), "end": len(content)}]
    ids = tokenizer(content + "Salt.<|end|>")["input_ids"]
    row = {"input_ids": ids, "labels": ids, "parts": parts}
    texts = decoded(tokenizer, prepared(tokenizer, {**row, "text": content + "Salt.<|end|>"}))
    assert [text.strip() for _, text in texts] == ["Ardel sold salt.", "What did Ardel sell?", "Salt.<|end|>"]
    texts = decoded(tokenizer, prepared(tokenizer, {**row, "prompt": content, "completion": "Salt.<|end|>"}))
    assert [(response, text.strip()) for response, text in texts] == [
        (False, "Ardel sold salt."),
        (False, "What did Ardel sell?"),
        (True, "Salt.<|end|>"),
    ]


def test_trimmed_messages_keep_their_offsets():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'] | trim +")
    _, row = with_parts(before="  ")
    texts = decoded(tokenizer, prepared(tokenizer, row))
    assert texts[1][1].strip() == "Ardel sold salt." and texts[2][1].strip() == "Bemo sold wool."


def test_block_lengths_column_wins(tokenizer):
    row = {"input_ids": [5, 6, 7, 8], "labels": [IGNORE, IGNORE, IGNORE, 8], "block_lengths": [1, 2, 1]}
    blocks = blocks_from_column(prepared(tokenizer, row)["blocks"])
    assert blocks.lengths.tolist() == [1, 2, 1] and blocks.response.tolist() == [False, False, True]
    tokens = len(prepared(tokenizer, {"messages": turns("a", "b")})["input_ids"])
    row = {"messages": turns("a", "b"), "block_lengths": [3, tokens - 3]}
    assert blocks_from_column(prepared(tokenizer, row)["blocks"]).lengths.tolist() == [3, tokens - 3]
    with pytest.raises(ValueError, match="`block_lengths` must add up to"):
        prepared(tokenizer, {**row, "block_lengths": [3]})


@pytest.mark.parametrize(
    "columns", [("input_ids", "labels", "blocks"), ("input_ids", "labels", "blocks", "messages", "parts")]
)
def test_rows_that_were_prepared_keep_their_blocks(tokenizer, columns):
    _, row = with_parts()
    for kept in (slice(None), slice(40)):
        once = {**row, **prepared(tokenizer, row, kept=kept)}
        again = prepared(tokenizer, {name: once[name] for name in columns}, kept=kept)
        assert again["blocks"].tolist() == once["blocks"].tolist() and len(set(once["blocks"].tolist())) > 1
    size = len(once["input_ids"])
    for blocks, said in (
        ([0] * 3, r"int64 of shape \(3,\)"),
        (["a"] * size, "<U1"),
        ([7] * size, "from 0 to 3, got 7 to 7"),
    ):
        with pytest.raises(ValueError, match=f"`blocks` must be .*{said}"):
            prepared(tokenizer, {**once, "blocks": blocks})


def test_truncation_cuts_blocks_and_tokens_alike(tokenizer):
    _, row = with_parts()
    whole = prepared(tokenizer, row)
    for kept in (slice(9), slice(-9, None)):
        cut = prepared(tokenizer, row, kept=kept)
        for name in ("input_ids", "labels", "blocks"):
            assert cut[name].tolist() == whole[name][kept].tolist()
    assert blocks_from_column(cut["blocks"]).response.tolist() == [False, True]


def test_plain_text_is_one_block(tokenizer):
    row = {"text": "Ardel sold salt.", "input_ids": [5, 6], "labels": [5, 6]}
    result = prepared(tokenizer, row)
    assert result["blocks"].tolist() == [2, 2] and result["blocks_found"]


@pytest.mark.parametrize(
    "part",
    [
        {"message": 4, "start": 0, "end": 2},
        {"message": 0, "start": 4, "end": 4},
        {"message": 0, "start": 0, "end": 9999},
    ],
)
def test_bad_parts_are_named(tokenizer, part):
    with pytest.raises(ValueError, match="message and character offsets inside it"):
        prepared(tokenizer, {"messages": chats(1)[0], "parts": [part]})


def test_parts_that_cannot_be_placed_are_refused(tokenizer):
    _, row = with_parts()
    ids = prepared(tokenizer, row)["input_ids"].tolist()
    other = {**row, "input_ids": ids[:-1], "labels": ids[:-1]}
    with pytest.raises(ValueError, match=r"`parts` cannot be placed.* Give a `block_lengths` column"):
        prepared(tokenizer, other)
    # The remedy.
    blocks = blocks_from_column(prepared(tokenizer, {**other, "block_lengths": [4, len(ids) - 5]})["blocks"])
    assert blocks.lengths.tolist() == [4, len(ids) - 5]
    changing = chat_tokenizer(THINKING)
    messages = turns("a", "<think>b</think>c", "d", "e")
    with pytest.raises(ValueError, match="does not show its content as it stands"):
        prepared(changing, {"messages": messages, "parts": [{"message": 1, "start": 0, "end": 5}]})


def test_what_another_template_made_falls_back_to_its_labels(tokenizer):
    row = {"messages": chats(1)[0], "input_ids": [5, 6, 7, 8], "labels": [IGNORE, IGNORE, 7, 8]}
    result = prepared(tokenizer, row)
    assert not result["blocks_found"]
    assert result["blocks"].tolist() == [0, 0, 3, 3]
    broken = chat_tokenizer("{{ raise_exception('no') }}")
    assert prepared(broken, row)["blocks"].tolist() == [0, 0, 3, 3]
    typed = {**row, "messages": [{"role": "user", "content": [{"type": "text", "text": "Salt?"}]}]}
    assert not prepared(tokenizer, typed)["blocks_found"]


def unfound_turns():
    """Three rows whose turns are found and two that their template writes in another way, and a tokenizer."""
    rows = [{"messages": messages} for messages in chats(3)]
    rows += [{"messages": turns("Salt?", "<think>", "Tin?", "No")} for _ in range(2)]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length > 1 and messages[1]['content'] == '<think>' %}<|start|>other{% endif %}"
        + tokenizer.chat_template
    )
    return rows, tokenizer


def test_rows_whose_turns_are_not_found_are_counted_once(tmp_path, caplog):
    rows, tokenizer = unfound_turns()
    args = LongAlignSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    trainer = LongAlignSFTTrainer(
        tiny_llama(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert caplog.text.count("2 of 5 rows of the train dataset do not show their turns") == 1
    found = [len(set(row)) > 1 for row in trainer.train_dataset["blocks"]]
    assert found == [True] * 3 + [False] * 2


@pytest.mark.parametrize("what", ["turns", "targets"])
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_a_stream_are_counted_as_they_are_read(tmp_path, caplog, what, workers):
    rows, tokenizer = unfound_turns()
    told = "do not show their turns: their blocks are the runs of their labels."
    if what == "targets":
        told = "have no target within `max_length` and are left out. Raise it to train on them."
        prompts = ["Salt? ", "Salt? " * 99, "Tin? ", "Tin? " * 99, "Wool? "]
        rows = [{"prompt": turns(prompt), "completion": turns("q", "Yes.")[1:]} for prompt in prompts]
    args = LongAlignSFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=3, max_length=256,
        per_device_train_batch_size=2, dataloader_num_workers=workers,
    )  # fmt: skip
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = LongAlignSFTTrainer(tiny_llama(), args, train_dataset=stream, processing_class=tokenizer)
    trainer.train()
    count, total = re.search(r"(\d+) of (\d+) rows read of streamed datasets " + re.escape(told), caplog.text).groups()
    # A stream is begun again where its rows end before the steps do.
    assert int(total) in (5, 10) and int(count) == int(total) * 2 // 5
    # What workers log goes to the screen.
    assert caplog.text.count(f"Rows of a streamed dataset {told}") == (0 if workers else 1)


def test_streams_are_prepared_row_by_row(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"messages": messages} for messages in chats(5)))
    args = LongAlignSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, **PACKED)
    trainer = LongAlignSFTTrainer(tiny_llama(), args, train_dataset=stream, processing_class=tiny_tokenizer())
    tokens = 0
    for row in trainer.train_dataset:
        blocks = blocks_from_column(np.asarray(row["blocks"]), np.asarray(row["seq_lengths"]))
        assert blocks.response.tolist() == [False, True] * (blocks.response.size // 2)
        tokens += len(row["input_ids"])
    assert tokens == sum(len(prepared(tiny_tokenizer(), {"messages": m})["input_ids"]) for m in chats(5))
