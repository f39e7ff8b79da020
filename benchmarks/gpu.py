"""Everything that only a GPU can tell, by one command: exactness, trajectories, speed, memory, evaluation.

    python benchmarks/gpu.py --output benchmarks/results/                  # all parts, within 20 minutes on an H100
    python benchmarks/gpu.py --output out/ --parts exactness,throughput    # some of them

Each part runs in a process of its own, writes `gpu_PART_DEVICE.json`, and says what it could not do and why. A part
that is stopped or fails leaves the rows it had finished in `gpu_PART_DEVICE_partial.json`, and the result of an
earlier run as it was; so does another card, whose files have its name. Without a GPU, or with `--small`, the same
parts run in sizes for a CPU and say so: that shows that they run, and proves exactness, but says nothing about the
speed and the memory of a real model.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


PARTS = ("exactness", "trajectories", "throughput", "compiling", "span", "memory", "evaluation")
SMALL = "for a CPU: no GPU was found, or `--small` was given"
NOT_TOLD = "not told"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "flash-attn", "flash-attn-3", "flash-attn-4",
            "kernels", "triton", "bitsandbytes", "liger-kernel")  # fmt: skip


def packages() -> dict:
    """Say with what this ran, and when."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"python": platform.python_version(), **versions, "date": time.strftime("%Y-%m-%d")}


def machine() -> dict:
    """Say what this ran on, and with what."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    else:
        device = {"device": f"CPU, {torch.get_num_threads()} threads"}
    return {**device, **packages()}


def run_part(name: str, small: bool, lines: Path) -> None:
    """Run one part here, and write each row and each reason at once: a process that is stopped loses neither."""
    import gpu_parts

    cuda = torch.cuda.is_available()
    place = gpu_parts.Place("cuda" if cuda else "cpu", large=cuda and not small)
    with lines.open("a") as file:

        def say(kind: str, what: Any) -> None:
            print(json.dumps({kind: what}), file=file, flush=True)

        say("machine", machine() | ({} if place.large else {"sizes": SMALL}))
        try:
            for row in getattr(gpu_parts, name)(place, partial(say, "could_not")):
                say("row", row)
        except Exception as error:  # noqa: BLE001 # whatever a driver or package of this machine raises
            say("could_not", f"{name}: {type(error).__name__}: {str(error)[:500]}")
        else:
            say("finished", True)


def follow(part: str, command: list[str], lines: Path, seconds: float) -> dict:
    """Run a part in a process of its own, stop it after `seconds`, and return what it had written until then."""
    start, reason = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            if process.wait(seconds):
                errors.seek(0)
                # A driver that ends the process lets it say nothing.
                reason = f"{part}: ended with {process.returncode}, {errors.read()[-500:].strip()}"
        except subprocess.TimeoutExpired:
            reason = f"{part}: stopped after {seconds:.0f} seconds"
        finally:
            # With the compilers that it may have started.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # The last line may have been cut off.
    said = [json.loads(line) for line in lines.read_text().rpartition("\n")[0].splitlines()]
    by_kind = {
        kind: [one[kind] for one in said if kind in one] for kind in ("machine", "row", "could_not", "finished")
    }
    return {
        "part": part,
        "machine": by_kind["machine"][0] if by_kind["machine"] else {"device": NOT_TOLD, **packages()},
        "rows": by_kind["row"],
        "could_not": by_kind["could_not"] + ([reason] if reason else []),
        "seconds": round(time.perf_counter() - start, 1),
        "finished": bool(by_kind["finished"]) and reason is None,
    }


def file_name(part: str, device: str, small: bool) -> str:
    """Name a part's result; on a GPU small sizes have a name of their own.

    >>> file_name("span", "cuda", small=False), file_name("span", "cuda", small=True), file_name("span", "cpu", True)
    ('gpu_span_cuda.json', 'gpu_span_cuda_small.json', 'gpu_span_cpu.json')
    """
    return f"gpu_{part}_{device}{'_small' if small and device == 'cuda' else ''}.json"


def keep(result: dict, path: Path) -> Path:
    """Write a result, and return where: beside the one that stands if it did not finish or has fewer rows.

    Where there is one of another card, those of this card have its name in theirs.
    """
    card = result["machine"]["device"]
    stand = [one for one in (path, path.with_name(f"{path.stem}_partial.json")) if one.exists()]
    cards = {json.loads(one.read_text())["machine"]["device"] for one in stand}
    if card != NOT_TOLD and cards - {card, NOT_TOLD}:
        path = path.with_name(f"{path.stem}_{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json")
    beside = path.with_name(f"{path.stem}_partial.json")
    rows = len(json.loads(path.read_text())["rows"]) if path.exists() else 1
    whole = result["finished"] and len(result["rows"]) >= rows
    (path if whole else beside).write_text(json.dumps(result, indent=2) + "\n")
    if whole:
        beside.unlink(missing_ok=True)
    return path if whole else beside


def main() -> None:
    """Run the parts one after the other, print their rows, and end with what could not be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, on a GPU too")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one part may take")
    parser.add_argument("--minutes", type=float, default=20, help="minutes that all parts together may take")
    parser.add_argument("--here", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_part(options.here[0], options.small, Path(options.here[1]))
        return
    parts = options.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"`--parts` must be some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    options.output.mkdir(parents=True, exist_ok=True)
    device, missing = "cuda" if torch.cuda.is_available() else "cpu", []
    end = time.monotonic() + 60 * options.minutes
    for part in parts:
        left = min(options.limit, end - time.monotonic())
        if left <= 0:
            missing.append(f"{part}: not begun within the {options.minutes:g} minutes of `--minutes`")
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder, "lines")
            lines.touch()
            command = [sys.executable, __file__, "--here", part, str(lines), *(["--small"] if options.small else [])]
            result = follow(part, command, lines, left)
        path = keep(result, options.output / file_name(part, device, options.small))
        print(f"== {part} ({result['seconds']} s): {path}", flush=True)
        for row in result["rows"]:
            print("  " + "  ".join(f"{key}={value}" for key, value in row.items()))
        missing += result["could_not"]
    print("== could not" if missing else "== everything was done")
    for reason in missing:
        print("  " + reason)


if __name__ == "__main__":
    main()
