import json

import pytest


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SENTENCES = [
    "The dam below the village of Thornwick was finished in the autumn of 1912, two years after the first stone.",
    "Ada Lovell, who had drawn the plans, stood on the crest and watched the valley fill with water.",
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.",
    "You are given a report by a government agency. Write a one-page summary of the report.",
    "Congress passed the bill on Friday; the Senate will vote on it next week, the paper said.",
]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with a chat template, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 20 + [json.dumps(SENTENCES)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory):
    """The path of a random two-layer Llama with that tokenizer."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tiny")
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def path(tmp_path):
    """Where a journal goes."""
    return tmp_path / "deep" / "journal.sqlite"
