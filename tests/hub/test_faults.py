"""Faults at every endpoint: in the end the repository is complete, or as it was and the error says how to go on."""

import pytest

from hf_longalign.hub.push import REMEDIES, PublishError
from hub.conftest import held


# What a push with branch and tag asks of the Hub; the published card is read where there is one.
FIRST = ("create", "info", "branch", "refs", "tree", "yaml", "preupload", "lfs", "put", "verify", "commit", "tag")
OVERWRITE = (*FIRST[1:], "resolve")
KINDS = ("500", "429", "reset", "lost", "timeout")
CASES = [(endpoint, "first") for endpoint in FIRST] + [(endpoint, "overwrite") for endpoint in OVERWRITE]


@pytest.fixture
def pushed(hub, publish, write):
    """A function that pushes to branch and tag, after an earlier push where one is overwritten; and what it pushes."""

    def prepare(push):
        if push == "overwrite":
            publish(write("before", [1, 2, 3, 4], shards=2), branch="next", tag="v1")
        hub.seen.clear()
        after = write("after", [5, 6])
        return after, lambda: publish(after, branch="next", tag="v2", resume_command="push again")

    return prepare


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("endpoint", "push"), CASES)
def test_one_fault_leaves_it_complete(hub, pushed, monkeypatch, endpoint, push, kind):
    if kind == "timeout":
        monkeypatch.setattr("hf_longalign.hub.push.TIMEOUT", 0.25)
    folder, run = pushed(push)
    main = hub.repo("user/rows").files() if push == "overwrite" else None
    hub.faults = {endpoint: [kind]}
    assert run() == f"{hub.url}/datasets/user/rows/tree/next"
    assert hub.faults == {endpoint: []}
    repo = hub.repo("user/rows")
    assert hub.files("user/rows", revision="next") == held(folder)
    assert repo.tags["v2"] == repo.branches["next"]
    assert main is None or repo.files() == main
    assert len(repo.commits) == (2 if push == "first" else 3)  # its creation and one for each push, none twice


@pytest.mark.parametrize("kind", ["500", "reset", "403", "404"])
@pytest.mark.parametrize(("endpoint", "push"), CASES)
def test_a_fault_that_stays_leaves_it_as_it_was_and_says_how_to_go_on(hub, pushed, endpoint, push, kind):
    if (endpoint, push, kind) == ("branch", "overwrite", "403"):
        return  # it is there already and need not be made
    folder, run = pushed(push)
    before = dict(hub.repo("user/rows").branches) if push == "overwrite" else {}
    hub.faults = {endpoint: [kind] * 1000}
    with pytest.raises(PublishError, match=r"push to user/rows is not complete.*To go on, run: push again") as error:
        run()
    # The client reads the answer of "yaml" before its status.
    remedy = {"403": REMEDIES[403], "404": REMEDIES[404]}.get(kind, "")
    assert ("is not JSON" if endpoint == "yaml" and remedy else remedy) in str(error.value)
    assert ("put" in hub.seen) == (endpoint in {"put", "verify", "commit", "tag"})
    if ("datasets", "user/rows") in hub.repos:
        repo = hub.repo("user/rows")
        assert "v2" not in repo.tags
        if endpoint == "tag":
            assert hub.files("user/rows", revision="next") == held(folder)
        else:
            assert repo.branches.get("next", before.get("next")) in (before.get("next"), repo.branches["main"])
    hub.faults = {}
    run()
    assert hub.files("user/rows", revision="next") == held(folder)
    assert hub.repo("user/rows").tags["v2"] == hub.repo("user/rows").branches["next"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("endpoint", ["info", "tree", "resolve", "pulls", "preupload", "put", "commit"])
def test_a_pull_request_is_opened_once(hub, publish, write, monkeypatch, endpoint, kind):
    if kind == "timeout":
        monkeypatch.setattr("hf_longalign.hub.push.TIMEOUT", 0.25)
    publish(write("before", [1, 2]))
    main, folder = hub.files("user/rows"), write("after", [3])
    hub.faults = {endpoint: [kind]}
    url = publish(folder, create_pr=True)
    assert url == f"{hub.url}/datasets/user/rows/discussions/1"
    assert publish(folder, create_pr=True) == url
    assert len(hub.repo("user/rows").pulls) == 1
    assert hub.files("user/rows") == main
    assert hub.files("user/rows", revision="refs/pr/1") == held(folder)


def test_the_wait_is_the_one_the_hub_asks_for(hub, publish, write, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("loopback_hub.Handler.retry_after", "7")
    hub.faults = {"commit": ["429"]}
    publish(write("rows", [1]))
    assert waits == [7.0]


@pytest.mark.parametrize(("end", "file"), [(b"PAR1", "chat/train-00000-of-00001.parquet"), (b"\n", "README.md")])
def test_bytes_that_were_changed_on_the_way_are_found(publish, write, monkeypatch, end, file):
    def damage(data):
        return data[:-1] + b"x" if data.endswith(end) else data

    monkeypatch.setattr("loopback_hub.Handler.damage", staticmethod(damage))
    with pytest.raises(PublishError, match=rf"differs from what was meant in {file}\."):
        publish(write("rows", [1, 2]))
