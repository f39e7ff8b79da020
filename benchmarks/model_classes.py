"""Every causal language model of the installed transformers, trained one step: exact, refused by name, or wrong.

    python benchmarks/model_classes.py                            # all, about half an hour on one core
    python benchmarks/model_classes.py Qwen3ForCausalLM Gemma2ForCausalLM    # these anew, beside those there are

A tiny random model of each class takes one training step of `LongAlignSFTTrainer` (learning rate 0), in padded and
packed rows, with skipped and with ordinary positions. Then logits, loss and gradients of a batch of the trainer are
held against what they mean, computed by the class's own "eager" attention, one document at a time:

| positions | reference |
| --- | --- |
| ordinary | the document alone, without positions or mask: as the model itself has it |
| skipped | the long sequence in which each skipped position holds a masked token |
| skipped, recurrent layers | the document alone at its positions: such layers have none to skip |

A cell is exact, refused (a clear error before the first step), or wrong; where skips would move no logit, blind.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import tempfile
import traceback
import warnings
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer
from hf_longalign.attention import has_recurrent_layers
from hf_longalign.attention.support import RECURRENT_LAYERS, layer_kinds


RESULTS = Path(__file__).parent / "results" / "model_classes.json"
VERSIONS = {library.__name__: library.__version__ for library in (transformers, trl, torch)}
VOCABULARY = 128
MAX_PARAMETERS = 3_000_000
SETTINGS = {  # title: packing, strategy
    "padded, skips": (False, "skip_all"),
    "packed, skips": (True, "skip_all"),
    "padded, ordinary": (False, "none"),
    "packed, ordinary": (True, "none"),
}
# Shares of the spread of the logits, of the loss in nats, and of the norm of the gradient.
LOGITS, LOSS, GRADIENT = 5e-4, 1e-3, 1e-2

_HIDDEN = "hidden_size d_model n_embd embed_dim dim lru_width embedding_size word_embed_proj_dim conv_dim dim_model"
_WIDE = (
    "intermediate_size ffn_dim d_ff n_inner dim_feedforward encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "shared_intermediate_size intermediate_size_mlp dense_intermediate_size dim_ff"
)
_EXPERT = (
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size "
    "moe_shared_expert_intermediate"
)
_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads num_attention_groups linear_num_key_heads n_mamba_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts router_top_k zero_expert_num "
    "o_groups hc_mult altup_num_inputs"
)
_HEADS = (
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts"
)
_SIXTEEN = (
    "head_dim attention_head_dim kv_channels global_head_dim v_head_dim swa_head_dim swa_v_head_dim dim_head "
    "sliding_window local_window_size attention_window_size window_size local_attention attention_chunk_size "
    "sliding_window_size block_size q_lora_rank kv_lora_rank o_lora_rank index_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim mamba_head_dim mamba_headdim mamba_d_state ssm_state_size mamba_chunk_size "
    "chunk_size"
)
_EIGHT = (
    "qk_rope_head_dim qk_nope_head_dim mamba_num_heads state_size rotary_dim adapter_rank index_topk laurel_rank "
    "hidden_size_per_layer_input"
)
_LONG = "max_position_embeddings max_seq_len max_sequence_length model_max_length"
_ONE = (
    "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace mamba_n_groups mamba_ngroups n_groups bos_token_id"
)
_ZERO = "num_kv_shared_layers num_nextn_predict_layers pad_token_id"
SIZES = {
    name: size
    for names, size in (
        (_HIDDEN, 64), (_WIDE, 96), (_EXPERT, 32), (_LAYERS, 2), (_HEADS, 4), (_SIXTEEN, 16), (_EIGHT, 8),
        (_LONG, 8192), (_ONE, 1), (_ZERO, 0), ("router_jitter_noise input_jitter_noise", 0.0),
        # With few heads many scores of an indexer are 0 alike, and which of them it takes depends on the padding.
        ("index_n_heads", 16),
        ("n_positions n_ctx", 2048), ("mamba_d_head", 32),
        ("mamba_d_ssm", 128), ("rotary_emb_base", 10_000), ("rescale_every", 6), ("eos_token_id", 2),
        ("vocab_size vocab_size_per_layer_input", VOCABULARY), ("attention_hidden_size", 64),
    )
    for name in names.split()
}  # fmt: skip

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
# What classes need besides: layers of every kind that the family has, and sizes that go together.
GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "Afmoe Cohere2 Cohere2Moe Dots1 Exaone4 ExaoneMoe Flint Gemma3n GptOss Kolibri1 Laguna Mellum Ministral Olmo3",
        {"layer_types": [_SLIDING, _FULL]},
    ),
    ("Gemma2 Gemma3 VaultGemma", {"layer_types": [_SLIDING, _FULL], "query_pre_attn_scalar": 16}),
    ("Gemma4", {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [_SLIDING, _FULL] * 2}),
    ("GraniteMoeHybrid OlmoHybrid Qwen3Next Qwen3_5 Qwen3_5Moe", {"layer_types": [_LINEAR, _FULL]}),
    ("BailingHybrid KimiLinear", {"num_key_value_heads": 4, "layer_types": [_LINEAR, _FULL]}),
    (
        "AXK1 AXK2 DeepseekV2 DeepseekV3 DeepseekV32 Dots3Note Glm4MoeLite GlmMoeDsa HYV4 MiniCPM3 Mistral4 Youtu",
        {"num_key_value_heads": 4},
    ),
    ("Inkling Inkling2", {"layer_types": ["hybrid_sliding", "hybrid"]}),
    ("Lfm2 Lfm2Moe", {"layer_types": ["conv", _FULL]}),
    ("Lfm3", {"num_hidden_layers": 3, "layer_types": ["conv", _SLIDING, _FULL]}),
    ("Bamba", {"attn_layer_indices": [1]}),
    ("CsmDepthDecoder", {"backbone_hidden_size": 64, "num_codebooks": 4}),
    (
        "Dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    ("DeepseekV4", {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"]}),
    (
        "Fuyu",
        {
            "text_config": {
                "model_type": "persimmon", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 8192,
            },
        },
    ),
    ("GPTNeo", {"attention_types": [[["global"], 2]]}),
    ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}),
    ("Llama4", {"layer_types": ["chunked_attention", _FULL]}),
    ("LongcatFlash", {"num_key_value_heads": 4, "head_dim": 8}),
    ("Mamba2", {"num_heads": 8}),
    (
        "Phi4Multimodal",
        {
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28,
            },
            "audio_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
                "input_size": 16, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16,
                "nemo_conv_channels": 16,
            },
        },
    ),
    ("RecurrentGemma", {"block_types": ["recurrent", "attention"]}),
    ("SmolLM3", {"no_rope_layers": [1, 0]}),
    ("Zamba", {"num_hidden_layers": 4, "layer_types": [_LINEAR, "hybrid"] * 2}),
    ("Zamba2", {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "use_mem_rope": True}),
    ("Zaya", {"num_experts_per_tok": 1}),
)  # fmt: skip
FIELDS = {name: fields for names, fields in GROUPS for name in names.split()}


@dataclass(frozen=True)
class Cell:
    """What one class gave in one setting; errors as in `LOGITS`, `LOSS` and `GRADIENT`."""

    verdict: str
    note: str = ""
    attention: str = ""
    logits: float | None = None
    loss: float | None = None
    gradient: float | None = None


def classes() -> list[str]:
    """Return the names of all causal language models of transformers."""
    names = (name for name in dir(transformers) if name.endswith("ForCausalLM"))
    return [name for name in names if not name.startswith("Auto")]


def tiny_config(name: str) -> Any:
    """Return a config of a class with the small sizes that its fields have."""
    config_class = getattr(transformers, name).config_class
    own = {field.name: field.default for field in dataclasses.fields(config_class)}
    chosen = {}
    for field, default in own.items():
        # Lists say the sizes layer by layer; an optional window or rank that is off by default stays off.
        off = default is None and field in ("sliding_window", "q_lora_rank", "kv_channels")
        if field in SIZES and not off and not isinstance(default, list | tuple):
            chosen[field] = SIZES[field]
        elif "dropout" in field or field.endswith("_pdrop") or "layerdrop" in field:
            chosen[field] = 0.0
    return config_class(**{**chosen, **FIELDS.get(name.removesuffix("ForCausalLM"), {})})


def tiny_model(name: str, attention: str) -> Any:
    """Return a random model whose attention shows in the logits, whatever the family's own initialisation."""
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(tiny_config(name), attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.is_floating_point() and weight.ndim >= 2:
                scale = 0.3 if "conv" in key else weight.shape[-1] ** -0.5
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words t0, t1, …"""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")


def rows() -> Dataset:
    """Return six tokenised samples of 10 to 58 tokens, the second part of each a target."""
    generator = torch.Generator().manual_seed(7)
    samples = []
    for _ in range(6):
        prompt, answer = torch.randint(5, 30, (2,), generator=generator).tolist()
        ids = torch.randint(4, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(samples)


def documents(batch: dict[str, Any]) -> list[tuple[int, slice]]:
    """Return row and columns of each document of a batch."""
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"].tolist()
        return [(0, slice(start, stop)) for start, stop in pairwise(bounds)]
    return [(row, slice(0, int(mask.sum()))) for row, mask in enumerate(batch["attention_mask"])]


def reference(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the logits of one document, `(tokens, vocabulary)`; see the table above."""
    if torch.equal(positions, torch.arange(len(ids))):
        return model(input_ids=ids[None], use_cache=False).logits[0]
    if has_recurrent_layers(model.config):
        mask = positional_masks(model, positions)
        return model(input_ids=ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False).logits[0]
    length = int(positions[-1]) + 1
    tokens, mask = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long)
    tokens[0, positions], mask[0, positions] = ids, 1
    places = torch.arange(length)[None]
    return model(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False).logits[0, positions]


