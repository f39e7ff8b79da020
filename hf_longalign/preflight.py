"""A proof on the user's own model, before the first step, that attention over packed and skipped positions is right.

First what the config tells: rotary positions, a target length within the model's range, a backend that is exact for
its layers. Then what the model does, whatever it is wrapped in, on three documents of a few tokens
([`~hf_longalign.probe`]):

| test | what must happen |
| --- | --- |
| read them | logits are numbers, not NaN |
| change tokens of one document | no other document moves, nor do its own tokens before them |
| the same | its tokens after the skip move |
| shift all positions of a document | nothing moves: places do not count |
| stretch a skip | the tokens after it move: distances do count |
| take documents from their batch, at ordinary positions | the model itself has the same logits for them |
| compute the loss as training will | its targets are as probable as by the model's own logits |

Every movement is compared with `reach`, what a changed token does where no position is skipped, so that the size of
logits, of an adapter or of an untrained model does not matter.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from transformers import PretrainedConfig

from hf_longalign.attention.support import exactness_problem, has_recurrent_layers, layer_kinds
from hf_longalign.collator import SkipPositionDataCollator
from hf_longalign.probe import FAR, NEAR, ORDINARY, Changes, LogProbs, Probe, eval_mode, movements
from hf_longalign.rope import check_range, check_rope_reached


logger = logging.getLogger(__name__)

# Shares of `reach`, set between what was measured on tiny random models of 20 families, of 2 to 64 layers, with
# weights of standard deviation 0.02 to 0.3, in float32, float16 and bfloat16:
LEAK = 0.02  # no leak: 0, or up to 2e-6 in mixtures of experts; a leak in one layer of 64: 0.07 and more
NOISE = 0.3  # kernels that depend on the whole batch (8-bit bitsandbytes): up to 0.05; attention to later tokens: 0.9
CUT = 1e-4  # behind a cut: 0; behind an open skip: 0.2 and more
SHIFT = 0.3  # rotary positions: up to 3e-6 in float32 and 0.07 in bfloat16; learned ones: 0.9 and more
# Shares of the spread of the log-probabilities, in float32 and in half precision. What is right: up to 6e-6 and 0.009
# (softcaps are rounded); a head that leaves out a softcap: 0.002 and more, one that leaves out a layer: 1 and more.
LOSS, LOSS_HALF = 0.002, 0.03
STRETCH = 1e-5  # positions ignored: 0; behind a cut: about 1e-6; rotary positions: 3e-3 and more


# What models raise on a batch that they cannot take or do not expect; want of memory and lost processes are not such.
_MODEL_ERRORS = (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError)
_NOT_THE_MODELS = (torch.OutOfMemoryError, torch.distributed.DistError)


class PreflightError(ValueError):
    """The model, its attention or the batches are not right for the training asked for; says how, and what to do."""


class PreflightReport(NamedTuple):
    """What the tests measured.

    Args:
        reach: movement that changed tokens cause in their own document, in logits.
        leak: largest movement of another document, as a share of `reach` like all below.
        near: movement behind a short skip.
        far: movement behind a skip to the target length.
        shift: movement when a document's positions are shifted.
        stretch: movement when a skip is stretched.
    """

    reach: float
    leak: float
    near: float | None = None
    far: float | None = None
    shift: float | None = None
    stretch: float | None = None


def run_preflight(
    model: torch.nn.Module,
    collator: SkipPositionDataCollator,
    device: torch.device | str | None = None,
    *,
    log_probs: LogProbs | None = None,
    pads: bool = True,
) -> PreflightReport | None:
    """Prove that training this model on this collator's batches is exact; a few tiny forwards without gradients.

    Every process of a distributed run must call it: they all run the same forwards. Training modes, random state,
    gradients and buffers are left as they were.

    Args:
        model: the model as it will be trained, with adapter, quantisation and wrappers.
        collator: the collator of the training data.
        device: where batches go; the model's first parameter's when `None`.
        log_probs: how training computes the log-probabilities of a batch's targets, where that is not by the model's
            own logits: from model and batch to a tensor `(batch, length - 1)`.
        pads: whether batches hold padding; not so where each has one row.

    Returns:
        What was measured; `None` where nothing needs a proof (single rows with ordinary positions), or nothing is to
        be seen (an attention that does not reach the logits yet).

    Raises:
        PreflightError: names the backend, the kind of layers and the remedy.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_longalign import SkipPositionDataCollator, run_preflight
    >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_attention_heads=2,
    ...                      num_hidden_layers=1, max_position_embeddings=1024)
    >>> run_preflight(LlamaForCausalLM(config), SkipPositionDataCollator(0, target_length=1024)).leak
    0.0
    >>> run_preflight(LlamaForCausalLM(config), SkipPositionDataCollator(0, target_length=4096))
    Traceback (most recent call last):
    hf_longalign.preflight.PreflightError: `target_length` must be at most 1024, the range of this 'llama' model,
    got 4096. Load it with `config=hf_longalign.scale_rope(config, 4096, 'yarn')`, or lower `target_length`.
    """
    skipped = collator.strategy != "none"
    exacting = skipped or collator.padding_free
    if not (exacting or pads or log_probs):
        return None
    unwrapped: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    base = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
    text_config = base.config.get_text_config(decoder=True)
    if exacting:
        _check_config(base, text_config, collator, skipped)
        check_no_virtual_tokens(unwrapped)
    device = torch.device(device if device is not None else next(model.parameters()).device)
    window = text_config.sliding_window if "sliding" in _kinds(text_config) else None
    probe = Probe(model, text_config, collator, device, window)
    report = None
    cuda = [device] if device.type == "cuda" else []
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(cuda):
        if log_probs is not None:
            _check_loss(probe, log_probs, type(base).__name__)
        if exacting or pads:
            report = _Judge(probe, text_config, skipped).report()
    if report is None and (exacting or pads):
        logger.warning("Preflight could not see attention at work: no token's logits depend on the tokens before it.")
    else:
        logger.info("Preflight passed: %s", report)
    return report


def check_no_virtual_tokens(model: Any) -> None:
    """Refuse prompt and prefix tuning, whose virtual tokens have no place among skipped positions and packed rows.

    Raises:
        PreflightError: names the method.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise PreflightError(
            "`peft_config` must not put virtual tokens before the rows, got "
            f"{model.active_peft_config.peft_type.value}: PEFT drops the positions, and packed documents would share "
            "one prompt. Set skip_strategy='none' and packing=False, or take LoRA."
        )


