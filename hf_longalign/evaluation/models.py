"""Who is examined: the models that the options name, loaded or served, and the tokenizer and config they share."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from hf_longalign.adapter import load_adapter, load_tokenizer, peft_config
from hf_longalign.evaluation.endpoint import EndpointGenerator
from hf_longalign.evaluation.generation import LocalGenerator, VLLMAnswers
from hf_longalign.evaluation.options import ModelOptions
from hf_longalign.evaluation.runner import Examinee, Generator
from hf_longalign.lazy import require
from hf_longalign.options import json_object
from hf_longalign.records.report import EvaluatedModel
from hf_longalign.records.training import TrainingRecord
from hf_longalign.rope import apply_rope, model_range, rope_record
from hf_longalign.run_record import RECORD_NAME, check_place, load_record, loaded_commit, model_file
from hf_longalign.serving import load_vllm, vllm_options


logger = logging.getLogger(__name__)

BASE, SCALED, ADAPTER = "base", "base, scaled RoPE", "adapter"
# Processes that a launcher such as torchrun has started; others may join.
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Examined:
    """The models under evaluation, the tokenizer and the config that all suites share."""

    options: ModelOptions
    tokenizer: Any
    config: Any
    model: Any  # `None` where a server or vLLM answers
    who: list[Examinee]

    @classmethod
    def load(cls, options: ModelOptions) -> "Examined":
        """Load what the options name; of a served model only its tokenizer and config.

        Raises:
            ValueError: a path to nothing, or an adapter of another base, revision, RoPE or tokenizer.
        """
        check_place("model", options.model)
        if options.adapter is not None:
            check_place("adapter", options.adapter, "adapter_config.json", options.adapter_revision)
        check_place("model", options.model, "config.json", base_revision(options))
        tokenizer = shared_tokenizer(options)
        # That of the base, by which tokenizers warn where RoPE is scaled: the range of every prompt is checked apart.
        tokenizer.model_max_length = VERY_LARGE_INTEGER
        if options.endpoint is not None:
            url = options.endpoint.split("@")[-1]  # without a login
            request: dict[str, Any] = {"api_key_env": options.api_key_env, "max_concurrency": options.max_concurrency}
            served = [(BASE, options.model), *([(ADAPTER, options.adapter)] if options.adapter else [])]
            who = [
                Examinee(
                    label,
                    f"{url}/{name}",
                    EndpointGenerator(name, options.endpoint, **request),
                    what=f"as served by {url}",
                )
                for label, name in served
            ]
            return cls(options, tokenizer, load_config(options), None, who)
        if options.generator == "vllm":
            if PROCESSES > 1:
                raise ValueError(
                    f"`generator` vllm must run in one process, got {PROCESSES}, which would share a GPU. Start it "
                    "without `accelerate launch`, with `--vllm_options '{\"tensor_parallel_size\": 8}'`."
                )
            config = load_config(options)
            return cls(options, tokenizer, config, None, vllm_examinees(options, tokenizer, config))
        model = load_model(options)
        # By the base as published scaling is told from training.
        plain = published_config(options) if options.adapter is not None else None
        answering = partial(LocalGenerator, model, tokenizer, batch_tokens=options.batch_tokens)
        how = {"quantised": options.load_in_4bit, "tokenizer": tokenizer_state(tokenizer)}
        who = examinees(model, answering, how, plain)
        return cls(options, tokenizer, model.config, model, who)

    @property
    def reach(self) -> int:
        """The range in tokens that all prompts stay within."""
        return model_range(self.config)

    def models(self) -> list[EvaluatedModel]:
        """Return what was asked, for the report; of a folder only its last part."""
        options, models = self.options, []
        for examinee in self.who:
            name, commit = options.model, getattr(self.config, "_commit_hash", None)
            if examinee.label == ADAPTER and options.adapter is not None:
                name = options.adapter
                commit = loaded_commit(name, "adapter_config.json", options.adapter_revision)
            models.append(EvaluatedModel(examinee.label, public_name(name), commit, examinee.what))
        return models


def public_name(name: str) -> str:
    """Return a Hub id as it is, of a path of this machine its last part: reports are published."""
    return Path(name).resolve().name if Path(name).exists() else name


def load_model(options: ModelOptions) -> PreTrainedModel | PeftModel:
    """Load a model, or an adapter on its base with the RoPE it was trained with.

    Raises:
        ValueError: the adapter was trained on another base, revision or RoPE.
    """
    bits: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    how: dict[str, Any] = {
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
        "quantization_config": BitsAndBytesConfig(**bits) if options.load_in_4bit else None,
        "device_map": _place(),
    }
    revision, adapter, of_adapter = base_revision(options), options.adapter, options.adapter_revision
    if adapter is not None and record_of(adapter, of_adapter):
        return load_adapter(
            adapter, base_model=options.model, revision=of_adapter, base_revision=revision, **how
        ).eval()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, revision=revision, **how)
    if adapter is not None:
        # Trained elsewhere: it goes on, for most such adapters never had their RoPE changed.
        logger.warning("%s has no record of its training: whether it had this RoPE cannot be told.", adapter)
        model = PeftModel.from_pretrained(model, adapter, revision=of_adapter)
    return model.eval()


def _place() -> Any:
    """Where a model goes: one process spreads it over all GPUs; of several, each holds a whole one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if PROCESSES == 1:
        return "auto" if torch.cuda.is_available() else {"": accelerator or "cpu"}
    number = int(os.environ.get("LOCAL_RANK", 0))
    if accelerator:
        torch.accelerator.set_device_index(number)  # kernels run on the current device
    return {"": torch.device(accelerator.type, number) if accelerator else "cpu"}


