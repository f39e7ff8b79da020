"""What a push does to a repository: branches, pull requests, tags, edits of the card, rights, two at once."""

import threading

import pytest
from huggingface_hub import HfApi
from loopback_hub import READER, TOKEN

from hf_longalign.cards.page import BEGIN, END, REPOSITORY
from hf_longalign.hub import publish_dataset
from hf_longalign.hub.push import PublishError
from hub.conftest import CARD, held


UPLOADS = {"preupload", "lfs", "put", "verify", "commit", "branch", "tag"}


def test_another_data_set_replaces_it_whole(hub, publish, write):
    first, second = write("a", [1, 2, 3], shards=3), write("b", [4, 5])
    assert publish(first) == f"{hub.url}/datasets/user/rows"
    assert hub.files("user/rows") == held(first)
    publish(second)
    assert hub.files("user/rows") == held(second)
    assert len(hub.repo("user/rows").commits) == 3  # its creation and one per push


def test_the_same_again_changes_and_uploads_nothing(hub, publish, write):
    folder = write("a", [1, 2])
    publish(folder, tag="v1")
    before, hub.seen[:] = list(hub.repo("user/rows").commits), []
    publish(folder, tag="v1")
    assert hub.repo("user/rows").commits == before
    assert not UPLOADS & set(hub.seen)


def test_owners_and_visibility(hub, publish, write):
    folder = write("a", [1])
    assert publish(folder, "team/rows", private=True).endswith("/datasets/team/rows")
    assert hub.repo("team/rows").private
    assert publish(folder, "mine").endswith("/datasets/user/mine")
    assert not hub.repo("user/mine").private
    publish(folder, "team/rows", private=True)
    with pytest.raises(ValueError, match=r"`private` must be what user/mine is, public, got True"):
        publish(write("b", [2]), "user/mine", private=True)
    assert hub.files("user/mine") == held(folder)


def test_a_branch_leaves_main_alone(hub, publish, write):
    first, second = write("a", [1]), write("b", [2])
    publish(first)
    assert publish(second, branch="v2/next").endswith("/datasets/user/rows/tree/v2%2Fnext")
    assert hub.files("user/rows") == held(first)
    assert hub.files("user/rows", revision="v2/next") == held(second)


def test_a_pull_request_of_a_user_without_rights(hub, publish, write):
    first, second = write("a", [1]), write("b", [2])
    publish(first)
    url = publish(second, create_pr=True, token=READER)
    assert url == f"{hub.url}/datasets/user/rows/discussions/1"
    assert hub.files("user/rows") == held(first)
    HfApi(endpoint=hub.url, token=TOKEN).merge_pull_request("user/rows", 1, repo_type="dataset")
    assert hub.files("user/rows") == held(second)


def test_a_tag_stands_for_one_version(hub, publish, write):
    first, second = write("a", [1]), write("b", [2])
    publish(first, tag="v1")
    assert hub.files("user/rows", revision="v1") == held(first)
    hub.seen.clear()
    with pytest.raises(ValueError, match=r"`tag` must be new, got 'v1'"):
        publish(second, tag="v1")
    assert not UPLOADS & set(hub.seen)
    publish(second, tag="v2")
    assert hub.files("user/rows", revision="v1") == held(first)
    assert hub.files("user/rows", revision="v2") == held(second)


def card_of(rows):
    front = "configs:\n- config_name: chat\n  data_files: chat/train-*.parquet\ntags:\n- hf_longalign\n"
    page = f'# Rows\n\n`load_dataset("{REPOSITORY}")`, {rows} rows'
    return f"---\n{front}---\n\n{BEGIN}\n\n{page}\n\n{END}\n"


def test_edits_of_the_card_survive(hub, publish, write):
    publish(write("a", [1, 2], card=card_of(2)))
    card = hub.files("user/rows")["README.md"].decode()
    assert 'load_dataset("user/rows")' in card
    edited = card.replace("---\n\n<", "license: cc-by-4.0\n---\n\nThanks to Ada.\n\n<").replace("# Rows", "# Our rows")
    repo = hub.repo("user/rows")
    repo.branches["main"] = repo.add({**repo.files(), "README.md": edited.encode()})
    publish(write("b", [1, 2, 3], card=card_of(3)))
    card = hub.files("user/rows")["README.md"].decode()
    assert "license: cc-by-4.0" in card and "Thanks to Ada." in card and "# Rows" in card and "3 rows" in card
    before = list(repo.commits)
    publish(write("c", [1, 2, 3], card=card_of(3)))
    assert repo.commits == before


def test_an_edit_between_reading_and_committing_survives(hub, publish, write, monkeypatch):
    publish(write("a", [1, 2], card=card_of(2)))
    repo, real = hub.repo("user/rows"), HfApi.create_commit

    def edited_first(api, *args, **kwargs):
        if len(repo.commits) == 2:
            card = repo.files()["README.md"] + b"\nMy notes.\n"
            repo.branches["main"] = repo.add({**repo.files(), "README.md": card})
        return real(api, *args, **kwargs)

    folder = write("b", [3], card=card_of(1))
    monkeypatch.setattr(HfApi, "create_commit", edited_first)
    publish(folder)
    card = hub.files("user/rows")["README.md"].decode()
    assert "My notes." in card and "1 rows" in card