def _check_loss(probe: Probe, log_probs: LogProbs, name: str) -> None:
    """Training may compute its loss by another way than the model's own logits: TRL's fused head does."""
    remedy = (
        "Train this model with `transformers.Trainer`, `SkipPositionDataCollator` and `SkipPositionCallback`, where "
        "the loss is the model's own."
    )
    alone = "Take a model that reads text alone."
    with _refusals(lambda told, _: f"{name} cannot run on a batch of text ({told}). {alone}"):
        own, half = probe.own_log_probs()
    with _refusals(lambda told, _: f"TRL cannot compute the loss of {name} ({told}). {remedy}"):
        trained = probe.log_probs(log_probs)
    # What a model masks of its vocabulary is -inf on both sides; NaN equals nothing, and "not <=" refuses it.
    difference = torch.where(own == trained, 0.0, own - trained).square().mean().sqrt().item()
    if not difference <= (LOSS_HALF if half else LOSS) * own[own.isfinite()].std().item() + 1e-5:
        raise PreflightError(
            f"TRL's loss is not that of {name}, whose logits its fused head does not compute: {-trained.mean():.4f} "
            f"instead of {-own.mean():.4f} on the same tokens. {remedy}"
        )


@contextmanager
def _refusals(tell: Callable[[str, Exception], str]) -> Iterator[None]:
    """Make a `PreflightError` of what the model raises in the block, told by the error's kind and text, and itself."""
    try:
        yield
    except (PreflightError, *_NOT_THE_MODELS):
        raise
    except FloatingPointError as error:  # the probe's: no comparison with NaN would find anything
        raise PreflightError(str(error)) from error
    except _MODEL_ERRORS as error:
        raise PreflightError(tell(f"{type(error).__name__}: {error}", error)) from error


