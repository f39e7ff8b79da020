"""Everything that only a GPU can tell, by one command: exactness, trajectories, speed, memory, evaluation.

    python benchmarks/gpu.py --output benchmarks/results/                  # all parts, within 20 minutes on an H100
    python benchmarks/gpu.py --output out/ --parts exactness,throughput    # some of them

Each part runs in a process of its own, writes `gpu_PART_DEVICE.json`, and says what it could not do and why. Without
a GPU, or with `--small`, the same parts run in sizes for a CPU and say so: that shows that they run, and proves
exactness, but says nothing about the speed and the memory of a real model.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


PARTS = ("exactness", "trajectories", "throughput", "compiling", "span", "memory", "evaluation")
SMALL = "for a CPU: no GPU was found, or `--small` was given"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "flash-attn", "kernels", "triton", "bitsandbytes",
            "liger-kernel")  # fmt: skip


def machine() -> dict:
    """Say what this ran on, and with what."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    else:
        device = {"device": f"CPU, {torch.get_num_threads()} threads"}
    return {**device, "python": platform.python_version(), **versions, "date": time.strftime("%Y-%m-%d")}


def run_part(name: str, small: bool) -> dict:
    """Run one part here; what stops it is part of the answer."""
    import gpu_parts

    start, could_not = time.perf_counter(), []
    place = gpu_parts.Place(
        "cuda" if torch.cuda.is_available() else "cpu", large=torch.cuda.is_available() and not small
    )
    try:
        rows = getattr(gpu_parts, name)(place, could_not)
    except Exception as error:  # noqa: BLE001 # whatever a driver or package of this machine raises
        rows, reason = [], f"{type(error).__name__}: {error}"
        could_not.append(f"{name}: {reason[:500]}")
    seconds = time.perf_counter() - start
    about = machine() | ({} if place.large else {"sizes": SMALL})
    return {"part": name, "machine": about, "rows": rows, "could_not": could_not, "seconds": round(seconds, 1)}


def main() -> None:
    """Run the parts one after the other, print their rows, and end with what could not be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, on a GPU too")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one part may take")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run_part(options.here, options.small)))
        return
    parts = options.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"`--parts` must be some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    options.output.mkdir(parents=True, exist_ok=True)
    device, missing = "cuda" if torch.cuda.is_available() else "cpu", []
    for part in parts:
        command = [sys.executable, __file__, "--here", part, *(["--small"] if options.small else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
            result = json.loads(done.stdout.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            result = {"part": part, "rows": [], "could_not": [f"{part}: more than {options.limit:.0f} seconds"]}
        except (json.JSONDecodeError, IndexError):
            # A driver that ends the process leaves no answer behind.
            result = {"part": part, "rows": [], "could_not": [f"{part}: ended with {done.stderr[-500:]}"]}
        (options.output / f"gpu_{part}_{device}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"== {part} ({result.get('seconds', '?')} s)")
        for row in result["rows"]:
            print("  " + "  ".join(f"{key}={value}" for key, value in row.items()))
        missing += result["could_not"]
    print("== could not" if missing else "== everything was done")
    for reason in missing:
        print("  " + reason)


if __name__ == "__main__":
    main()
