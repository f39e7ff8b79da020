"""Tiny tokenizers, models and data made on the fly: what the tests train instead of downloading."""

from functools import lru_cache

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TOWNS = ["Ardel", "Bemo", "Cato", "Dunra", "Ekest", "Fallo", "Gorin", "Hessle", "Ilva", "Jorn"]
GOODS = ["salt", "wool", "glass", "copper", "honey", "timber", "paper", "silk", "tin", "rope"]


def chats(n: int, turns: int = 2) -> list[list[dict[str, str]]]:
    """Short conversations about what towns sell, of `turns` questions each, all different."""
    rows = []
    for index in range(n):
        messages = []
        for turn in range(turns):
            town, good = TOWNS[(index + turn) % 10], GOODS[(index * 3 + turn) % 10]
            messages += [
                {"role": "user", "content": f"In year {index}, {town} sold {good} at the fair. What did {town} sell?"},
                {"role": "assistant", "content": f"{town} sold {good}, {index % 7 + 1} carts of it."},
            ]
        rows.append(messages)
    return rows


def chat_dataset(n: int = 16, turns: int = 2) -> Dataset:
    return Dataset.from_list([{"messages": messages} for messages in chats(n, turns)])


def hotpot_rows(number):
    """Rows with the columns of hotpotqa/hotpot_qa, "distractor"."""
    for n in range(number):
        titles = [f"Town {n}", f"Mill {n}", f"Road {n}", f"Lake {n}"]
        facts = [f"Town {n} sold ware {n}.", f"Mill {n} is in town {n}.", f"Road {n} is long.", f"Lake {n} is deep."]
        yield {
            "id": str(n),
            "question": f"What did the town of mill {n} sell?",
            "answer": f"ware {n}",
            "type": "bridge",
            "level": "easy",
            "supporting_facts": {"title": titles[:2], "sent_id": [0, 0]},
            "context": {"title": titles, "sentences": [[fact, " It was so."] for fact in facts]},
        }


@lru_cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([m["content"] for messages in chats(40) for m in messages], trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), pad_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "bos_token_id": None,
            **overrides,
        }
    )
    return LlamaForCausalLM(config)