def published_config(options: ModelOptions) -> PretrainedConfig:
    """Return the config of the model, of an adapter its base, as it was published."""
    where = {"revision": base_revision(options), "trust_remote_code": options.trust_remote_code}
    return AutoConfig.from_pretrained(options.model, **where)


def load_config(options: ModelOptions) -> PretrainedConfig:
    """Return the config of a model that is served, with the RoPE its adapter was trained with; see [`load_model`]."""
    config, record = published_config(options), record_of(options.adapter, options.adapter_revision)
    return apply_rope(record.rope, config) if record else config


def base_revision(options: ModelOptions) -> str | None:
    """Return the revision of a base: the one given, else the one its adapter names.

    Raises:
        ValueError: the adapter was trained on another base or revision.
    """
    model, revision = options.model, options.model_revision
    if options.adapter is None:
        return revision
    config = peft_config(options.adapter, options.adapter_revision)
    record, named = record_of(options.adapter, options.adapter_revision), config.base_model_name_or_path
    # Where the record tells the base by its weights, the name may differ.
    if named and named != model and not (record and record.base_weights):
        raise ValueError(
            f"`model` must be the base of the adapter, {named!r}, got {model!r}. Set `--model {named}`, or train the "
            "adapter with `LongAlignSFTTrainer`, whose record tells its base by the weights."
        )
    if revision is not None and config.revision is not None and revision != config.revision:
        raise ValueError(
            f"`model_revision` must be the adapter's, {config.revision!r}, got {revision!r}. Leave it out."
        )
    return revision or (config.revision if model == named else None)


def record_of(adapter: str | None, revision: str | None = None) -> TrainingRecord | None:
    """Return the training record of an adapter; `None` where it has none."""
    if adapter is None or model_file(adapter, RECORD_NAME, revision) is None:
        return None
    return load_record(adapter, revision)


