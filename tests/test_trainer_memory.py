"""Options of TRL and transformers that save memory train the same over skipped positions and packed rows."""

import pytest
import torch
import trl.models.activation_offloading as offloading
import trl.trainer.utils
from attention.test_compile import like_a_gpu  # noqa: F401
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from test_trainer_models import make_trainer
from tiny import chats, tiny_llama
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl.kernels import chunked_logprob

from hf_longalign.attention import ATTENTION_NAME


layouts = pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])


def trained(folder, packing, model=None, peft_config=None, callbacks=(), **options):
    """Losses and weights after three steps of one run."""
    torch.manual_seed(0)
    given = {"max_steps": 3, "packing": packing, "learning_rate": 1e-2, "optim": "adamw_torch", **options}
    trainer = make_trainer(folder, tiny_llama() if model is None else model, peft_config=peft_config, **given)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return losses, weights


def assert_same(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual[0], expected[0], atol=tolerance, rtol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(actual[1][name], weight, atol=100 * tolerance, rtol=0)


@layouts
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing(tmp_path, packing, reentrant, adapter):
    peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if adapter else None
    expected = trained(tmp_path, packing, peft_config=peft_config)
    actual = trained(
        tmp_path, packing, peft_config=peft_config, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert_same(actual, expected)


@layouts
def test_activation_offloading(tmp_path, packing, monkeypatch):
    """TRL moves activations between an accelerator and the host; on a CPU they are moved to where they are."""

    def pretended(**asked):
        return None if asked else torch.device("cpu")  # optimisers ask whether it is there

    monkeypatch.setattr(offloading.torch.accelerator, "current_accelerator", pretended)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    moved = []
    real = offloading.OffloadActivations

    class Offload(real):
        def __init__(self, *args, **kwargs):
            super().__init__(use_pin_memory=False, use_streams=False, min_offload_size=64)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: moved.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(offloading, "OffloadActivations", Offload)
    assert_same(trained(tmp_path, packing, activation_offloading=True), trained(tmp_path, packing))
    assert moved


@layouts
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimisers_of_bitsandbytes(tmp_path, packing, optimizer):
    pytest.importorskip("bitsandbytes", reason='needs pip install "hf_longalign[quant]"')
    losses, _ = trained(tmp_path, packing, optim=optimizer)
    expected, _ = trained(tmp_path, packing)
    assert losses[0] == expected[0]
    torch.testing.assert_close(losses, expected, atol=0.02, rtol=0)  # moments of 8 bits are rounded


@layouts
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_with_checkpointing(tmp_path, packing, bits):
    pytest.importorskip("bitsandbytes", reason='needs pip install "hf_longalign[quant]"')
    # bitsandbytes packs 4-bit weights for CPUs by rows of whole blocks.
    tiny_llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "model")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
    )
    results = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=quantisation, dtype=torch.float32
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        results.append(
            trained(tmp_path, packing, model=model, peft_config=lora, gradient_checkpointing=checkpointing, seed=1)
        )
    # Rows of 8 bits are scaled by the whole batch and rounded anew.
    assert_same(results[1], results[0], tolerance=1e-5 if bits == 4 else 0.05)


@layouts
def test_the_chunked_loss_builds_no_logits(tmp_path, packing, monkeypatch):
    """TRL's default: the largest tensor that is kept for the backward pass is no (tokens, vocabulary)."""
    model = tiny_llama(vocab_size=4096)
    trainer = make_trainer(tmp_path, model, packing=packing, preflight=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        trainer.compute_loss(trainer.model, dict(batch))
    tokens = batch["input_ids"].numel()
    assert max(size for size in kept if size != 4096 * 32) < tokens * 4096 // 4
    assert not packing or trainer.model.config._attn_implementation == ATTENTION_NAME


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs were compiled after each step, by a callback that counts them."""
    # `torch_compile` sets them for the process.
    for name in ("BACKEND", "USE_REGIONAL_COMPILATION", "USE_DYNAMIC"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
    torch._dynamo.reset()
    counters.clear()
    counted = []

    class Graphs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counted.append(counters["stats"]["unique_graphs"])

    yield Graphs(), counted
    torch._dynamo.reset()


def packed_rows():
    """Options for six steps over packed rows that differ in length and in their number of documents."""
    rows = [{"messages": chats(n + 1, turns=n % 4 + 1)[n]} for n in range(40)]
    return {
        "dataset": Dataset.from_list(rows), "max_length": 400, "max_steps": 6, "per_device_train_batch_size": 1,
        "preflight": False,
    }  # fmt: skip


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_compiled_training_is_the_same_and_compiles_nothing_after_the_third_step(tmp_path, weighting, graphs):
    callback, counted = graphs
    options = packed_rows() | {"loss_weighting": weighting}
    expected = trained(tmp_path, True, **options)
    actual = trained(
        tmp_path, True, callbacks=[callback], torch_compile=True, torch_compile_backend="aot_eager", **options
    )
    assert_same(actual, expected)
    assert counted[0] > 0 and counted[2:] == [counted[2]] * 4


def like_a_kernel(function):
    """Part of a graph where one is traced, and none by itself, as kernels by Triton are."""
    outside = torch.compiler.disable(function)

    def kernel(*args, **kwargs):
        outside(*args, **kwargs)

    torch._dynamo.eval_frame.skip_code(kernel.__code__)
    return torch._dynamo.allow_in_graph(kernel)


@pytest.mark.parametrize("flash", [False, True])
def test_a_head_over_targets_alone_compiles_nothing_after_the_third_step(
    tmp_path, flash, graphs, request, monkeypatch
):
    """TRL's on a GPU, where the number of targets differs from row to row and kernels can be part of a graph."""
    if flash:
        request.getfixturevalue("like_a_gpu")
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _: True)
    # The vocabulary in whole tiles, as Mistral's and Gemma 4's: dynamo cannot trace a narrower last one.
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", tiny_llama().config.vocab_size)
    for name in ("_forward_tile", "_backward_tile"):
        monkeypatch.setattr(chunked_logprob, name, like_a_kernel(getattr(chunked_logprob, name)))
    callback, counted = graphs
    expected = trained(tmp_path, True, **packed_rows())
    actual = trained(
        tmp_path, True, callbacks=[callback], torch_compile=True, torch_compile_backend="aot_eager", **packed_rows()
    )
    assert_same(actual, expected)
    assert counted[0] > 0 and counted[2:] == [counted[2]] * 4


