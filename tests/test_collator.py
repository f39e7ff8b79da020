"""The collator against a naive one, against TRL's, inside dataloader workers, and on bad rows."""

import dataclasses
import logging
import multiprocessing
import pickle
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chats, tiny_llama, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_longalign import SkipPositionDataCollator
from hf_longalign.blocks import Blocks, blocks_to_column
from hf_longalign.collator import PATIENCE
from hf_longalign.positions import STRATEGIES, document_rng, sample_positions


PAD = 99


def make_collator(**arguments):
    return SkipPositionDataCollator(PAD, **{"target_length": 64, "skip_probability": 1.0, **arguments})


def make_rows(count, seed=0, longest=12):
    """Rows of instruction, response, instruction, response, and at times a token of the template; all different."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids, labels = [], []
        for turn in range(4):
            block = [rng.randrange(90) for _ in range(rng.randint(1, longest // 4))]
            ids += block
            labels += block if turn % 2 else [-100] * len(block)
        if rng.random() < 0.5:
            ids.append(90)
            labels.append(-100)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def naive_positions(ids, labels, collator, epoch=0):
    """One document by the public functions, its blocks found token by token."""
    rng = document_rng(np.array(ids), seed=collator.seed, epoch=epoch)
    if rng.random() >= collator.skip_probability:
        return list(range(len(ids)))
    lengths, response = [], []
    for index, label in enumerate(labels):
        if index == 0 or (label == -100) != (labels[index - 1] == -100):
            lengths.append(0)
            response.append(label != -100)
        lengths[-1] += 1
    if len(lengths) > 1 and not response[-1]:
        lengths[-2:], response = [lengths[-2] + lengths[-1]], response[:-1]
    return sample_positions(
        lengths,
        strategy=collator.strategy,
        target_length=collator.target_length,
        rng=rng,
        response=np.array(response),
    ).tolist()


def pack(rows):
    """Rows as one packed row."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
    }


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([None, 1, 8]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padded_batch(strategy, count, seed, multiple, probability):
    rows = make_rows(count, seed)
    collator = make_collator(strategy=strategy, skip_probability=probability, pad_to_multiple_of=multiple, seed=seed)
    batch = collator(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    width = longest if multiple is None else -(-longest // multiple) * multiple
    expected = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for row in rows:
        padding = width - len(row["input_ids"])
        expected["input_ids"].append(row["input_ids"] + [PAD] * padding)
        expected["labels"].append(row["labels"] + [-100] * padding)
        expected["attention_mask"].append([1] * len(row["input_ids"]) + [0] * padding)
        expected["position_ids"].append(naive_positions(**as_arguments(row), collator=collator) + [0] * padding)
    if strategy == "none":
        del expected["position_ids"]
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}


def as_arguments(row):
    return {"ids": row["input_ids"], "labels": row["labels"]}


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.sampled_from([None, 8]),
    st.sampled_from([0.5, 1.0]),
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_batch(strategy, documents_of_rows, seed, multiple, probability):
    rows = make_rows(sum(documents_of_rows), seed)
    collator = make_collator(
        strategy=strategy, skip_probability=probability, padding_free=True, pad_to_multiple_of=multiple, seed=seed
    )
    packed, left = [], list(rows)
    for count in documents_of_rows:
        packed.append(pack(left[:count]))
        left = left[count:]
    batch = collator(packed)
    ids, labels, positions, boundaries, index = [], [], [], [0], []
    for number, row in enumerate(rows):
        ids += row["input_ids"]
        labels += [-100, *row["labels"][1:]]
        positions += naive_positions(**as_arguments(row), collator=collator)
        boundaries.append(len(ids))
        index += [number] * len(row["input_ids"])
    padding = -len(ids) % multiple if multiple else 0
    if padding:
        ids += [PAD] * padding
        labels += [-100] * padding
        positions += range(padding)
        boundaries.append(len(ids))
        index += [len(rows)] * padding
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels]
    assert batch["position_ids"].tolist() == [positions]
    assert batch["seq_idx"].tolist() == [index]
    longest = max(b - a for a, b in pairwise(boundaries))
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].tolist() == boundaries
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"max_length_{side}"] == longest
        assert isinstance(batch[f"max_length_{side}"], int)
    assert batch["seq_idx"].dtype == torch.int32
    assert {batch[key].dtype for key in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert "attention_mask" not in batch


@pytest.mark.parametrize(("padding_free", "packed"), [(False, False), (True, False), (True, True)])
def test_ordinary_positions_give_the_batch_of_trl(padding_free, packed):
    rows = make_rows(5)
    if packed:
        rows = [pack(rows[:2]), pack(rows[2:])]
    theirs = DataCollatorForLanguageModeling(PAD, padding_free=padding_free)(rows)
    ours = make_collator(strategy="none", padding_free=padding_free)(rows)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[key].dtype == value.dtype, key
            assert ours[key].is_contiguous()
            torch.testing.assert_close(ours[key], value, msg=key)
        else:
            assert ours[key] == value, key


@pytest.mark.parametrize("container", ["numpy", "torch", "int32", "tuple"])
def test_rows_may_be_arrays_and_tensors(container):
    convert = {
        "numpy": np.array,
        "torch": torch.tensor,
        "int32": lambda values: np.array(values, dtype=np.int32),
        "tuple": tuple,
    }[container]
    rows = [pack(make_rows(2)), pack(make_rows(3, seed=1))]
    collator = make_collator(padding_free=True)
    converted = collator([{key: convert(value) for key, value in row.items()} for row in rows])
    for key, value in collator(rows).items():
        assert torch.equal(torch.as_tensor(converted[key]), torch.as_tensor(value)), key
        assert torch.as_tensor(converted[key]).dtype == torch.as_tensor(value).dtype


def test_rows_are_left_as_they_were():
    rows = [
        {
            "input_ids": np.arange(6),
            "labels": np.array([-100, -100, 3, 4, 5, 6]),
            "blocks": np.array([0, 1, 2, 2, 2, 2], dtype=np.int8),
        }
    ]
    before = {key: value.copy() for key, value in rows[0].items()}
    batch = make_collator(padding_free=True)(rows)
    batch["input_ids"].fill_(7)
    batch["labels"].fill_(7)
    for key, value in before.items():
        assert rows[0][key].tolist() == value.tolist()
    plain = {"input_ids": np.arange(6)}
    batch = make_collator(padding_free=True)([plain])
    assert batch["labels"].tolist() == [[-100, 1, 2, 3, 4, 5]]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]


