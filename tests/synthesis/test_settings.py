"""What a data set is made with: refused by name before anything is asked, and told apart in the cache."""

import copy
import json
import os
from pathlib import Path

import pytest

from hf_longalign.rows import BadRowError

from .fakes import GIVEN, PAIRS, FakeGenerator, build, made, make_pairs


BAD = {
    "seeds": ({"seeds": None}, r"`seeds` must be given, got None"),
    "few": (
        {"n_distractors": 24},
        r"`n_distractors` must be at most 23, got 24: task 'narrativeqa' has 24 seeds, and",
    ),
    "source": ({"distractor_sources": ["web"]}, r"`distractor_sources` must be one of same_task, .*, got 'web'"),
    "check": ({"checks": ["spelling"]}, r"`checks` must be one of complete, .*, got 'spelling'"),
    "choice": ({"reference": "some"}, r"`reference` must be one of auto, all, none, got 'some'"),
    "range": ({"test_share": 1.5}, r"`test_share` must be between 0 and 0\.99, got 1\.5"),
    "tokenizer": ({"target_tokens": 4096}, r"`tokenizer` must be given with `target_tokens`, got None"),
    "task": ({"seeds": [{**PAIRS[0], "task": "squad"}]}, r"seeds, row 1, column `task`: unknown task"),
    "field": ({"distractors": 3}, "doesn't have a 'distractors' key|unexpected keyword"),
    "documents": ({"method": "instruction", "seeds": None}, r"`documents` must be given with method \"instruction\""),
    "bad seeds": ({"on_bad_seed": "ignore"}, r"`on_bad_seed` must be one of raise, skip, got 'ignore'"),
    "chosen": ({"difficulty_use": "top"}, r"`difficulty_use` must be one of record, .*, got 'top'"),
    "share": (
        {"difficulty": "closed_book", "difficulty_use": "select", "difficulty_share": 0},
        r"`difficulty_share` must be above 0 and at most 1, got 0",
    ),
    "ngram": ({"decontaminate_ngram": 0}, r"`decontaminate_ngram` must be between 1 and 1000, got 0"),
    "all general": (
        {"general_share": 1, "general_data": ["a.jsonl"]},
        r"`general_share` must be between 0 and 0\.99, got 1",
    ),
    "general": ({"general_share": 0.5}, r"`general_share` and `general_data` must be given together"),
    "extra": ({"extra_body": "{min_p: 1}"}, r"`extra_body` must be a JSON object, got '\{min_p: 1\}'"),
    "use": ({"difficulty_use": "select"}, r"`difficulty` must be given with difficulty_use 'select'"),
}


@pytest.mark.parametrize(
    "options, name",
    [
        ({"checks": ["support", "judge"]}, "the check 'judge'"),
        ({"answerability": True}, "`answerability`"),
        ({"difficulty": "closed_book"}, "difficulty 'closed_book'"),
    ],
)
def test_what_asks_needs_somebody_to_ask(tmp_path, options, name):
    with pytest.raises(ValueError, match=f"`generator` or `judge` must be a model for {name}, got none"):
        build(tmp_path, seeds=GIVEN, **options)


def test_more_fields_of_a_request_and_another_sampling(tmp_path):
    generator = FakeGenerator()
    build(tmp_path, generator=generator, extra_body='{"min_p": 0.1}', temperature=0.5, sampling_seed=9)
    sampling = generator.asked[0].sampling
    assert (dict(sampling.extra), sampling.temperature, sampling.seed) == ({"min_p": 0.1}, 0.5, 9)
    # Text that is longer than the name of a file can be, or that looks like a pattern of names.
    texts = ['{"user": "%s"}' % ("x" * 300), '{"stop": ["A"]}', '{"stop": ["B"]}']
    configs = [made(tmp_path, generator=generator, extra_body=text).config for text in texts]
    assert len({config.fingerprint() for config in configs}) == 3


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_settings_are_refused_before_anything_is_asked(tmp_path, options, message):
    generator = FakeGenerator()
    with pytest.raises((ValueError, TypeError), match=message):
        build(tmp_path, generator=generator, **options)
    assert generator.asked == []


def test_a_budget_below_one_sample_and_a_tokenizer_without_template(tmp_path, tokenizer):
    generator = FakeGenerator()
    with pytest.raises(ValueError, match=r"`target_tokens` must be at least \d+, the tokens of the shortest sample"):
        build(tmp_path, generator=generator, tokenizer=tokenizer, target_tokens=100)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match="`tokenizer` must have a chat template, got one without"):
        build(tmp_path, generator=generator, tokenizer=plain, target_tokens=4096)
    assert generator.asked == []


def test_rejected_seeds_that_leave_too_few_distractors_are_reported(tmp_path, caplog):
    generator = FakeGenerator(fail=range(1, 24))
    # Those that succeed come first: a run that begins with 20 refusals is stopped.
    build(tmp_path, generator=generator, seeds=make_pairs(48, "qmsum")[24:] + PAIRS, n_distractors=20)
    assert "Task 'narrativeqa' has 0 contexts to distract with, 20 were wanted." in caplog.text


def test_documents_need_a_context_for_every_seed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(pair) for pair in [*GIVEN[:8], PAIRS[8]]))
    with pytest.raises(BadRowError, match=r"pairs\.jsonl, line 9, column `context`: missing"):
        build(tmp_path / "a", seeds=str(path))


def test_neither_paths_nor_keys_stand_in_cache_paths_or_rows(tmp_path):
    secret = tmp_path / "secret-folder"
    secret.mkdir()
    path = secret / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, GIVEN)))
    builder = build(tmp_path / "cache", seeds=[f"narrativeqa={path}"], checks=["support"])
    files = [Path(folder) / name for folder, _, names in os.walk(tmp_path / "cache") for name in names]
    assert not [file for file in files if "secret" in str(file) and ".lock" not in file.name]
    assert not [file for file in files if b"secret-folder" in file.read_bytes()]
    moved = tmp_path / "elsewhere" / "pairs.jsonl"
    moved.parent.mkdir()
    path.rename(moved)
    os.utime(moved, ns=(1, 1))
    again = made(tmp_path / "cache", seeds=[f"narrativeqa={moved}"], checks=["support"])
    assert again.cache_dir == builder.cache_dir


def test_changed_seeds_settings_and_models_get_another_folder(tmp_path):
    folders = {
        build(tmp_path, **options).cache_dir
        for options in (
            {"seeds": GIVEN, "checks": ["support"]},
            {"seeds": GIVEN[1:], "checks": ["support"]},
            {"seeds": GIVEN, "checks": ["support"], "seed": 1},
            {"seeds": GIVEN, "generator": FakeGenerator("a")},
            {"seeds": GIVEN, "generator": FakeGenerator("b")},
        )
    }
    assert len(folders) == 5