def positional_masks(model: Any, positions: torch.Tensor) -> Any:
    """Return a mask of ones, or where layers slide a mask for each kind of layer, with the window in positions."""
    text_config = model.config.get_text_config()
    kinds = layer_kinds(model.config)
    if _SLIDING not in kinds:
        return torch.ones(1, len(positions), dtype=torch.long)
    distance = positions[:, None] - positions
    full, window = distance >= 0, (distance >= 0) & (distance < text_config.sliding_window)
    hidden = torch.finfo(torch.float32).min
    masks = {kind: torch.where(window if kind == _SLIDING else full, 0.0, hidden)[None, None] for kind in kinds}
    return {kind: None if kind in RECURRENT_LAYERS else mask for kind, mask in masks.items()}


def train(name: str, packing: bool, strategy: str, folder: str) -> LongAlignSFTTrainer:
    """Take one training step that changes nothing."""
    model_class = getattr(transformers, name)
    args = LongAlignSFTConfig(
        folder,
        packing=packing,
        max_length=128,
        per_device_train_batch_size=3,
        skip_strategy=strategy,
        skip_target_length=512,
        skip_probability=1.0,
        max_steps=1,
        learning_rate=0.0,
        weight_decay=0.0,
        router_aux_loss_coef=0.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = LongAlignSFTTrainer(
        tiny_model(name, "sdpa" if model_class._supports_sdpa else "eager"),
        args=args,
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of each weight that has one."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def compare(trainer: LongAlignSFTTrainer, name: str) -> Cell:
    """Hold a batch of the trainer against the reference, document by document."""
    model, own = trainer.model, tiny_model(name, "eager")
    own.load_state_dict(model.state_dict())
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "seq_idx")}
    logits = model.eval()(**inputs, use_cache=False).logits
    targets = int((batch["labels"] != -100).sum())
    worst, moved, spread, loss = 0.0, 0.0, 0.0, torch.zeros(())
    batch.setdefault("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
    for row, columns in documents(batch):
        ids, labels, positions = (batch[key][row, columns] for key in ("input_ids", "labels", "position_ids"))
        expected = reference(own, ids, positions)
        worst = max(worst, float((logits[row, columns] - expected).abs().max().detach()))
        moved = max(moved, float((reference(own, ids, torch.arange(len(ids))) - expected).abs().max().detach()))
        spread = max(spread, float(expected.std().detach()))
        loss = loss + cross_entropy(expected[:-1].float(), labels[1:], reduction="sum") / targets
    batch = {key: batch[key] for key in (*inputs, "labels", "seq_idx") if key in batch}
    trained = trainer.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(targets))
    ours, theirs = gradients(model, trained), gradients(own, loss)
    # A weight that one side gave no gradient has a gradient of zero.
    none = {key: torch.zeros_like(gradient) for key, gradient in {**ours, **theirs}.items()}
    flat = [torch.cat([(none | found)[key].flatten() for key in none]) for found in (ours, theirs)]
    gradient = float((flat[0] - flat[1]).norm() / flat[1].norm().clamp(min=1e-12))
    apart = abs(float(trained.detach()) - float(loss.detach()))
    attention = model.config.get_text_config()._attn_implementation
    exact = worst < LOGITS * max(1.0, spread) and apart < LOSS and gradient < GRADIENT
    blind = trainer.args.skip_strategy != "none" and moved < 10 * LOGITS * max(1.0, spread)
    verdict = "WRONG" if not exact else "blind" if blind else "exact"
    return Cell(verdict, "", attention, worst, apart, gradient)


