"""A push that is killed leaves the repository as it was or complete, and the same command makes it complete."""

import subprocess
import sys
import time

import pytest
from loopback_hub import TOKEN, Hub

from hub.conftest import held


PUSH = f"""
import sys
from hf_longalign.hub import publish_dataset
publish_dataset(sys.argv[1], "user/rows", token={TOKEN!r})
"""


@pytest.mark.parametrize("moment", ["info", "preupload", "lfs", "put", "verify", "commit"])
def test_a_push_killed_at_any_moment_is_unchanged_or_complete(tmp_path, write, moment):
    before, after = write("before", [1, 2, 3, 4], shards=2), write("after", [5, 6])
    with Hub() as hub:

        def push(folder):
            command = [sys.executable, "-c", PUSH, folder]
            return subprocess.Popen(command, env=hub.environment(tmp_path / "home"), stderr=subprocess.PIPE, text=True)

        def finish(process):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]

        finish(push(before))
        hub.seen.clear()
        hub.faults = {moment: ["timeout"]}  # it is done, and nobody answers
        process = push(after)
        deadline = time.monotonic() + 60
        while hub.faults[moment] and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
        process.communicate()
        assert hub.files("user/rows") == held(after if moment == "commit" else before)
        finish(push(after))
        assert hub.files("user/rows") == held(after)
