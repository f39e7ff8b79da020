"""The benchmark for a GPU runs on a CPU too and says so; the memory page is the formula's, the formula is counted."""

import importlib.util
import json
import sys
from pathlib import Path

import forked
import pytest


ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


formula = load("memory_formula")
load("generation")
models = load("gpu_models")
parts = load("gpu_parts")


def benchmark(folder, parts):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(folder), "--parts", parts]
    return forked.run(command, timeout=500)


def test_the_pages_hold_the_formulas_tables():
    assert formula.table() in (ROOT / "recipes" / "MEMORY.md").read_text()
    assert formula.sharding_table() in (ROOT / "recipes" / "accelerate" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "millions"),
    [("Qwen2.5-0.5B", 494), ("Qwen2.5-7B", 7616), ("Llama-3-8B", 8030), ("Qwen2.5-14B", 14_770), ("Qwen3-4B", 4022)],
)
def test_weights_are_as_many_as_the_models_have(name, millions):
    shape = next(shape for shape in formula.SHAPES if shape.name == name)
    assert formula.parameters(shape) / 1e6 == pytest.approx(millions, rel=0.001)


def test_layers_keep_what_the_formula_says():
    for sizes in [(64, 4, 2, 16, 128), (192, 6, 3, 32, 64), (96, 3, 1, 64, 320)]:
        shape = formula.Shape("layer", 1, *sizes, 32)
        assert parts.saved_bytes(shape) == formula.layer_bytes(shape)


@pytest.mark.parametrize("recomputed", [True, False])
def test_a_step_recomputes_where_it_says_so(recomputed):
    step = models.Step(parts.TINY, "cpu", 256, ours=True, skipped=True, recomputed=recomputed, count=1)
    layers = step.model.get_base_model().model.layers
    entered = []
    layers[0].self_attn.register_forward_pre_hook(lambda *_: entered.append(1))
    step()
    assert len(entered) == 1 + recomputed


def test_the_longest_row_is_the_last_that_fits():
    for shape in formula.SHAPES:
        for bits in (4, 16):
            tokens = formula.longest_row(shape, 80, bits)
            used = formula.RESERVE + formula.fixed_bytes(shape, bits) + tokens * formula.bytes_per_token(shape)
            assert used <= 80 * 2**30 < used + 1000 * formula.bytes_per_token(shape)


def test_a_part_runs_alone_and_says_what_it_could_not_do(tmp_path):
    done = benchmark(tmp_path, "memory")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    if path.name == "gpu_memory_cpu.json":
        assert "no GPU was found" in result["machine"]["sizes"]
        assert result["could_not"] == ["memory: the whole of a step and the longest row need a GPU and its sizes"]
        assert "need a GPU" in done.stdout
    assert all(row["counted"] == row["formula"] for row in result["rows"] if "counted" in row)


def test_an_unknown_part_is_named(tmp_path):
    done = benchmark(tmp_path, "memory,sped")
    assert done.returncode == 2 and "got sped" in done.stderr and not list(tmp_path.iterdir())