def _check_config(base: Any, text_config: PretrainedConfig, collator: SkipPositionDataCollator, skipped: bool) -> None:
    """Refuse what the config tells, and warn of what it limits."""
    if skipped:
        kind = _position_kind(base, text_config)
        if kind != "rotary":
            raise PreflightError(
                f"Positions can be skipped only where they are rotary, got {text_config.model_type!r} with {kind}. "
                "Set the strategy to 'none', or take a model with RoPE."
            )
        try:
            check_range(base.config, collator.target_length)
            check_rope_reached(base)
        except ValueError as error:
            raise PreflightError(str(error)) from error
    problem = exactness_problem(
        base.config,
        text_config._attn_implementation,
        packed=collator.padding_free,
        skipped=skipped,
        target_length=collator.target_length,
    )
    if problem is not None:
        raise PreflightError(problem)
    if skipped and has_recurrent_layers(base.config):
        logger.warning(
            "%r has recurrent layers (%s), which have no positions: skips act on its attention layers only.",
            text_config.model_type,
            _kinds(text_config),
        )
    if skipped and _slides_everywhere(text_config) and collator.target_length > text_config.sliding_window:
        logger.warning(
            "All attention layers of %r slide over %d positions: a skip of that size or more cuts a sample in two. "
            "Lower the target length, or take a model with full attention.",
            text_config.model_type,
            text_config.sliding_window,
        )


def _position_kind(base: Any, text_config: PretrainedConfig) -> str:
    """Return "rotary", or what the model has instead, in words."""
    attention_config = getattr(text_config, "attn_config", None)  # MPT
    if text_config.model_type == "bloom" or getattr(attention_config or text_config, "alibi", False):
        return "ALiBi, which counts tokens and reads no position ids"
    modules = dict(base.named_modules())
    rotary = any("rotary" in type(module).__name__.lower() for module in modules.values())
    if rotary or getattr(text_config, "rotary_dim", None):  # GPT-J and CodeGen rotate without a module
        return "rotary"
    for name, module in modules.items():
        leaf = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and (leaf == "wpe" or "position" in leaf):
            return f"learned absolute positions ({name})"
    return "no positions"


def _kinds(text_config: PretrainedConfig) -> str:
    return ", ".join(sorted(layer_kinds(text_config)))


def _slides_everywhere(text_config: PretrainedConfig) -> bool:
    return layer_kinds(text_config) <= {"sliding_attention"}


