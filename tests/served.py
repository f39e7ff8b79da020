"""`transformers serve` on loopback, for the tests that ask a real server."""

import os
import socket
import sys
import time
import urllib.request
from contextlib import contextmanager

import forked
import pytest


@contextmanager
def transformers_serve(model, home):
    """Yield the URL of a server of a model's folder; its cache lies in the folder `home`."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason='needs pip install "transformers[serving]" "hf_longalign[eval]"')
    (home / "hub").mkdir()  # the list of models fails without it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = forked.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, process.said()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
