"""The benchmark for a GPU runs on a CPU too and says so; the memory page is the formula's, the formula is counted."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from unittest import mock

import forked
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters


ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


formula = load("memory_formula")
load("generation")
models = load("gpu_models")
exactness = load("gpu_exactness")
parts = load("gpu_parts")
gpu = load("gpu")


def benchmark(folder, parts, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(folder), "--parts", parts]
    return forked.run([*command, *options], timeout=500)


def result(rows, finished=True, device="a card"):
    return {"part": "span", "machine": {"device": device}, "rows": rows, "could_not": [], "finished": finished}


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
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] and found["finished"]
    if path.name == "gpu_memory_cpu.json":
        assert "no GPU was found" in found["machine"]["sizes"]
        assert found["could_not"] == ["memory: the whole of a step and the longest row need a GPU and its sizes"]
        assert "need a GPU" in done.stdout
    assert all(row["counted"] == row["formula"] for row in found["rows"] if "counted" in row)


def test_an_unknown_part_is_named(tmp_path):
    done = benchmark(tmp_path, "memory,sped")
    assert done.returncode == 2 and "got sped" in done.stderr and not list(tmp_path.iterdir())


def test_small_sizes_on_a_gpu_have_a_file_of_their_own():
    names = {gpu.file_name("span", device, small) for device in ("cuda", "cpu") for small in (False, True)}
    assert names == {"gpu_span_cuda.json", "gpu_span_cuda_small.json", "gpu_span_cpu.json"}


@pytest.mark.parametrize("worse", [result([{"a": 3}], finished=False), result([{"a": 3}]), result([])])
def test_a_result_is_not_overwritten_by_less(tmp_path, worse):
    path, beside = tmp_path / "gpu_span_cuda.json", tmp_path / "gpu_span_cuda_partial.json"
    assert gpu.keep(result([{"a": 1}, {"a": 2}]), path) == path
    before = path.read_text()
    assert gpu.keep(worse, path) == beside
    assert path.read_text() == before and json.loads(beside.read_text()) == worse
    assert gpu.keep(result([{"a": 4}, {"a": 5}]), path) == path
    assert json.loads(path.read_text())["rows"] == [{"a": 4}, {"a": 5}] and not beside.exists()


@pytest.mark.parametrize("first", [True, False], ids=["after a whole", "after a partial"])
@pytest.mark.parametrize("finished", [True, False])
def test_another_card_has_files_of_its_own(tmp_path, first, finished):
    path = tmp_path / "gpu_span_cuda.json"
    stands = gpu.keep(result([{"a": 1}], finished=first), path)
    before = stands.read_text()
    other = result([{"a": 2}, {"a": 3}], finished, "NVIDIA H200 (141GB)")
    own = gpu.keep(other, path)
    assert own.name == f"gpu_span_cuda_nvidia-h200-141gb{'' if finished else '_partial'}.json"
    assert stands.read_text() == before and json.loads(own.read_text()) == other
    assert gpu.keep({**other, "finished": True}, path).name == "gpu_span_cuda_nvidia-h200-141gb.json"
    assert stands.read_text() == before and len(list(tmp_path.iterdir())) == 2
    assert gpu.keep(result([{"a": 4}]), path) == path  # the first card goes on under its name
    assert json.loads(path.read_text())["rows"] == [{"a": 4}] and len(list(tmp_path.iterdir())) == 2


def test_a_crash_that_tells_no_card_is_a_partial_of_any(tmp_path):
    path = tmp_path / "gpu_span_cuda.json"
    for _ in range(2):
        assert gpu.keep(result([], False, gpu.NOT_TOLD), path).name == "gpu_span_cuda_partial.json"
        assert gpu.keep(result([{"a": 1}]), path) == path and list(tmp_path.iterdir()) == [path]


def test_a_first_result_without_a_row_is_no_result(tmp_path):
    path = tmp_path / "gpu_span_cuda.json"
    assert gpu.keep(result([]), path).name == "gpu_span_cuda_partial.json" and not path.exists()


def said(folder, *lines):
    file = folder / "lines"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


WRITTEN = [{"machine": {"device": "a card"}}, {"row": {"a": 1}}, {"could_not": "b: no"}, {"row": {"a": 2}}]


def test_a_part_that_is_stopped_keeps_the_rows_it_had_finished(tmp_path):
    lines = said(tmp_path, *WRITTEN)
    with lines.open("a") as file:
        file.write('{"row": {"a": ')  # cut off
    found = gpu.follow("span", [sys.executable, "-c", "import time; time.sleep(600)"], lines, 0.1)
    assert found["rows"] == [{"a": 1}, {"a": 2}] and found["machine"] == {"device": "a card"}
    assert found["could_not"] == ["b: no", "span: stopped after 0 seconds"] and not found["finished"]


def test_a_part_that_crashes_says_how_and_keeps_its_rows(tmp_path):
    crash = "import os, sys; sys.stderr.write('the driver is gone'); sys.stderr.flush(); os.abort()"
    found = gpu.follow("span", [sys.executable, "-c", crash], said(tmp_path, *WRITTEN), 600)
    assert found["rows"] == [{"a": 1}, {"a": 2}] and not found["finished"]
    assert found["could_not"] == ["b: no", "span: ended with -6, the driver is gone"]


def test_a_part_that_crashes_at_once_has_a_machine_too(tmp_path):
    found = gpu.follow("span", [sys.executable, "-c", "raise SystemExit(3)"], said(tmp_path), 600)
    assert found["machine"]["torch"] and found["machine"]["device"] == "not told" and not found["finished"]


@pytest.mark.parametrize("fails", [False, True])
def test_rows_are_written_as_a_part_goes(tmp_path, monkeypatch, fails):
    lines, seen = tmp_path / "lines", []

    def part(place, could_not):
        could_not("something")
        yield {"a": 1}
        seen.extend(json.loads(line) for line in lines.read_text().splitlines())
        if fails:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(parts, "span", part)
    gpu.run_part("span", True, lines)
    assert seen[1:] == [{"could_not": "something"}, {"row": {"a": 1}}]
    assert seen[0]["machine"]["sizes"] == gpu.SMALL
    last = json.loads(lines.read_text().splitlines()[-1])
    assert last == ({"could_not": "span: RuntimeError: out of memory"} if fails else {"finished": True})


def test_no_part_is_begun_once_the_time_is_over(tmp_path):
    done = benchmark(tmp_path, "memory,span", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert "span: not begun within the 0 minutes" in done.stdout and not list(tmp_path.iterdir())


def test_sides_step_in_turn_and_in_the_other_order_every_second_round():
    order = []

    def side(name):
        return lambda: order.append(name) or float(len(order))

    times = models.in_turn({"a": side("a"), "b": side("b")}, rounds=4, warm_up=2)
    assert "".join(order) == "abbaabbaabba"
    assert times == {"a": [5, 8, 9, 12], "b": [6, 7, 10, 11]}


def test_the_interval_of_a_ratio_holds_what_noise_hides():
    rng = np.random.default_rng(0)
    for cost in (1.0, 1.05):
        reference = rng.normal(1, 0.01, 60)
        found = models.ratio(list(cost * rng.normal(1, 0.01, 60)), list(reference))
        assert found["low"] < cost < found["high"] < found["low"] + 0.02
        assert found["low"] < found["ratio"] < found["high"]
    # One slow step in ten counts, as it would in a run.
    assert models.ratio([1.0] * 9 + [2.0], [1.0] * 10)["ratio"] == pytest.approx(1.1)


def test_a_step_draws_positions_and_counts_what_they_cover():
    step = models.Step(parts.TINY, "cpu", 64, ours=True, skipped=True, recomputed=False, count=2)
    batches, collate = [], step.collator
    step.collator = mock.Mock(side_effect=lambda rows: batches.append(collate(rows)) or batches[-1], wraps=collate)
    step.collator.set_epoch = collate.set_epoch
    assert step.trainer.args.logging_steps == 10
    for _ in range(10):
        step()
    first, second = (batch["position_ids"] for batch in batches[:2])
    assert first.shape == (1, 64) and first.max() > 64 and not torch.equal(first, second)
    assert step.coverage.record().documents == 20


def test_ordinary_rows_are_not_counted():
    step = models.Step(parts.TINY, "cpu", 64, ours=True, skipped=False, recomputed=False, count=2)
    assert step.coverage is None and step() > 0


def test_a_compiled_step_trains_as_an_uncompiled_one_and_leaves_no_trace():
    model = models.build(parts.TINY, "cpu", parts.ATTENTION_NAME, torch.float32, lora=True)
    before = {name for name in os.environ if name.startswith("ACCELERATE_")}
    weights, graphs = {}, {}
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    for compiled in (True, False):
        model.load_state_dict(start)
        torch._dynamo.reset()
        counters.clear()
        step = models.Step(
            parts.TINY, "cpu", 64, ours=True, skipped=True, recomputed=False, compiled=compiled,
            model=models.twin(model, parts.ATTENTION_NAME), count=2,
        )  # fmt: skip
        for _ in range(4):
            step()
        weights[compiled] = {name: weight.clone() for name, weight in model.state_dict().items()}
        graphs[compiled] = counters["stats"]["unique_graphs"]
    assert graphs[False] == 0 < graphs[True]
    assert any(not torch.equal(start[name], weights[True][name]) for name in start)
    torch.testing.assert_close(weights[True], weights[False], atol=1e-4, rtol=1e-3)
    assert {name for name in os.environ if name.startswith("ACCELERATE_")} == before


def test_a_twin_has_the_same_weights_and_an_attention_of_its_own():
    model = models.build(parts.TINY, "cpu", "eager", torch.float32, lora=True)
    twin = models.twin(model, "sdpa")
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert [one.get_base_model().config._attn_implementation for one in (model, twin)] == ["eager", "sdpa"]


def test_throughput_names_the_attention_of_every_side(monkeypatch):
    missing = []
    monkeypatch.setattr(models.Step, "__call__", lambda step: 2.0 if step.coverage is not None else 1.0)
    rows = list(parts.throughput(models.Place("cpu", large=False), missing.append))
    assert [row["side"] for row in rows[:3]] == ["ordinary", "skipped", "TRL's trainer, on the same attention"]
    assert [row["side"] for row in rows[5:]] == [
        "skipped", "skipped, compiled by layer", "cost of: skipped, compiled by layer"
    ]  # fmt: skip
    assert {row["attention"] for row in rows if "attention" in row} == {"longalign_varlen"}
    assert "kernels-community/vllm-flash-attn3: needs a GPU" in missing
    cost = rows[3]
    assert (cost["side"], cost["beside"]) == ("cost of: skipped", "ordinary")
    assert (cost["share_of_a_step"], cost["from"], cost["to"], cost["goal_met"]) == (1, 1, 1, False)


def test_trl_is_stepped_on_each_flash_attention_in_turn_with_the_same_attention(monkeypatch):
    monkeypatch.setattr(models.Step, "__call__", lambda step: 1.0)
    monkeypatch.setattr(parts, "flash_attentions", lambda device, could_not: ["sdpa", "no such attention"])
    missing = []
    rows = list(parts.throughput(models.Place("cpu", large=False), missing.append))[8:]
    assert [(row["side"], row.get("attention")) for row in rows] == [
        ("TRL's trainer, on the same attention", "longalign_varlen"),
        ("TRL's trainer, on sdpa", "sdpa"),
        ("cost of: TRL's trainer, on sdpa", None),
        ("TRL's trainer, on the same attention", "longalign_varlen"),
    ]
    (reason,) = missing
    assert reason.startswith("tiny, TRL's trainer, on no such attention: ValueError")


def test_a_model_that_does_not_fit_takes_no_other_with_it(monkeypatch):
    def build(*_, **__):
        raise torch.OutOfMemoryError("no room")

    missing = []
    monkeypatch.setattr(parts, "build", build)
    assert not list(parts.throughput(models.Place("cpu", large=False), missing.append))
    assert missing[:2] == ["tiny: OutOfMemoryError: no room"] * 2


def test_flash_attention_is_found_where_it_can_be_had(monkeypatch):
    missing = []
    monkeypatch.setattr(exactness, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(exactness, "is_flash_attn_3_available", lambda: True)
    monkeypatch.setattr(exactness, "is_flash_attn_4_available", lambda: True)
    monkeypatch.setattr(exactness, "is_kernels_available", lambda: True)
    found = exactness.flash_attentions("cuda", missing.append)
    assert found == [
        "flash_attention_3", "flash_attention_4", "kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3"
    ]  # fmt: skip
    assert missing == ["flash_attention_2: not installed"]


def test_exactness_compares_loss_logits_and_gradients():
    missing = []
    rows = list(exactness.exactness(models.Place("cpu", large=False), missing.append))
    assert {row["attention"] for row in rows} == {"eager", "sdpa", "longalign_varlen"}
    assert all(row["exact"] and {"loss_error", "logit_error", "gradient_error"} <= row.keys() for row in rows)
    assert {(row["attention"], row["dtype"]) for row in rows if row["packed"]} == {
        ("longalign_varlen", "torch.float32"), ("longalign_varlen", "torch.bfloat16")
    }  # fmt: skip
    assert any(reason.startswith("sdpa, packed: refused. ") for reason in missing)
    assert "flash_attention_4: needs a GPU" in missing and "flex_attention: has no backward pass on a CPU" in missing


def test_what_is_not_exact_is_far_off():
    rows = models.documents(4, 40, 512)
    expected = exactness.one_by_one(models.build(parts.TINY, "cpu", "eager", torch.float32).train(), rows, "cpu")
    # sdpa takes every skip for the end of a document, and a packed row hides no document without it.
    for dtype, bound in exactness.TOLERANCE.items():
        model = models.build(parts.TINY, "cpu", "sdpa", torch.float32).to(dtype).train()
        found = exactness.errors(exactness.outcome(model, rows, True, "cpu"), expected)
        assert found["logit_error"] > 3 * bound and found["gradient_error"] > 3 * bound
    off = expected._replace(gradients=[torch.full_like(gradient, torch.nan) for gradient in expected.gradients])
    assert not exactness.errors(off, expected)["gradient_error"] < 1