def jumps(batch):
    steps = batch["position_ids"][0].diff()
    return set(((steps > 1).nonzero().flatten() + 1).tolist())


def all_jumps(row, strategy="skip_all", epochs=40, **arguments):
    collator = make_collator(strategy=strategy, target_length=1000, **arguments)
    found = set()
    for epoch in range(epochs):
        collator.set_epoch(epoch)
        found |= jumps(collator([row]))
    return found


def test_a_blocks_column_says_the_blocks():
    labels = [-100, -100, -100, -100, 5, 6, -100, -100, 7, 8]
    lengths, response = [2, 2, 2, 2, 2], np.array([False, False, True, False, True])
    row = {"input_ids": list(range(10)), "labels": labels}
    row["blocks"] = blocks_to_column(Blocks(np.array(lengths), response)).tolist()
    assert make_collator()([row])["labels"].tolist() == [labels]
    assert all_jumps(row) == {2, 4, 6, 8}
    assert all_jumps(row, "skip_inner") == {2, 4, 8}
    assert all_jumps(row, "skip_outer") == {6}
    assert all_jumps({**row, "blocks": None}, "skip_all") == {4, 6, 8}


def test_block_lengths_say_the_blocks():
    labels = [-100, -100, -100, -100, 5, 6, -100, -100, 7, 8]
    row = {"input_ids": list(range(10)), "labels": labels, "block_lengths": [3, 3, 2, 2]}
    assert all_jumps(row) == {3, 6, 8}
    assert all_jumps(row, "skip_outer") == {6}
    # Plain language modelling: the paper's alternation, in each document of a packed row.
    row = {"input_ids": list(range(12)), "block_lengths": [1, 2, 3, 1, 2, 3], "seq_lengths": [6, 6]}
    assert all_jumps(row, "skip_inner", padding_free=True) == {1, 7}
    assert all_jumps(row, "skip_outer", padding_free=True) == {3, 9}