@pytest.mark.parametrize("layers", [2, 6])
def test_compiled_by_layer_as_accelerate_launch_has_it(tmp_path, layers, graphs, monkeypatch):
    """What `accelerate launch --dynamo_backend … --dynamo_use_regional_compilation` sets."""
    callback, counted = graphs
    expected = trained(tmp_path, True, tiny_llama(num_hidden_layers=layers), **packed_rows())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "yes")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")
    actual = trained(tmp_path, True, tiny_llama(num_hidden_layers=layers), callbacks=[callback], **packed_rows())
    assert_same(actual, expected)
    assert counted[0] > 0 and counted[2:] == [counted[2]] * 4


@pytest.mark.parametrize("launched", [False, True])
def test_what_is_compiled_has_one_length_and_few_shapes(tmp_path, launched, graphs, monkeypatch):
    if launched:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    compiled = {} if launched else {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = make_trainer(tmp_path, tiny_llama(), packing=True, **compiled, **packed_rows())
    batches = list(trainer.get_train_dataloader())
    assert len({int((batch["labels"] != -100).sum()) for batch in batches}) > 1
    assert {batch["input_ids"].shape for batch in batches} == {(1, 400)}
    assert {batch["cu_seq_lens_q"].shape for batch in batches} == {(17,)}


GPU_OPTIONS = {
    "activations offloaded": {"activation_offloading": True},
    "checkpoints": {"gradient_checkpointing": True},
    "checkpoints, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compiled": {"torch_compile": True, "preflight": False},
    "compiled by layer": {"torch_compile": True, "preflight": False},
    "liger": {"use_liger_kernel": True},
    "optimiser of 8 bits": {"optim": "adamw_8bit"},
    "paged optimiser": {"optim": "paged_adamw_32bit"},
    "weights of 4 bits": {"bits": 4, "learning_rate": 1e-3},
    "weights of 8 bits": {"bits": 8, "learning_rate": 1e-3},
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@layouts
@pytest.mark.parametrize("name", GPU_OPTIONS)
def test_on_a_gpu_every_option_trains_as_without_it(tmp_path, packing, name, monkeypatch):
    # `torch_compile` sets the first for the process.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "yes" if "by layer" in name else "no")
    torch._dynamo.reset()
    options = dict(GPU_OPTIONS[name])
    bits = options.pop("bits", None)
    if bits or "optim" in options:
        pytest.importorskip("bitsandbytes", reason='needs pip install "hf_longalign[quant]"')
    if name == "liger":
        pytest.importorskip("liger_kernel", reason="needs pip install liger-kernel")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    tiny_llama(**sizes).save_pretrained(tmp_path / "model")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )

    def run(bits=None, adapter=False, **given):
        kwargs = {"quantization_config": quantisation, "device_map": {"": 0}} if bits else {}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **kwargs)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if adapter else None
        return trained(tmp_path, packing, model=model, peft_config=lora, use_cpu=False, bf16=True, **given)[0]

    # Rounded to bfloat16 on the way; weights of few bits are another model, near the one they stand for.
    options["adapter"] = bits is not None
    expected = run(**{key: value for key, value in options.items() if key in ("adapter", "learning_rate")})
    torch.testing.assert_close(run(bits, **options), expected, atol=0.1 if bits else 0.03, rtol=0)
