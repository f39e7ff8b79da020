import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longalign.text import clean, content_words, holds, normalise, sentence_ends, token_f1, word_count


def test_normalise():
    assert normalise("  The CAFÉ's 1,000 (one-thousand) guests ") == "cafe s 1000 one thousand guests"
    assert normalise("An A to the 12") == "to 12"
    # What is spelled in two ways in Unicode is one word: composed and decomposed, full and half width.
    assert normalise("cafe\u0301") == normalise("café") == "cafe"
    assert normalise("２０１２年") == "2012 年"


@pytest.mark.parametrize(
    "text, phrase, other",
    [
        ("他于1912年住在北京。", "北京。", "南京"),
        ("ダムは1912年に完成した。", "１９１２年", "タム"),
        ("서울은 한국의 수도이다.", "서울", "부산"),
        ("กรุงเทพเป็นเมืองหลวง", "เมืองหลวง", "เชียงใหม่"),
        ("दिल्ली भारत की राजधानी है।", "दिल्ली", "दल"),
        ("The dam of Ashby.", "Dam, of Ashby", "da"),
    ],
)
def test_a_phrase_is_found_inside_a_sentence_of_any_script(text, phrase, other):
    assert holds(normalise(text), normalise(phrase)) and not holds(normalise(text), normalise(other))


def test_marks_that_make_another_letter_stay():
    assert normalise("か") != normalise("が") and normalise("ด้าน") != normalise("ดาน")


def test_content_words():
    assert content_words("What is a summary of the 3 reports?") == {"summary", "3", "reports"}
    assert content_words("大学的历史") == {"大学", "历史"}


def test_word_count():
    assert word_count("") == 0 and word_count("dam 水坝") == 2 and word_count("서울은 수도") == 2


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("It was 5 p.m. and late. Who came? He.", ["It was 5 p.m. and late.", " Who came?", " He."]),
        ('J. R. Hart said "Go." Then', ['J. R. Hart said "Go."']),
        ("他来了。他说：「好！」然后", ["他来了。", "他说：「好！」"]),
        ("Line one.\nLine two", ["Line one."]),
        ("دمشق مدينة. أين؟ هنا", ["دمشق مدينة.", " أين؟"]),
        ("no end", []),
    ],
)
def test_sentence_ends(text, sentences):
    ends = sentence_ends(text)
    assert [text[start:end] for start, end in zip([0, *ends], ends, strict=False)] == sentences


@given(st.text(max_size=20), st.sampled_from(["\0", "\ud83d", "\ude00", "\ude00\ud83d", ""]))
def test_clean_text_can_be_stored_and_good_text_stays(text, bad):
    cleaned = clean(text + bad + text)
    assert "\0" not in cleaned and cleaned.encode().decode() == cleaned == clean(cleaned)
    if not bad:
        assert cleaned == (text + text).replace("\0", "")


def test_two_halves_become_their_character_and_one_the_replacement():
    assert clean("a\ud83d\ude00b\ud83d") == "a😀b\ufffd"


def test_f1_counts_repeated_tokens():
    assert token_f1(["a", "a", "b"], ["a", "b", "b"]) == 2 / 3 and token_f1([], ["a"]) == 0.0