def test_a_row_without_block_lengths_among_others_takes_its_labels():
    first = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "block_lengths": None}
    second = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "block_lengths": [1, 3]}
    collator = make_collator(strategy="skip_all")
    batch = collator([first, second])
    assert batch["position_ids"][0].diff()[[0, 2]].tolist() == [1, 1]
    assert batch["position_ids"][1].diff()[[1, 2]].tolist() == [1, 1]


@pytest.mark.parametrize("blocks", [{"block_lengths": [1, 1, 2]}, {"blocks": [0, 1, 2, 2]}], ids=["lengths", "column"])
def test_masked_tokens_of_a_row_are_taken_out(blocks):
    clean = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], **blocks}
    if "blocks" in blocks:
        blocks = {"blocks": [2, 0, 1, 2, 2, 0]}
    padded = {
        **clean,
        **blocks,
        "input_ids": [0, 1, 2, 3, 4, 0],
        "labels": [-100, -100, -100, 3, 4, -100],
        "attention_mask": [0, 1, 1, 1, 1, 0],
    }
    ours, expected = make_collator()([padded]), make_collator()([clean])
    assert {key: value.tolist() for key, value in ours.items()} == {
        key: value.tolist() for key, value in expected.items()
    }


def test_share_of_skipped_samples():
    rows = make_rows(2000, longest=16)
    for probability in (0.0, 0.3, 1.0):
        positions = make_collator(skip_probability=probability, target_length=10**6)(rows)["position_ids"]
        share = float(((positions.diff() > 1).any(1)).float().mean())
        assert abs(share - probability) < 0.04
    # The positions of a skipped sample do not depend on the share.
    few = make_collator(skip_probability=0.3, target_length=10**6)(rows)["position_ids"]
    skipped = (few.diff() > 1).any(1)
    assert torch.equal(few[skipped], positions[skipped])


def test_padding_never_has_the_largest_position():
    for seed in range(20):
        batch = make_collator(pad_to_multiple_of=64)(make_rows(3, seed))
        assert batch["position_ids"][batch["attention_mask"] == 0].eq(0).all()


def test_a_callable_strategy():
    def last_apart(block_lengths, target_length, rng):
        return [*range(sum(block_lengths) - 1), target_length - 1]

    batch = make_collator(strategy=last_apart)([{"input_ids": [1, 2, 3, 4]}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 63]]


def by_content(batches):
    """Positions of each sample, by its tokens."""
    found = {}
    for batch in batches:
        for ids, positions, mask in zip(
            *(batch[k] for k in ("input_ids", "position_ids", "attention_mask")), strict=True
        ):
            found[tuple(ids[mask == 1].tolist())] = positions[mask == 1].tolist()
    return found


def epochs_of(rows, workers, collator, epochs=2, **arguments):
    """Positions of each sample in each epoch, read through a dataloader that shuffles."""
    loader = DataLoader(
        rows,
        batch_size=4,
        shuffle=True,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=workers > 0,
        **arguments,
    )
    found = []
    for epoch in range(epochs):
        collator.set_epoch(epoch)
        found.append(by_content(loader))
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_positions_do_not_depend_on_workers_or_order_and_change_with_the_epoch():
    rows = make_rows(40, longest=20)
    alone = epochs_of(rows, 0, make_collator())
    workers = epochs_of(rows, 4, make_collator())
    assert len(alone[0]) == 40
    assert workers == alone
    changed = sum(alone[0][content] != alone[1][content] for content in alone[0])
    assert changed > 30
    for content, positions in alone[0].items():
        row = next(row for row in rows if tuple(row["input_ids"]) == content)
        assert naive_positions(**as_arguments(row), collator=make_collator()) == positions


def test_an_epoch_reaches_persistent_workers_that_were_spawned():
    rows = make_rows(8)
    spawned = epochs_of(rows, 1, make_collator(), multiprocessing_context=multiprocessing.get_context("spawn"))
    assert spawned == epochs_of(rows, 0, make_collator())


