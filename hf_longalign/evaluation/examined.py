"""Who is examined: the models that the options name, loaded or served, with the tokenizer and config all share."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from hf_longalign.evaluation.endpoint import EndpointGenerator
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.models import (
    ADAPTER,
    BASE,
    base_revision,
    check_there,
    examinees,
    load_config,
    load_model,
    load_tokenizer,
)
from hf_longalign.evaluation.options import ModelOptions
from hf_longalign.evaluation.runner import Examinee
from hf_longalign.evaluation.vllm import vllm_examinees
from hf_longalign.records.report import EvaluatedModel
from hf_longalign.rope import model_range
from hf_longalign.run_record import loaded_commit


# Processes that a launcher such as torchrun has started; others may join.
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Examined:
    """The models under evaluation, the tokenizer and the config that all suites share."""

    options: ModelOptions
    tokenizer: Any
    config: Any
    model: Any
    who: list[Examinee]

    def __post_init__(self) -> None:
        # The base's, of which tokenizers warn where RoPE is scaled: the range of every prompt is checked apart.
        self.tokenizer.model_max_length = VERY_LARGE_INTEGER

    @classmethod
    def load(cls, options: ModelOptions) -> "Examined":
        """Load what the options name; of a served model only its tokenizer and config."""
        check_there(model=options.model, adapter=options.adapter, tokenizer=options.tokenizer)
        revision = base_revision(options.model, options.adapter, options.model_revision, options.adapter_revision)
        remote = {"trust_remote_code": options.trust_remote_code}
        where: dict[str, Any] = {"adapter": options.adapter, "revision": revision, **remote}
        where["adapter_revision"] = options.adapter_revision
        tokenizer = load_tokenizer(options.model, tokenizer=options.tokenizer, **where)
        if options.endpoint is not None:
            config, url = load_config(options.model, **where), options.endpoint.split("@")[-1]  # without a login
            request: dict[str, Any] = {"api_key_env": options.api_key_env, "max_concurrency": options.max_concurrency}
            who = [
                Examinee(
                    label,
                    f"{url}/{name}",
                    EndpointGenerator(name, options.endpoint, **request),
                    what=f"as served by {url}",
                )
                for label, name in ((BASE, options.model), (ADAPTER, options.adapter))
                if name is not None
            ]
            return cls(options, tokenizer, config, None, who)
        if options.generator == "vllm":
            if PROCESSES > 1:
                raise ValueError(
                    f"`generator` vllm must run in one process, got {PROCESSES}, which would share a GPU. Start it "
                    "without `accelerate launch`, with `--vllm_options '{\"tensor_parallel_size\": 8}'`."
                )
            config = load_config(options.model, **where)
            return cls(options, tokenizer, config, None, vllm_examinees(options, tokenizer, config, revision))
        bits: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        model = load_model(
            options.model,
            **where,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            quantization_config=BitsAndBytesConfig(**bits) if options.load_in_4bit else None,
            device_map=place(),
        )
        generator = LocalGenerator(model, tokenizer, batch_tokens=options.batch_tokens)
        plain = AutoConfig.from_pretrained(options.model, revision=revision, **remote) if options.adapter else None
        who = examinees(model, generator, {"quantised": options.load_in_4bit}, plain)
        for examinee in who[1:]:  # each counts what it reads and writes for itself
            examinee.generator = LocalGenerator(model, tokenizer, batch_tokens=options.batch_tokens)
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


def place() -> Any:
    """Return where a model goes: one process spreads it over all GPUs; of several, each holds a whole one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if PROCESSES == 1:
        return "auto" if torch.cuda.is_available() else {"": accelerator or "cpu"}
    number = int(os.environ.get("LOCAL_RANK", 0))
    if accelerator:
        torch.accelerator.set_device_index(number)  # kernels run on the current device
    return {"": torch.device(accelerator.type, number) if accelerator else "cpu"}


def public_name(name: str) -> str:
    """Return a Hub id as it is, of a path of this machine its last part: reports are published."""
    return Path(name).resolve().name if Path(name).exists() else name