def test_two_pushes_at_once_leave_one_whole(hub, publish, write):
    folders = [write(f"rows{number}", list(range(number)), shards=number) for number in range(1, 5)]
    threads = [threading.Thread(target=publish, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [held(folder) for folder in folders]
    for _, files in hub.repo("user/rows").commits[1:]:
        assert {name: data for name, data in files.items() if name != ".gitattributes"} in everything


def test_a_dry_run_writes_what_a_push_would(hub, publish, write, tmp_path):
    publish(write("a", [1, 2], card=card_of(2)))
    repo = hub.repo("user/rows")
    card = repo.files()["README.md"] + b"\nMy notes.\n"
    repo.branches["main"] = repo.add({**repo.files(), "README.md": card})
    folder, before = write("b", [3], card=card_of(1)), list(repo.commits)
    hub.seen.clear()
    assert publish(folder, dry_run=tmp_path / "look") == str(tmp_path / "look")
    assert repo.commits == before and not UPLOADS & set(hub.seen)
    publish(folder)
    assert held(tmp_path / "look") == hub.files("user/rows")
    with pytest.raises(ValueError, match="`dry_run` must be a folder that is absent or empty"):
        publish(folder, dry_run=tmp_path / "look")


def test_a_dry_run_needs_neither_hub_nor_token(publish, write, tmp_path, caplog):
    folder = write("a", [1], card=card_of(1).replace(REPOSITORY, "user/rows"))
    publish_dataset(folder, "user/rows", dry_run=tmp_path / "look", endpoint="http://127.0.0.1:9")
    assert held(tmp_path / "look") == held(folder)
    assert "edits of it are not in the dry run" in caplog.text


def test_a_dry_run_that_may_not_read_the_published_card_says_so(hub, publish, write, tmp_path, caplog):
    publish(write("a", [1], card=card_of(1)))
    hub.repo("user/rows").gated = True
    publish(write("b", [2], card=card_of(1)), token=READER, dry_run=tmp_path / "look")
    assert "edits of it are not in the dry run" in caplog.text


@pytest.mark.parametrize(
    ("token", "repo_id", "error", "message"),
    [
        (None, "user/rows", ValueError, r"`token` must have the right to write, got none"),
        ("hf_wrong", "user/rows", PublishError, r"The token is not valid. Log in with `hf auth login`"),
        (READER, "user/rows", PublishError, r"The token has no right to write there"),
        (TOKEN, "other/rows", PublishError, r"The token has no right to write there"),
        (TOKEN, "user/a b", ValueError, r"[Rr]epo id must"),
        (TOKEN, "a/b/c", ValueError, r"[Rr]epo id must"),
    ],
)
def test_what_is_not_allowed_is_said_before_anything_is_sent(hub, publish, write, token, repo_id, error, message):
    with pytest.raises(error, match=message):
        publish(write("a", [1]), repo_id, token=token)
    assert hub.repos == {} and not UPLOADS & set(hub.seen)
    assert len(hub.seen) <= 3  # nothing that cannot pass is asked again


def test_a_repository_that_may_not_be_written_is_left_alone(hub, publish, write):
    first = write("a", [1])
    publish(first)
    hub.repo("user/rows").gated = True
    hub.seen.clear()
    with pytest.raises(PublishError, match=r"403.*The token has no right to write there"):
        publish(write("b", [2]), token=READER)
    assert hub.files("user/rows") == held(first)
    assert not {"lfs", "put", "commit"} & set(hub.seen)


def test_another_data_set_under_the_name_is_not_deleted(hub, publish, write):
    publish(write("a", [1, 2], shards=2, card=CARD.replace("hf_longalign", "somebody")))
    hub.seen.clear()
    with pytest.raises(ValueError, match=r"whose chat/train-00000-of-00002.parquet is another's"):
        publish(write("b", [3]))
    assert not UPLOADS & set(hub.seen)


def test_files_of_the_owner_stay(hub, publish, write):
    publish(write("a", [1, 2], shards=2))
    repo, own = hub.repo("user/rows"), {"notes.txt": b"mine", "raw/all.parquet": b"PAR1"}
    repo.branches["main"] = repo.add({**repo.files(), **own})
    second = write("b", [3])
    publish(second)
    assert hub.files("user/rows") == {**held(second), **own}


def test_what_was_pushed_can_be_listed_and_deleted(hub, publish, write):
    publish(write("a", [1]))
    api = HfApi(endpoint=hub.url, token=TOKEN)
    files = api.list_repo_files("user/rows", repo_type="dataset")
    assert sorted(files) == [".gitattributes", "README.md", "chat/train-00000-of-00001.parquet"]
    api.delete_file("README.md", "user/rows", repo_type="dataset")
    assert "README.md" not in hub.files("user/rows")
    api.delete_repo("user/rows", repo_type="dataset")
    assert hub.repos == {}


def test_bad_calls_are_named(publish, write, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"README.md and Parquet files, got"):
        publish(tmp_path)
    folder = write("a", [1])
    with pytest.raises(ValueError, match=r"`create_pr` must be alone"):
        publish(folder, create_pr=True, branch="next")
    with pytest.raises(ValueError, match=r"at most 50 files .* got 61. Write fewer shards"):
        publish(write("many", [1], shards=60))
    (folder / "journal.sqlite").write_text("secret")
    with pytest.raises(ValueError, match=r"alone, got journal.sqlite"):
        publish(folder)
    (folder / "journal.sqlite").unlink()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=r"Only the main process must push, got process 1"):
        publish(folder)


def test_a_card_the_hub_refuses_is_said_before_anything_is_uploaded(hub, publish, write):
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        publish(write("a", [1], card="---\nlicense:\tmit\n---\n# hf_longalign\n"))
    assert not UPLOADS & set(hub.seen)


def test_offline_is_said_at_once(publish, write, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match=r"Unset `HF_HUB_OFFLINE`"):
        publish(write("a", [1]))
