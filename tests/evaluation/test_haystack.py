from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longalign.evaluation.haystack import load_texts, noise, sentences_of, split_sentences, split_units


def stripped(text: str) -> list[str]:
    return [sentence.strip() for sentence in split_sentences(text)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Fox met Dr. J. R. Hare, Sr. at 5 p.m. today.", ["Mr. Fox met Dr. J. R. Hare, Sr. at 5 p.m. today."]),
        ('He said "Go." She went.', ['He said "Go."', "She went."]),
        ("It was 3.50... or more. See www.a.org.", ["It was 3.50... or more.", "See www.a.org."]),
        ("1. Wash. 2. Dry.", ["1. Wash.", "2. Dry."]),
        ("Él vino. ¿Quién? Ángel. Über allem.", ["Él vino.", "¿Quién?", "Ángel.", "Über allem."]),
        ("他来了。“真的吗？”她问。然后走了", ["他来了。", "“真的吗？”", "她问。", "然后走了"]),
        ("Hard\nwrapped   lines. Go on.\r\n", ["Hard wrapped lines.", "Go on."]),
        (" \n\t ", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert stripped(text) == expected


def test_paragraphs_stay_and_line_breaks_go():
    assert "".join(split_sentences("A b.\nC d.\n\n \nE f. G h.")) == "\n\nA b. C d.\n\nE f. G h."


def test_texts_come_from_files_or_a_column(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("One.", encoding="utf-8")
    assert list(load_texts(str(tmp_path))) == ["One."]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: iter([{"text": "Two.", "id": 1}]))
    assert list(load_texts("org/data")) == ["Two."]
    asked = {}
    rows = iter([{"context": "Three.", "id": 1}])
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: asked.update(options, args=args) or rows)
    assert list(load_texts("org/data:chat@test")) == ["Three."]
    assert asked == {"args": ("org/data", "chat"), "split": "test", "streaming": True}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: iter([{"body": "Four."}]))
    with pytest.raises(ValueError, match=r"org/data, row 1: no text\. Give `haystack` a column text or context"):
        list(load_texts("org/data"))
    for gone in ("gone.txt", "../gone", str(tmp_path / "gone")):
        with pytest.raises(ValueError, match=r"`perplexity_documents` must be a file, .* which is not there"):
            list(load_texts(gone, option="perplexity_documents"))

    def unreachable(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"`haystack` must be .* got 'org/gone', .* \(OSError: offline\)"):
        list(load_texts("org/gone"))


def test_a_text_without_full_stops_is_cut_at_blanks():
    sentences = split_sentences("word " * 1000)
    assert max(map(len, sentences)) <= 602 and len(sentences) > 5
    assert "".join(sentences).split() == ["word"] * 1000
    assert max(map(len, split_sentences("字" * 5000))) <= 602


@given(
    st.text(
        alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(' \n.!?"。aB9')), max_size=900
    )
)
def test_nothing_is_lost(text):
    sentences = split_sentences(text)
    assert "".join(sentences).split() == text.split()
    for sentence in sentences:
        assert sentence.strip()
        assert "".join(split_units(sentence)) == sentence


def test_files_are_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("Second.", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffErste, schöne.", encoding="utf-8")
    (tmp_path / "c.md").write_text("Not this.")
    assert list(load_texts(str(tmp_path))) == ["Erste, schöne.", "Second."]
    assert list(load_texts(str(tmp_path / "c.md"))) == ["Not this."]
    (tmp_path / "d.jsonl").write_text('{"text": ""}\n{"context": " One. "}')
    assert list(load_texts(str(tmp_path / "d.jsonl"))) == ["", " One. "]


def test_files_that_cannot_be_a_haystack_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`haystack` must be a file.*missing\.txt"):
        list(load_texts(str(tmp_path / "missing.txt")))
    with pytest.raises(ValueError, match=r"\.txt files, got none"):
        load_texts(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"`haystack` must be UTF-8.*latin\.txt', which is not at byte 4"):
        list(load_texts(str(tmp_path)))
    (tmp_path / "latin.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"`haystack` must hold text, got an empty file.*latin\.txt"):
        list(load_texts(str(tmp_path)))


def test_rows_of_a_data_set():
    rows = [{"text": "A b."}, {"text": ""}, {"text": "C d."}]
    assert sentences_of(row["text"] for row in rows) == ["\n\nA b.", "\n\nC d."]
    with pytest.raises(ValueError, match="NoneType at row 1"):
        sentences_of(["A b.", None])
    with pytest.raises(ValueError, match="at least one sentence"):
        sentences_of(["", "  "])


def test_an_endless_data_set_is_read_as_far_as_needed():
    assert len(sentences_of(repeat("x" * 500 + ". " + "y" * 497 + "."))) == 2 * 4000


def test_noise():
    texts = noise(paragraphs=400)
    assert texts == noise(paragraphs=400) != noise(paragraphs=400, seed=1)
    everything = " ".join(texts)
    assert not any(char.isdigit() for char in everything) and "magic" not in everything and "{" not in everything
    sentences = sentences_of(texts)
    assert len(set(sentences)) > 0.8 * len(sentences)
    assert all(sentence.strip()[0].isupper() and sentence.endswith(".") for sentence in sentences)
