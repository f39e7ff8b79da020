"""Bytes of a training step with LoRA under gradient checkpointing, and the longest packed row that a card holds.

    longest row = (card - reserve - weights - adapter - loss) / bytes per token
    bytes per token = layers * hidden * 2    the checkpoints, bf16
                    + layer_bytes            what the one layer that is being recomputed keeps for its backward pass
                    + 6 * FFN + 4 * hidden   gradients on their way through it
                    + 6 * hidden             embeddings, last norm, their gradient
                    + 6 * hidden + 2 * queries    what PEFT casts for adapters, which it keeps in float32

`layer_bytes` is exact for a Llama layer: `python benchmarks/gpu.py --parts memory` counts tiny layers by saved-tensor
hooks. The other terms are reckoned; `tests/distributed` holds the whole against the peak of a step on CPUs, and on a
GPU the same part compares it with what torch allocates.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense model with gated FFN and grouped queries."""

    name: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    width: int
    ffn: int
    vocabulary: int
    tied: bool = False


SHAPES = (
    Shape("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151_936, tied=True),
    Shape("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151_936, tied=True),
    Shape("Qwen2.5-7B", 28, 3584, 28, 4, 128, 18_944, 152_064),
    Shape("Llama-3-8B", 32, 4096, 32, 8, 128, 14_336, 128_256),
    Shape("Qwen2.5-14B", 48, 5120, 40, 8, 128, 13_824, 152_064),
    Shape("Qwen2.5-32B", 64, 5120, 40, 8, 128, 27_648, 152_064),
)
CARDS = {"24 GB (RTX 4090)": 24, "48 GB (L40S)": 45, "80 GB (A100, H100)": 79.6, "141 GB (H200)": 139}
LORA_RANK = 16
LOSS_TILE = 4096 * 32_768 * 2  # what TRL's chunked loss works in: tokens, vocabulary, bf16
RESERVE = 2 * 2**30  # CUDA's own, kernels, fragments


def linear_parameters(shape: Shape) -> int:
    """Count the weights of the layers' linear maps."""
    queries, keys = shape.heads * shape.width, shape.key_heads * shape.width
    return shape.layers * shape.hidden * (2 * queries + 2 * keys + 3 * shape.ffn)


def parameters(shape: Shape) -> int:
    """Count all weights, to the norms."""
    return linear_parameters(shape) + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)


def lora_parameters(shape: Shape) -> int:
    """Count the weights of LoRA on all linear maps."""
    queries, keys = shape.heads * shape.width, shape.key_heads * shape.width
    ends = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys) + 3 * (shape.hidden + shape.ffn)
    return shape.layers * LORA_RANK * ends


def layer_bytes(shape: Shape, rank: int = LORA_RANK) -> int:
    """Bytes per token that one layer keeps: bf16 weights and bf16 LoRA on all linear maps, fused attention."""
    queries, keys = shape.heads * shape.width, shape.key_heads * shape.width
    # Norms and residuals; queries and output; keys and values; gate, up and their product; log-sum-exp; LoRA's middle.
    return 12 * shape.hidden + 4 * queries + 4 * keys + 8 * shape.ffn + 4 * shape.heads + 14 * rank + 8


def bytes_per_token(shape: Shape, casts: bool = True) -> int:
    """Bytes that one more token of a packed row takes; nothing is cast in full training, nor by FSDP2."""
    passing = 6 * shape.ffn + 4 * shape.hidden
    cast = 6 * shape.hidden + 2 * shape.heads * shape.width if casts else 0
    return shape.layers * shape.hidden * 2 + layer_bytes(shape) + passing + 6 * shape.hidden + cast


def fixed_bytes(shape: Shape, bits: int = 16) -> float:
    """Bytes that do not depend on the row: weights, adapter with AdamW in float32, a tile of logits."""
    linear = linear_parameters(shape)
    # NF4 keeps a scale per 64 weights, itself in 8 bits.
    weights = (parameters(shape) - linear) * 2 + linear * (2 if bits == 16 else 0.5 + 1 / 64)
    return weights + lora_parameters(shape) * 16 + LOSS_TILE


def longest_row(shape: Shape, gigabytes: float, bits: int = 16) -> int:
    """Tokens of the longest packed row, rounded down to a thousand; 0 where the weights do not fit."""
    free = gigabytes * 2**30 - RESERVE - fixed_bytes(shape, bits)
    return max(0, int(free / bytes_per_token(shape)) // 1000 * 1000)


def device_bytes(shape: Shape, tokens: int, *, full: bool = False, gpus: int = 1) -> float:
    """Bytes of each GPU for packed rows of `tokens`; with several GPUs, weights and what AdamW keeps are sharded."""
    weights = parameters(shape) * (16 if full else 2) + (0 if full else lora_parameters(shape) * 16)
    # Gathered: the layer that works and the next, in bf16; or the head, whose gradient is whole and float32 at first.
    layers, head = 4 * linear_parameters(shape) / shape.layers, shape.vocabulary * shape.hidden * (6 if full else 2)
    gathered = max(layers, head) if gpus > 1 else 0
    return weights / gpus + gathered + LOSS_TILE + tokens * bytes_per_token(shape, casts=gpus == 1 and not full)


def sharding_table(tokens: int = 8192) -> str:
    """Return the launchers' table in Markdown: GB of each GPU."""
    columns = {"LoRA, any number": (False, 1), "LoRA, 4 sharded": (False, 4), "LoRA, 8 sharded": (False, 8)}
    columns |= {"full, 8 sharded": (True, 8), "full, 16 sharded": (True, 16)}
    lines = ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for shape in SHAPES:
        sizes = (device_bytes(shape, tokens, full=full, gpus=gpus) + RESERVE for full, gpus in columns.values())
        lines.append(f"| {shape.name} | " + " | ".join(f"{size / 2**30:.0f}" for size in sizes) + " |")
    return "\n".join(lines)


def table() -> str:
    """Return the page's table in Markdown."""
    lines = ["| model, weights | " + " | ".join(CARDS) + " |", "| --- |" + " ---: |" * len(CARDS)]
    for shape in SHAPES:
        for bits in (16, 4):
            rows = (longest_row(shape, size, bits) for size in CARDS.values())
            cells = " | ".join(f"{tokens:,}" if tokens else "–" for tokens in rows)
            lines.append(f"| {shape.name}, {'bf16' if bits == 16 else '4-bit'} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), sharding_table(), sep="\n\n")
