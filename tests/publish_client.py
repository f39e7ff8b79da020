"""What a user does, in a process of its own: load a data set back, train an adapter, push it and load it back."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import chat_dataset, tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer, publish_adapter
from hf_longalign.adapter import load_adapter
from hf_longalign.rope import scale_rope


CARD = "---\nlibrary_name: transformers\n---\n# A model of hf_longalign\n"


def load_rows(repo_id, folder):
    local = load_dataset("parquet", data_files=str(folder / "chat" / "train-*.parquet"), split="train").to_list()
    whole = load_dataset(repo_id, "chat", split="train").to_list()
    streamed = list(load_dataset(repo_id, "chat", split="train", streaming=True))
    return {"rows": len(local), "whole": whole == local, "streamed": streamed == local}


def push_base(folder, name, seed):
    tiny_llama(seed, max_position_embeddings=256).save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    (folder / name / "README.md").write_text(CARD)
    return publish_adapter(folder / name, f"user/{name}")


def train(folder):
    config = scale_rope(AutoConfig.from_pretrained(folder / "base"), 1024)
    arguments = LongAlignSFTConfig(
        output_dir=str(folder / "adapter"), max_steps=2, learning_rate=1.0, optim="sgd", max_length=128, packing=True,
        skip_target_length=1024, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = LongAlignSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "base", config=config),
        args=arguments,
        train_dataset=chat_dataset(8),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    (folder / "adapter" / "README.md").write_text(CARD)
    return trainer.model


def logits(model):
    ids, far = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 300, 1000]])
    with torch.no_grad():
        return (
            model.eval().to(torch.float32)(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=far).logits
        )


def load_models(folder):
    push_base(folder, "base", 0)
    push_base(folder, "other", 1)
    trained = train(folder)
    url = publish_adapter(folder / "adapter", "user/adapter", base_model="user/base")
    plain = AutoPeftModelForCausalLM.from_pretrained("user/adapter")
    present = get_peft_model_state_dict(plain)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    try:
        load_adapter("user/adapter", base_model="user/other")
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "url": url,
        "tensors": present.keys() == saved.keys() and all(torch.equal(present[name], saved[name]) for name in saved),
        "restored": torch.allclose(logits(load_adapter("user/adapter")), logits(trained), atol=1e-5),
        "plain_differs": not torch.allclose(logits(plain), logits(trained), atol=1e-3),
        "refused": refused,
        "tokenizer": AutoTokenizer.from_pretrained("user/adapter")("Ardel").input_ids,
    }


if __name__ == "__main__":
    rows_folder, folder = Path(sys.argv[1]), Path(sys.argv[2])
    time.sleep = lambda seconds: None  # the waits between attempts
    found = {**load_rows("user/rows", rows_folder), **load_models(folder)}
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    # Arrow's reading threads may still hold Python objects of the streamed files, and at an ordinary exit now and then
    # abort the process ("terminate called without an active exception").
    os._exit(0)