class _Judge:
    """Tells from the movements whether the model is right."""

    def __init__(self, probe: Probe, text_config: PretrainedConfig, skipped: bool) -> None:
        self.probe = probe
        self.skipped = skipped
        self.form = "a packed batch" if probe.collator.padding_free else "a padded batch"
        self.attention = f'"{text_config._attn_implementation}" attention ({_kinds(text_config)})'
        # Where every layer slides, none sees over a skip of a window or more, and rightly so.
        reaches_far = not _slides_everywhere(text_config) or probe.far_gap <= text_config.sliding_window - 2
        self.open_skips = (NEAR, FAR) if reaches_far else (NEAR,)

    def report(self) -> PreflightReport | None:
        probe = self.probe

        def refused(told: str, error: Exception) -> str:
            # A ValueError of the attention says all there is to say; what else a model raises needs its kind.
            return f"{self.attention} refused {self.form}: {error if isinstance(error, ValueError) else told}"

        with _refusals(refused):
            changes = probe.changes(probe.skipped() if self.skipped else probe.ordinary())
            if changes.reach == 0:
                return None
            if self.skipped or probe.collator.padding_free:
                self._check_leak(changes)
            if not self.skipped:
                self._check_alone(changes)
                return PreflightReport(changes.reach, changes.leak.movement / changes.reach)
            self._check_cut(changes)
            shift = self._check_shift(changes)
            stretch = self._check_stretch(changes)
        shares = (changes.leak.movement, changes.behind(NEAR), changes.behind(FAR), shift, stretch)
        return PreflightReport(changes.reach, *(share / changes.reach for share in shares))

    def _check_leak(self, changes: Changes) -> None:
        """What must not move does not, unless kernels depend on the whole batch; then it stays near `noise`."""
        if changes.noise > NOISE * changes.reach:
            raise PreflightError(
                f"Tokens see later ones: {self.attention} is not causal here. Load a causal language model, with its "
                "default attention."
            )
        leak = changes.leak
        if leak.movement > max(LEAK * changes.reach, 8 * changes.noise):
            raise PreflightError(
                f"Documents leak into each other: changing document {leak.changed} of {self.form} moved document "
                f"{leak.document} under {self.attention}. Hand the model `cu_seq_lens_q`, `cu_seq_lens_k`, "
                "`max_length_q` and `max_length_k` and no `attention_mask`, with "
                'attn_implementation="longalign_varlen" or flash attention; or set packing=False.'
            )

    def _check_alone(self, changes: Changes) -> None:
        """Some models give themselves other positions than a batch does, or take its padding for text."""
        moved = max(moved.median().item() for moved in movements(changes.base, self.probe.alone()))
        if moved <= SHIFT * changes.reach:
            return
        remedy = "packing=False"
        if not self.probe.collator.padding_free:
            remedy = "per_device_train_batch_size=1 and per_device_eval_batch_size=1, so that nothing is padded"
        raise PreflightError(
            f"A document in {self.form} is not what it is alone under {self.attention}: the model reads its place in "
            f"the batch, or the padding. Set {remedy}."
        )

    def _check_cut(self, changes: Changes) -> None:
        """A cut moves by exactly 0 behind it."""
        for document in self.open_skips:
            if changes.behind(document) <= max(CUT * changes.reach, 2 * changes.noise):
                raise PreflightError(
                    f"Attention is cut at skipped positions: in {self.form} under {self.attention}, a document at "
                    f"positions {self.probe.skipped()[document].tolist()} does not see over its skip. Hand padded "
                    "batches on with their `attention_mask`, packed ones with `cu_seq_lens_q` and "
                    'attn_implementation="longalign_varlen".'
                )

    def _check_shift(self, changes: Changes) -> float:
        """Rotations are rounded, in half precision to a few percent of `reach`; the median is blind to single tokens.

        That matters for mixtures of experts, where rounding may send a token to another expert.
        """
        moved = self.probe.movements(self.probe.shifted(), changes.base)
        shift = max(moved[document].median().item() for document in (NEAR, ORDINARY))
        if shift <= SHIFT * changes.reach:
            return shift
        leak = self.probe.changes(self.probe.shifted()).leak
        if leak.movement > LEAK * changes.reach:
            raise PreflightError(
                f"Document boundaries are taken from the position ids under {self.attention}: where not every "
                f"document begins at position 0, changing document {leak.changed} of {self.form} moved document "
                f'{leak.document}. Set attn_implementation="longalign_varlen", which takes them from `cu_seq_lens_q`.'
            )
        raise PreflightError(
            f"Positions are not relative: shifting all positions of a document by {self.probe.shift} changed it under "
            f"{self.attention}. Set the strategy to 'none', or take a model whose positions are rotary alone."
        )

    def _check_stretch(self, changes: Changes) -> float:
        """Where positions are ignored nothing moves; behind a cut only the rounding of rotations is seen."""
        stretch = self.probe.movements(self.probe.stretched(), changes.base)[NEAR].max().item()
        if stretch <= STRETCH * changes.reach:
            raise PreflightError(
                f"Position ids do not count: stretching a skip from {self.probe.gap} to {self.probe.stretched_gap} "
                f"positions changed nothing under {self.attention}. Set the strategy to 'none', or take a model that "
                "reads `position_ids`."
            )
        return stretch
