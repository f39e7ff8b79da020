"""Shards: skipped when finished, gone on with when half done, merged to the rows and the spend of one run."""

import os
import signal
import threading

import pytest

from hf_longalign.endpoint.protocol import RunStopped, ignore
from hf_longalign.synthesis.builder import ContextSynthesisBuilder
from hf_longalign.synthesis.journal import Journal
from hf_longalign.synthesis.shards import fill_shard, merge_shards, run_shard
from hf_longalign.synthesis.team import Team

from .fakes import FakeGenerator, make_pairs


SEEDS = make_pairs(13)


def options_of(disk, generator, **more):
    more = {"n_distractors": 2, "min_words": 20, "show_progress": False, **more}
    return {"seeds": SEEDS, "generator": generator, "cache_dir": str(disk), **more}


def rows_of(options, journal=None):
    builder = ContextSynthesisBuilder(**options, journal=journal)
    builder.download_and_prepare()
    return builder.as_dataset(split="train").to_list()


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """The rows and the totals of a run without shards."""
    disk, generator = tmp_path_factory.mktemp("one"), FakeGenerator()
    rows = rows_of(options_of(disk, generator), journal=disk / "journal.sqlite")
    with Journal(disk / "journal.sqlite") as journal:
        return rows, journal.totals(), len(generator.asked)


@pytest.mark.parametrize("counts", [(1,), (3,), (20,), (2, 3)], ids=str)
def test_shards_of_any_count_give_the_rows_of_one_run(tmp_path, one_run, counts):
    rows, totals, requests = one_run
    shared, generator = tmp_path / "shared", FakeGenerator()
    for count in counts:
        for index in range(count):
            machine = tmp_path / f"machine-{count}-{index}"
            path = run_shard(options_of(machine, generator), shared, index, count)
            assert path == shared / f"shard-{index}-of-{count}.sqlite"
    assert len(generator.asked) == requests  # what the shards of another count have paid for is taken over
    journal = merge_shards(shared)
    with Journal(journal) as merged:
        found = merged.totals()
        assert found.replies == totals.replies
        assert found.spend.tokens == totals.spend.tokens
    silent = FakeGenerator(stop_after=0)
    assert rows_of(options_of(tmp_path / "last", silent), journal) == rows
    assert silent.asked == []


def test_a_finished_shard_that_cannot_be_read_is_named_and_one_that_has_gone_is_not_made(tmp_path):
    generator, shared = FakeGenerator(), tmp_path / "shared"
    run_shard(options_of(tmp_path / "one", generator), shared, 0, 2)
    (shared / "shard-0-of-2.sqlite").write_bytes(b"torn" * 1000)
    with pytest.raises(RunStopped, match=r"`shard-0-of-2\.sqlite` cannot be read: .* Delete it, and its replies are"):
        run_shard(options_of(tmp_path / "two", generator), shared, 0, 3)
    (shared / "shard-0-of-2.sqlite").unlink()
    run_shard(options_of(tmp_path / "two", generator), shared, 0, 3)
    gone = shared / "shard-1-of-2.sqlite"
    with pytest.raises(RunStopped, match=r"`shard-1-of-2\.sqlite` cannot be read: unable to open"):
        Journal(tmp_path / "own.sqlite", [gone])
    assert not gone.exists()


def test_a_finished_shard_is_skipped_and_a_half_one_goes_on_here_and_elsewhere(tmp_path):
    shared = tmp_path / "shared"
    with pytest.raises(RunStopped):
        run_shard(options_of(tmp_path / "here", FakeGenerator(stop_after=3)), shared, 0, 2)
    assert [path.name for path in shared.iterdir()] == ["shard-0-of-2.sqlite.half"]
    with pytest.raises(ValueError, match="must hold every shard of one count, got none"):
        merge_shards(shared)
    # The same machine knows what it has; another one takes over what was put down.
    for machine in ("here", "elsewhere"):
        generator = FakeGenerator()
        other = tmp_path / f"shared-{machine}"
        other.mkdir()
        (other / "shard-0-of-2.sqlite.half").write_bytes((shared / "shard-0-of-2.sqlite.half").read_bytes())
        run_shard(options_of(tmp_path / machine, generator), other, 0, 2)
        assert len(generator.asked) == 7 - 3
        assert [path.name for path in other.iterdir()] == ["shard-0-of-2.sqlite"]
        again = FakeGenerator(stop_after=0)
        run_shard(options_of(tmp_path / "third", again), other, 0, 2)
        assert again.asked == []


class Terminated(FakeGenerator):
    """Its process is told to end, as by a queue whose time is up, while it writes its third reply."""

    async def reply(self, request, notify=ignore):
        if len(self.asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return await super().reply(request, notify)


def test_a_shard_that_is_told_to_end_is_put_down_for_another_machine(tmp_path):
    told, generator = Terminated(), FakeGenerator()
    with pytest.raises(SystemExit):
        run_shard(options_of(tmp_path / "here", told), tmp_path / "shared", 0, 2)
    run_shard(options_of(tmp_path / "elsewhere", generator), tmp_path / "shared", 0, 2)
    assert 3 <= len(told.asked) < 7
    asked = [request.key for request in told.asked + generator.asked]
    assert len(asked) == len(set(asked)) == 7


def test_a_team_fills_a_shard_together_and_goes_on_where_it_stopped(tmp_path):
    shared, disk, totals = tmp_path / "shared", tmp_path / "disk", 0
    for stop_after in (2, None):
        team, found = Team.found(disk / "context_synthesis"), {}
        generators = [FakeGenerator(stop_after=stop_after) for _ in range(2)]

        def member(rank, team=team, found=found, generators=generators):
            builder = ContextSynthesisBuilder(**options_of(disk, generators[rank]))
            builder.pipeline.shard, builder.pipeline.team = (1, 2), Team(team, rank, 2)
            try:
                found[rank] = fill_shard(builder, shared)
            except RunStopped as stop:
                found[rank] = stop

        threads = [threading.Thread(target=member, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        totals += sum(len(generator.asked) for generator in generators)
        if stop_after:
            assert isinstance(found[0], RunStopped) and totals < 6
        else:
            assert found == {0: True, 1: False} and totals == 6
    assert [path.name for path in shared.iterdir()] == ["shard-1-of-2.sqlite"]
    with Journal(shared / "shard-1-of-2.sqlite") as journal:
        assert journal.totals().replies == 6


def test_what_makes_no_sense_is_refused_by_name(tmp_path):
    options = options_of(tmp_path, FakeGenerator())
    with pytest.raises(ValueError, match="`index` must be from 0 to below `count`, got 2 of 2"):
        run_shard(options, tmp_path, 2, 2)
    with pytest.raises(ValueError, match="`journal` must be None in shards"):
        run_shard({**options, "journal": "j.sqlite"}, tmp_path, 0, 2)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "shard-1-of-3.sqlite").touch()
    with pytest.raises(ValueError, match=r"got 1 without shard-0-of-3\.sqlite, shard-2-of-3\.sqlite"):
        merge_shards(tmp_path / "shared")