def shared_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer that base and adapter are both asked with.

    Raises:
        ValueError: the adapter's tokenizer or chat template is another than the base's, and none was chosen.
    """
    model, adapter = options.model, options.adapter
    remedy = "Set `tokenizer` to the folder or Hub id of the one that all are asked with."
    load = partial(load_tokenizer, remedy=remedy, trust_remote_code=options.trust_remote_code)
    if options.tokenizer is not None:
        return load("tokenizer", options.tokenizer)
    of_base = load("model", model, revision=base_revision(options))
    if adapter is None or model_file(adapter, "tokenizer_config.json", options.adapter_revision) is None:
        return of_base  # none was saved with the adapter
    of_adapter = load("adapter", adapter, revision=options.adapter_revision)
    # Compared by content, not by file: saving writes the same tokenizer in other words.
    for what, one, other in (
        ("chat template", of_base.chat_template, of_adapter.chat_template),
        ("vocabulary", of_base.get_vocab(), of_adapter.get_vocab()),
    ):
        if one != other:
            raise ValueError(
                f"Base and adapter must be asked identical prompts, got another {what} with {adapter} than with "
                f"{model}. Set `--tokenizer {adapter}` (or {model}) to ask both with the same one."
            )
    return of_base


def examinees(
    model: PreTrainedModel | PeftModel,
    answering: Callable[[], Generator],
    settings: dict[str, Any],
    plain: PretrainedConfig | None = None,
) -> list[Examinee]:
    """Return what is evaluated: the model, or base and adapter, which share the weights in memory.

    Args:
        model: as loaded.
        answering: makes a generator that answers for it; each examinee has its own, which counts what it reads.
        settings: whatever else shapes the answers, JSON-able.
        plain: the base's config as published; `None`: the model's own.
    """
    published: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = weights_of(published.config._name_or_path, published.config)
    base_identity = identity_of({"weights": weights, "dtype": str(published.dtype), **settings})
    if not isinstance(model, PeftModel):
        return [Examinee(BASE, base_identity, answering(), what="the model")]
    # An adapter is small, and often trained again into the same folder: its weights themselves are hashed.
    state = hashlib.sha256(_json(model.active_peft_config.to_dict()).encode())
    for name, weight in sorted(get_peft_model_state_dict(model).items()):
        state.update(name.encode())
        state.update(weight.detach().float().cpu().numpy().tobytes())
    adapter_identity = identity_of({"base": base_identity, "adapter": state.hexdigest()})
    adapter = Examinee(ADAPTER, adapter_identity, answering(), what="the base with the adapter, as trained")
    base = Examinee(BASE, base_identity, answering(), model.disable_adapter, what="the base without the adapter")
    if plain is None or rope_record(plain) == rope_record(model.config):
        return [base, adapter]

    # Scaling alone changes a model, on short texts for the worse: what it does must not be put down to the training,
    # nor hidden by it. So there are three.
    @contextmanager
    def as_published() -> Iterator[None]:
        with model.disable_adapter(), other_rope(model, plain):
            yield

    plain_identity = identity_of({"base": base_identity, "rope": rope_record(plain).to_json()})
    base.label, base.what = SCALED, "the base without the adapter, with the RoPE scaling it was trained with"
    return [
        Examinee(BASE, plain_identity, answering(), as_published, what="the base as published, RoPE not scaled"),
        base,
        adapter,
    ]


def vllm_examinees(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> list[Examinee]:
    """Return the base, and the adapter beside it on the same weights in memory.

    Where the adapter was trained with scaled RoPE, the base has that RoPE too, and is called so: vLLM has one RoPE
    for all that it holds. The base as published is a run of its own, without the adapter.

    `config` is that of the model with the RoPE of the adapter.
    """
    require("vllm", "vllm")  # missing is told now, and not when all prompts are made
    given, revision = json_object("vllm_options", options.vllm_options), base_revision(options)
    more: dict[str, Any] = {"dtype": options.dtype, "revision": revision, **given}
    if options.trust_remote_code:
        more["trust_remote_code"] = True
    engine = cache(partial(load_vllm, options.model, options.adapter, **more))
    weights, state = weights_of(options.model, config), tokenizer_state(tokenizer)
    identity = identity_of({"engine": "vllm", "options": more, "weights": weights, "tokenizer": state})
    if options.adapter is None:
        return [Examinee(BASE, identity, VLLMAnswers(engine, tokenizer), what="the model, by vLLM")]
    vllm_options(options.adapter)  # refuses what vLLM would compute in another way, before anything is asked
    scaled = rope_record(published_config(options)) != rope_record(config)
    what = "the base without the adapter, by vLLM" + (", with the RoPE scaling it was trained with" if scaled else "")
    commit = loaded_commit(options.adapter, "adapter_config.json")
    adapter = identity_of([identity, options.adapter, commit, files_of(options.adapter)])
    return [
        Examinee(SCALED if scaled else BASE, identity, VLLMAnswers(engine, tokenizer), what=what),
        Examinee(
            ADAPTER, adapter, VLLMAnswers(engine, tokenizer, adapted=True), what="the base with the adapter, by vLLM"
        ),
    ]


@contextmanager
def other_rope(model: torch.nn.Module, config: PretrainedConfig) -> Iterator[None]:
    """Let a model turn its queries and keys by another config's RoPE for a while, and nothing else be changed."""
    # Rotary embeddings are the only modules that hold frequencies, and transformers builds each from the config alone.
    found = {
        name: module
        for name, module in model.named_modules()
        if "rotary" in type(module).__name__.lower() and hasattr(module, "config")
    }
    text = config.get_text_config()
    try:
        for name, module in found.items():
            device = next((buffer.device for buffer in module.buffers()), None)
            model.set_submodule(name, type(module)(text).to(device))
        yield
    finally:
        for name, module in found.items():
            model.set_submodule(name, module)


def weights_of(name: str, config: PretrainedConfig) -> dict[str, Any]:
    """Return what tells a base from any other: the commit of the Hub, or the state of its files, and its RoPE."""
    # Hashing the weights themselves would read 140 GB of a 70B model at every start.
    commit, rope = getattr(config, "_commit_hash", None), rope_record(config).to_json()
    return {"name": name, "commit": commit, "files": files_of(name), "rope": rope}


def files_of(source: str) -> list[list[Any]]:
    """Return what tells the weights and settings in a folder from any others; nothing of a Hub id."""
    kinds = ("*.safetensors", "*.bin", "*.pt", "*config.json")
    files = sorted(path for kind in kinds for path in Path(source).glob(kind))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what tells a tokenizer from any other: prompts are stored as text, and answers with them."""
    # Some tokenizers with code of their own have bytes as words, which JSON has not.
    words = sorted((str(word), number) for word, number in tokenizer.get_vocab().items())
    return identity_of([tokenizer.chat_template, words, tokenizer("a")["input_ids"]])


def identity_of(value: Any) -> str:
    """Return the digest of a JSON-able value, 16 hexadecimal digits."""
    return hashlib.sha256(_json(value).encode()).hexdigest()[:16]


def _json(value: Any) -> str:
    # The order of a set, such as `target_modules`, differs from one process to the next.
    return json.dumps(
        value, sort_keys=True, default=lambda other: sorted(other) if isinstance(other, set) else str(other)
    )
