"""Processes that ask together: each thing once, seeds read once, and what a lost one left open taken over."""

import asyncio
import multiprocessing
import os
import threading
import time

import pytest
from fake_endpoint import FakeEndpoint

from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.disk import read_table
from hf_longalign.synthesis.team import Team

from .fakes import FakeGenerator, make_pairs


def _in_threads(*works):
    """Run every function in a thread of its own; returns what they return."""
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: works[n]()})) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[number] for number in range(len(works))]


@pytest.fixture
def folder(tmp_path):
    return Team.found(tmp_path / "cache")


class Slow(FakeGenerator):
    """Slow enough that another process finds work left."""

    async def reply(self, request, notify=None):
        await asyncio.sleep(0.1)
        return await super().reply(request)


def test_two_processes_ask_each_thing_once_and_one_reads_the_seeds(tmp_path, folder):
    generators, pipelines = [], []
    options = {"seeds": make_pairs(24), "min_words": 20, "difficulty": "closed_book", "show_progress": False}

    def process(rank):
        generator = Slow(fail=[5])
        builder = ContextSynthesisBuilder(cache_dir=tmp_path / "cache", generator=generator, **options)
        builder.pipeline.team = Team(folder, rank, 2)
        generators.append(generator)
        pipelines.append(builder.pipeline)
        return builder.prepare_outcomes()

    assert _in_threads(lambda: process(0), lambda: process(1)) == [True, False]
    asked = [[request.key for request in generator.asked] for generator in generators]
    assert len({*asked[0], *asked[1]}) == len(asked[0]) + len(asked[1]) == 24 + 23 + 3
    assert min(map(len, asked)) >= 6
    assert sorted("seeds" in vars(pipeline) for pipeline in pipelines) == [False, True]
    alone = ContextSynthesisBuilder(cache_dir=tmp_path / "alone", generator=Slow(fail=[5]), **options)
    assert alone.prepare_outcomes()
    together = next(pipeline for pipeline in pipelines if "seeds" in vars(pipeline)).files
    assert together.accepted.equals(alone.files.accepted) and together.rejected.equals(alone.files.rejected)
    assert not folder.exists()


def process(folder, cache, rank, url):
    """One of two processes; writes whether it led at the end."""
    builder = ContextSynthesisBuilder(
        cache_dir=cache,
        generator=OpenAIGenerator("tiny", url, max_concurrency=4),
        seeds=make_pairs(80),
        checks=["leak"],
        show_progress=False,
    )
    builder.pipeline.team = None if folder is None else Team(folder, rank, 2)
    (cache / f"{rank}.led").write_text(str(builder.prepare_outcomes()))


def _accepted(cache):
    return read_table(next(cache.rglob("accepted.arrow")))


@pytest.mark.parametrize("lost", [0, 1])
def test_what_a_lost_process_left_open_is_taken_over(tmp_path, folder, lost):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openai", __name__])
    cache = tmp_path / "cache"
    with FakeEndpoint(latency=(0.05, 0.1)) as server:
        team = [context.Process(target=process, args=(folder, cache, rank, server.url)) for rank in (0, 1)]
        for one in team:
            one.start()
        deadline = time.monotonic() + 60
        while len(server.log) < 40 and time.monotonic() < deadline:
            time.sleep(0.001)
        team[lost].kill()
        team[1 - lost].join(120)
        assert team[1 - lost].exitcode == 0 and (cache / f"{1 - lost}.led").read_text() == "True"
        # Of each of its four slots, one that was under way and one that waited.
        assert 80 <= len(server.log) <= 80 + 2 * 4
        (tmp_path / "alone").mkdir()
        process(None, tmp_path / "alone", 0, server.url)
    assert _accepted(cache).equals(_accepted(tmp_path / "alone"))
    # What the lost process could not remove, the next run does once the process that made it is gone.
    assert folder.exists()


def test_the_folder_of_a_killed_team_is_removed_by_the_next(tmp_path, folder):
    gone = multiprocessing.get_context("spawn").Process()
    gone.start()
    gone.join()
    left = folder.rename(folder.with_name(folder.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-")))
    (left / "0.host").write_text("here")
    alive = Team.found(tmp_path / "cache")
    assert Team.found(tmp_path / "cache").exists() and alive.exists() and not left.exists()


def test_processes_without_a_common_disk_are_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_longalign.synthesis.team.MEET_SECONDS", 0.5)
    generators = [FakeGenerator(), FakeGenerator()]

    def run(rank):
        cache = tmp_path / str(rank)
        builder = ContextSynthesisBuilder(
            cache_dir=cache, generator=generators[rank], seeds=make_pairs(24), show_progress=False
        )
        # What `join_team` does: the first makes the folder, the others learn its name.
        folder = made if rank == 0 else cache / "context_synthesis" / made.name
        builder.pipeline.team = Team(folder, rank, 2)
        with pytest.raises(ValueError, match=r"got no sign of process [01]: .*`--num_shards` and its own `--shard_in"):
            builder.prepare_outcomes()
        return True

    made = Team.found(tmp_path / "0" / "context_synthesis")
    assert _in_threads(lambda: run(0), lambda: run(1)) == [True, True]
    assert not generators[0].asked and not generators[1].asked


def test_processes_on_several_machines_are_refused_with_a_common_disk_too(folder):
    (folder / "1.host").write_text("node7")
    with pytest.raises(ValueError, match="got others on node7: each machine would pay for everything"):
        Team(folder, 0, 2).run(lambda: None, print)


def test_one_that_is_done_early_is_not_missed_by_one_that_comes_late(folder):
    parts = []

    def late():
        time.sleep(0.3)
        return Team(folder, 2, 3).run(lambda: None, parts.append)

    works = [lambda: Team(folder, 0, 3).run(lambda: None, print), lambda: Team(folder, 1, 3).run(lambda: None, print)]
    assert _in_threads(*works, late) == [True, False, False] and not parts and not folder.exists()


def test_a_leader_that_fails_ends_the_others(folder):
    def lead():
        raise ZeroDivisionError

    def first():
        with pytest.raises(ZeroDivisionError):
            Team(folder, 0, 2).run(lead, print)
        return "failed"

    assert _in_threads(first, lambda: Team(folder, 1, 2).run(lead, print)) == ["failed", False]


def test_parts_cover_all_items_once_and_the_leader_begins_with_its_own(folder):
    got = {}
    team = Team(folder, 1, 3)

    def lead():
        got["order"] = team.hand_out("step", list("abcdefgh"))

    def follow(rank):
        def keep(part):
            got[rank] = part

        return Team(folder, rank, 3)._follow(keep)

    team._lead.acquire()
    lead()
    (folder / "done").touch()
    for rank in (0, 2):
        (folder / f"{rank}.host").write_text("")
    team._lead.release()
    assert not follow(0) and not follow(2)
    assert got == {"order": [1, 4, 7, 6, 5, 3, 2, 0], 0: ("step", ["a", "d", "g"]), 2: ("step", ["c", "f"])}