def test_positions_do_not_depend_on_packing():
    rows = make_rows(6)
    padded = by_content([make_collator()(rows)])
    packed = make_collator(padding_free=True)([pack(rows[3:]), pack(rows[:3])])
    ends = packed["cu_seq_lens_q"].tolist()
    for start, end in pairwise(ends):
        content = tuple(packed["input_ids"][0, start:end].tolist())
        assert packed["position_ids"][0, start:end].tolist() == padded[content]


def test_seed_changes_positions():
    rows = make_rows(10, longest=20)
    assert by_content([make_collator(seed=0)(rows)]) != by_content([make_collator(seed=1)(rows)])


def test_pickled_and_replaced_collators_work():
    rows = make_rows(3)
    collator = make_collator()
    collator.set_epoch(3)
    copy = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copy(rows)["position_ids"], collator(rows)["position_ids"])
    ordinary = dataclasses.replace(collator, strategy="none", padding_free=True)(rows)
    assert torch.equal(
        ordinary["position_ids"][0, : len(rows[0]["input_ids"])], torch.arange(len(rows[0]["input_ids"]))
    )


def test_takes_the_pad_token_by_the_names_of_trl_and_transformers():
    tokenizer = tiny_tokenizer()
    made = [
        SkipPositionDataCollator(tokenizer, 64),
        SkipPositionDataCollator(tokenizer=tokenizer, target_length=64, return_tensors="pt"),
        SkipPositionDataCollator(pad_token_id=tokenizer.pad_token_id, target_length=64, pad_to_multiple_of=None),
        SkipPositionDataCollator(tokenizer.pad_token_id, 64),
        dataclasses.replace(SkipPositionDataCollator(tokenizer, 64), strategy="none"),
    ]
    assert {collator.pad_token_id for collator in made} == {tokenizer.pad_token_id}
    # A plain `Trainer` saves `data_collator.tokenizer` with its checkpoints where there is one.
    assert [collator.tokenizer for collator in made] == [tokenizer, tokenizer, None, None, tokenizer]
    assert SkipPositionDataCollator(tokenizer, 64, pad_token_id=7).pad_token_id == 7
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"`tokenizer` must have a pad token.*tokenizer.pad_token = tokenizer.eos_t"):
        SkipPositionDataCollator(tokenizer, 64)
    tokenizer.pad_token = tokenizer.eos_token
    assert SkipPositionDataCollator(tokenizer, 64).pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "skip"}, "`strategy` must be one of .* got 'skip'"),
        ({"target_length": 0}, "`target_length` must be at least .* got 0"),
        ({"target_length": 2.5}, "`target_length` must be a whole number, got 2.5"),
        ({"target_length": None}, "`target_length` must be a whole number, got None"),
        ({"skip_probability": 1.1}, r"`skip_probability` must be a number from 0 to 1, got 1.1"),
        ({"skip_probability": -0.1}, r"`skip_probability` must be a number from 0 to 1, got -0.1"),
        ({"skip_probability": float("nan")}, r"`skip_probability` must be a number from 0 to 1, got nan"),
        ({"skip_probability": "0.5"}, r"`skip_probability` must be a number from 0 to 1, got '0.5'"),
        ({"return_tensors": "np"}, "`return_tensors` must be 'pt', got 'np'"),
        ({"pad_to_multiple_of": 0}, r"`pad_to_multiple_of` must be at least 1, got 0"),
        ({"tokenizer": None}, "`tokenizer` must have a pad token, got NoneType without one. .* `pad_token_id`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SkipPositionDataCollator(**{"tokenizer": 0, "target_length": 8, **arguments})


GOOD = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
NAN = float("nan")


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"`input_ids` must be in every row, got a row of \['text'\]"),
        ({"input_ids": []}, "`input_ids` must hold tokens, got none in row 1"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "`input_ids` must hold tokens, got none in row 1"),
        ({"input_ids": list(range(65))}, "`target_length` must be at least .* 65 tokens, got 64"),
        ({"input_ids": [1.0, 2.0]}, "`input_ids` must be a flat list of whole numbers, got 1.0 in row 1"),
        ({"input_ids": [1, NAN]}, "`input_ids` must be a flat list of whole numbers, got nan in row 1"),
        ({"input_ids": [1, None]}, "`input_ids` must be a flat list of whole numbers, got None in row 1"),
        ({"input_ids": [[1, 2]]}, r"`input_ids` must be a flat list of whole numbers, got \[1, 2\] in row 1"),
        ({"input_ids": [1, 2**70]}, "`input_ids` must be a flat list of whole numbers"),
        (
            {"input_ids": torch.tensor([1.0, NAN])},
            r"`input_ids` must be a flat list of whole numbers, got array\(\[ 1., nan\]",
        ),
        (
            {"input_ids": torch.tensor([[1, 2]])},
            r"`input_ids` must be a flat list of whole numbers, got array\(\[\[1, 2\]\]",
        ),
        ({"input_ids": [1, 2], "labels": [1, NAN]}, "`labels` must be a flat list of whole numbers, got nan in row 1"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` must be as many as `input_ids`, 2 in row 1 .* got 1"),
        ({"input_ids": [1, 2], "labels": [-200, 1]}, "`labels` must be token ids or -100, got -200 in row 1"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "`attention_mask` must be as many as `input_ids`, 2 in row 1"),
        ({"input_ids": [1, 2], "blocks": [0, 1, 1]}, "`blocks` must be as many as `input_ids`, 2 in row 1 .* got 3"),
        ({"input_ids": [1, 2], "blocks": [0, 7]}, "`blocks` must be numbers from 0 to 3, got 0 to 7"),
        ({"input_ids": [1, 2], "blocks": ["a", "b"]}, "`blocks` must be a flat list of whole numbers, got 'a'"),
        (
            {"input_ids": [1, 2], "block_lengths": []},
            r"`block_lengths` must be a list of at least one length, got \[\]",
        ),
        (
            {"input_ids": [1, 2], "block_lengths": [1]},
            r"`block_lengths` must add up to the 2 tokens .* got \[1\] \(1\)",
        ),
        ({"input_ids": [1, 2], "block_lengths": [2, 0]}, r"`block_lengths` must be whole numbers .* got \[2, 0\]"),
        (
            {"input_ids": [1, 2], "block_lengths": [1.0, 1.0]},
            r"`block_lengths` must be whole numbers .* got \[1.0, 1.0\]",
        ),
        ({"input_ids": [1, 2], "seq_lengths": [1]}, r"`seq_lengths` must add up to the 2 tokens .* got \[1\] \(1\)"),
        ({"input_ids": [1, 2], "seq_lengths": [2, 0]}, r"`seq_lengths` must be whole numbers .* got \[2, 0\]"),
    ],
)
def test_bad_rows_are_named(row, message, padding_free):
    with pytest.raises(ValueError, match=message):
        make_collator(padding_free=padding_free)([GOOD, row])


def test_packed_rows_need_padding_free():
    with pytest.raises(ValueError, match=r"`seq_lengths` must hold one document per row.*Set `padding_free=True`"):
        make_collator()([{"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 2]}])
    assert make_collator()([{"input_ids": [1, 2], "seq_lengths": [2]}])["input_ids"].tolist() == [[1, 2]]


def test_blocks_must_end_with_documents():
    row = {"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 2], "block_lengths": [3, 1]}
    with pytest.raises(
        ValueError, match=r"`block_lengths` must end a block with every document, got \[3, 1\].*\[2, 2\]"
    ):
        make_collator(padding_free=True)([row])


NOTHING = [
    {"input_ids": [4]},
    {"input_ids": [4, 5], "labels": [-100, -100]},
    {"input_ids": [4, 5], "labels": [4, -100]},
]


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
def test_rows_that_train_nothing_are_counted_and_logged_once(padding_free, caplog):
    collator = make_collator(padding_free=padding_free)
    with caplog.at_level(logging.WARNING):
        for rows in ([GOOD], [GOOD, NOTHING[0]], NOTHING, [GOOD, *NOTHING]):
            batch = collator(rows)
            targets = (batch["labels"] != -100).sum() - (batch["labels"][:, 0] != -100).sum()
            assert targets == 2 * (GOOD in rows)
    assert collator.idle_rows == 7
    assert len(caplog.records) == 1
    assert "Row 1 of a batch, with 1 tokens, has no target after its first token" in caplog.text
    collator = make_collator(padding_free=padding_free)
    list(DataLoader(NOTHING, batch_size=1, collate_fn=collator, num_workers=1))
    assert collator.idle_rows == 3


def test_a_document_of_a_packed_row_may_train_nothing():
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5], "seq_lengths": [1, 1, 3]}
    batch = make_collator(strategy="skip_all", padding_free=True)([row])
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2]]


def test_ordinary_positions_need_no_target_length():
    for target_length in (2, None):
        collator = make_collator(strategy="none", target_length=target_length, padding_free=True)
        assert collator([{"input_ids": [1, 2, 3, 4]}])["position_ids"].tolist() == [[0, 1, 2, 3]]


def test_warns_once_where_nothing_can_be_skipped(caplog):
    plain = [{"input_ids": [1, 2, 3, index]} for index in range(90)]
    with caplog.at_level(logging.WARNING):
        collator = make_collator(strategy="skip_all")
        collator(plain[: PATIENCE - 1])
        assert not caplog.records
        collator(plain[PATIENCE:])
        collator(plain)
    assert len(caplog.records) == 1
    assert "'skip_all' found no place" in caplog.text and 'strategy="pose"' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_collator(strategy="skip_all")([*make_rows(1), *plain])
        make_collator(strategy="skip_context")(plain)
        make_collator(strategy="pose")(plain)
        make_collator(strategy="none")(plain)
    assert not caplog.records


class Positions(torch.nn.Module):
    """Keeps what a model is given."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, module, args, kwargs):
        self.seen.append({key: kwargs[key].clone() for key in ("input_ids", "position_ids", "attention_mask")})


def watched_model():
    model, seen = tiny_llama(), []
    model.model.register_forward_pre_hook(Positions(seen).forward, with_kwargs=True)
    return model, seen


@pytest.mark.parametrize("workers", [0, 2])
def test_inside_a_plain_trainer(tmp_path, workers):
    rows = make_rows(8, longest=20)
    model, seen = watched_model()
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        dataloader_num_workers=workers,
    )
    Trainer(model, args, train_dataset=Dataset.from_list(rows), data_collator=make_collator()).train()
    assert by_content(seen) == by_content([make_collator()(rows)])


def test_inside_trls_trainer(tmp_path):
    model, seen = watched_model()
    tokenizer = tiny_tokenizer()
    messages = chats(4)
    args = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        assistant_only_loss=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{"messages": row} for row in messages]),
        processing_class=tokenizer,
        data_collator=SkipPositionDataCollator(tokenizer, target_length=1024, skip_probability=1.0),
    )
    trainer.train()
    positions = by_content(seen)
    assert len(positions) == 4
    # Two turns: one skip, behind the end of the first response.
    for ids, row in positions.items():
        (place,) = (np.flatnonzero(np.diff(row) > 1) + 1).tolist()
        text = tokenizer.decode(ids[:place])
        assert text.endswith("<|end|>") and text.count("<|end|>") == 2


def test_few_shapes_pad_the_boundaries_and_nothing_else():
    rows = [{"input_ids": list(range(3, 3 + length)), "labels": list(range(3, 3 + length))} for length in (4, 9, 5)]
    plain = SkipPositionDataCollator(0, 64, padding_free=True, skip_probability=1.0, pad_to_multiple_of=32)
    few = dataclasses.replace(plain, few_shapes=True)
    expected, batch = plain(rows), few(rows)
    assert expected["cu_seq_lens_q"].tolist() == [0, 4, 13, 18, 32]
    # Sixteen documents at least, twelve of them empty; the longest counts as the whole row.
    assert (
        batch["cu_seq_lens_q"].tolist() == [0, 4, 13, 18, *[32] * 13] and batch["cu_seq_lens_q"].dtype == torch.int32
    )
    assert batch["max_length_q"] == batch["max_length_k"] == 32
    for key in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert torch.equal(batch[key], expected[key])
    assert len(few(rows * 6)["cu_seq_lens_q"]) == 33