def measure(name: str, packing: bool, strategy: str) -> Cell:
    """Train a class in one setting and compare it; what fails becomes the cell's note."""
    trainer = None
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = train(name, packing, strategy, folder)
            return compare(trainer, name)
    except ValueError as error:
        ours = any("hf_longalign" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-2:])
        return Cell("refused" if ours and trainer is None else "CRASH", " ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises is a result here
        return Cell("CRASH", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def parameters(name: str) -> int | None:
    """Return the number of parameters at the small sizes; `None` where the class cannot be built from its config."""
    try:
        with torch.device("meta"):
            model = getattr(transformers, name)._from_config(tiny_config(name))
    except Exception:  # noqa: BLE001 - configs raise what they like
        return None
    return sum(weight.numel() for weight in model.parameters())


def page(results: dict[str, dict[str, Cell]], left_out: dict[str, str]) -> str:
    """Return the results as Markdown: the counts, the table, and the reasons of what was refused."""
    reasons: dict[str, int] = {}
    lines = []
    for name, cells in sorted(results.items()):
        shown = []
        for cell in cells.values():
            if cell.verdict in ("exact", "blind"):
                shown.append(f"{cell.verdict} {cell.logits:.0e}")
            elif cell.verdict == "WRONG":
                shown.append(f"**WRONG** {cell.logits:.0e} / {cell.loss:.0e} / {cell.gradient:.0e}")
            else:
                shown.append(f"{cell.verdict} ({reasons.setdefault(cell.note, len(reasons) + 1)})")
        lines.append(f"| {' | '.join([name.removesuffix('ForCausalLM'), *shown])} |")
    counts = []
    for verdict in ("exact", "refused", "blind", "CRASH", "WRONG"):
        numbers = [sum(cells[title].verdict == verdict for cells in results.values()) for title in SETTINGS]
        counts.append(f"| {' | '.join([verdict, *map(str, numbers)])} |")
    worst = max((c.logits for cells in results.values() for c in cells.values() if c.verdict == "exact"), default=0.0)
    versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    rule = "| --- |" + " --- |" * len(SETTINGS)
    titles = " | ".join(SETTINGS)
    text = f"""# Causal language models of transformers, trained one step

`python benchmarks/model_classes.py`: {versions}. {len(results)} classes; {len(left_out)} more could not be built small
from their config. The number beside a verdict is the largest error of a logit, in the exact cells at most {worst:.1e};
of what is wrong also the errors of loss and gradient.

| | {titles} |
{rule}
"""
    text += "\n".join([*counts, "", f"| class (`…ForCausalLM`) | {titles} |", rule, *lines, "", "## Reasons", "", ""])
    text += "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    if left_out:
        text += "\nNot built: " + ", ".join(f"{name} ({why})" for name, why in sorted(left_out.items())) + ".\n"
    return text


def main() -> None:
    """Measure the classes asked for and write the page; exit 1 where one is silently wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="names of classes; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file; a page goes beside it")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("hf_longalign").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    stored = json.loads(options.output.read_text()) if options.output.is_file() else {}
    known = stored if stored.get("versions") == VERSIONS else {"results": {}, "left_out": {}}
    results = {
        name: {title: Cell(**cell) for title, cell in cells.items()} for name, cells in known["results"].items()
    }
    left_out = known["left_out"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.classes or classes():
        size = parameters(name)
        if size is None or size > MAX_PARAMETERS:
            left_out[name] = "its config does not build" if size is None else f"{size:,} parameters"
            continue
        results[name] = {title: measure(name, *setting) for title, setting in SETTINGS.items()}
        print(name, *(f"{title}: {cell.verdict}" for title, cell in results[name].items()), sep="  ", flush=True)
        plain = {key: {title: asdict(cell) for title, cell in cells.items()} for key, cells in results.items()}
        everything = {"versions": VERSIONS, "results": plain, "left_out": left_out}
        options.output.write_text(json.dumps(everything, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(page(results, left_out))
    if any(cell.verdict in ("WRONG", "CRASH") for cells in results.values() for cell in cells.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
