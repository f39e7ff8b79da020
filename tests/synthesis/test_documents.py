import asyncio
import json

import pytest

from hf_longalign.endpoint.protocol import Reply, Sampling
from hf_longalign.rows import BadRowError
from hf_longalign.synthesis.checks import Rules
from hf_longalign.synthesis.files import draw_general
from hf_longalign.synthesis.seeds import Document, draw_chunks, read_documents
from hf_longalign.synthesis.writer import Plan, write_pair


TEXT = "\n".join(f"Line {number} tells of dam {number}." for number in range(400))
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_documents_of_every_kind(tmp_path):
    (tmp_path / "b.txt").write_text("Second essay.")
    (tmp_path / "a.txt").write_text("First essay.\n")
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"text": "Third.", "title": "T"}) + "\n" + json.dumps({"context": "4"})
    )
    found = read_documents([str(tmp_path / "*.txt"), str(tmp_path / "c.jsonl"), str(tmp_path / "a.txt")])
    assert [(document.text, document.origin, document.title) for document in found] == [
        ("First essay.", "a.txt", None),
        ("Second essay.", "b.txt", None),
        ("Third.", "c.jsonl:1", "T"),
        ("4", "c.jsonl:2", None),
    ]


def test_bad_documents_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`documents` must name files, got .*nothing\*"):
        read_documents([str(tmp_path / "nothing*.txt")])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"`documents` must hold text, got an empty file, .*empty\.txt"):
        read_documents([str(tmp_path / "empty.txt")])
    (tmp_path / "latin.txt").write_bytes(b"Caf\xe9")
    with pytest.raises(ValueError, match=r"`documents` must be UTF-8, .*latin\.txt', which is not at byte 4"):
        read_documents([str(tmp_path / "latin.txt")])
    for bad in ('{"body": "y"}', '{"text": " "}', '{"text": 7}'):
        (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n' + bad)
        with pytest.raises(BadRowError, match=r"rows\.jsonl, line 2: no text"):
            read_documents([str(tmp_path / "rows.jsonl")])


def test_chunks_are_contiguous_of_the_length_asked_for_and_random():
    document = Document(TEXT, "a.txt")
    chunks = draw_chunks([document], 300, per_document=20, seed=1)
    assert all(chunk.context in TEXT and len(chunk.context.split()) == 300 for chunk in chunks)
    starts = sorted(TEXT.index(chunk.context) / len(TEXT) for chunk in chunks)
    assert len(chunks) > 15 and starts[0] < 0.25 and starts[-1] > 0.6
    assert draw_chunks([document], 300, 20, seed=1) == chunks != draw_chunks([document], 300, 20, seed=2)
    assert [chunk.context for chunk in draw_chunks([document], 10**6, 3, seed=1)] == [TEXT]


def test_a_pair_is_written_and_checked():
    (chunk,) = draw_chunks([Document(TEXT, "a.txt")], 10**6, 1, seed=0)
    replies = iter(["No idea.", "Question: What does line 7 tell of?\nAnswer: a castle",
                    "Question: What does line 7 tell of?\nAnswer: dam 7"])  # fmt: skip
    asked = []

    async def ask(request):
        asked.append(request)
        return Reply(next(replies), "stop", 1, 1, "m")

    plan = Plan("openai", "m", Sampling(), Rules(("support", "leak")), retries=2)
    outcome = asyncio.run(write_pair(chunk, plan, ask, lambda *_: None))
    assert outcome.accepted and outcome.seed.answer == "dam 7" and outcome.context == TEXT
    assert outcome.seed.instruction == "What does line 7 tell of?" and outcome.seed.seed_id == chunk.seed_id
    assert "rejected: support: it does not hold" in asked[2].messages[1][1] and asked[2].purpose == "pair"


def test_general_rows_make_up_the_share():
    source = [{"messages": [*CHAT[:1], {"role": "assistant", "content": str(n)}]} for n in range(100)]
    rows = draw_general([source], 0.25, long_rows=90, seed=3)
    assert len(rows) == 30 and len(rows) / (len(rows) + 90) == 0.25
    assert len({row["seed_id"] for row in rows}) == 30
    assert draw_general([source], 0.25, 90, seed=3) == rows != draw_general([source], 0.25, 90, seed=4)
    assert draw_general([source], 0.0, 90, seed=3) == []
    assert len(draw_general([source], 0.9, 90, seed=3)) == 100


@pytest.mark.parametrize(
    "messages, reason",
    [
        (None, "no conversation"),
        ([], "no conversation"),
        (["Hi"], "not a message: Hi"),
        ([{"role": "human", "content": "Hi"}], "not a message: {'role': 'human'"),
        (CHAT[:1], "does not end with the assistant"),
    ],
)
def test_a_bad_general_row_is_named(messages, reason):
    with pytest.raises(BadRowError, match=f"seeds, row 1, column `messages`: {reason}"):
        draw_general([[{"messages": messages}]], 0.5, 1, seed=0)
