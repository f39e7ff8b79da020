"""`subprocess` for scripts that import the trainer, in processes forked from one that has the large imports behind it.

Torch with its compiler, bitsandbytes and pandas take nine of the twelve seconds that such a script needs to start.
What reads the environment when it is imported (huggingface_hub, transformers, datasets) is left to the script.
Signals, process ids and exit codes are those of a process of its own. What a fresh interpreter may do otherwise is
tested where scripts are launched by accelerate and from the wheel.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


TESTS = str(Path(__file__).parent)
LARGE = ["torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.export"]
LARGE += ["bitsandbytes", "pandas", "pyarrow.dataset", "scipy.optimize", "matplotlib.pyplot"]
# What the client of the hundred kills imports, and not its own module: its folder is not on the path of the server.
CLIENT = ["hf_longalign.synthesis.runner", "hf_longalign.endpoint", "openai.resources.chat.completions", "psutil"]
CLIENT += ["tqdm.auto"]


def context():
    """Where processes are forked; for those who have a function to run and no script."""
    found = multiprocessing.get_context("forkserver")
    # What is not there is passed over.
    found.set_forkserver_preload([*LARGE, *CLIENT])
    return found


def _become(words, env, session, *files):
    """Go on as `python words` in this environment."""
    if session:
        os.setsid()
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [path for path in sys.path if not path.startswith(TESTS)]
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


class Popen:
    """What `subprocess.Popen` is for `[sys.executable, script, …]`; what it says is always kept, as text."""

    def __init__(self, words, *, env=None, start_new_session=False):
        python, *words = map(str, words)
        assert python == sys.executable
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._said = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._said:
            file.touch()
        given = (words, dict(env or os.environ), start_new_session, *self._said)
        self._process = context().Process(target=_become, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Standard output and standard error, once it has ended."""
        self.wait(timeout)
        return self.said()

    def said(self):
        """Standard output and standard error until now."""
        return tuple(file.read_text() for file in self._said)

    def send_signal(self, number):
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(words, *, env=None, timeout=None):
    """What `subprocess.run` is for `[sys.executable, script, …]`, its output kept as text."""
    process = Popen(words, env=env)
    try:
        said = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, *said)
