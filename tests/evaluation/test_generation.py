"""Answers of `LocalGenerator` are those of naive greedy `generate`, one prompt at a time, token for token."""

import random
from functools import lru_cache

import numpy as np
import pytest
import torch
from families import FAMILIES, HYBRIDS, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_longalign.attention import register_attention
from hf_longalign.evaluation.generation import LocalGenerator, Pools
from hf_longalign.evaluation.prefix_cache import branch_points, reading_order, shared_lengths
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.rope import scale_rope


END = 2
LENGTHS, DEPTHS = (20, 46, 70), (0.0, 0.4, 1.0)


@lru_cache
def number_tokenizer() -> PreTrainedTokenizerFast:
    """Token 7 is the word "7"; 0 pads and 2 ends."""
    vocabulary = {str(i): i for i in range(32) if i not in (0, END)} | {"<pad>": 0, "<end>": END}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


@lru_cache
def talking_model(family, attention="eager"):
    """A random model whose answers depend on the prompt: tied embeddings would repeat the last token."""
    model_class = type(tiny_model(family))
    config = tiny_config(family)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("sinks"):
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def needle_grid(max_new_tokens=8, seed=0):
    """Prompts over lengths and depths of one haystack, with random needles and one question, shuffled."""
    rng = random.Random(seed)

    def draw(n):
        return [rng.randrange(3, 32) for _ in range(n)]

    haystack, prompts = draw(100), []
    for length in LENGTHS:
        for depth in DEPTHS:
            cut = round(depth * length)
            ids = haystack[:cut] + draw(rng.randrange(3, 6)) + haystack[cut:length] + [7, 8]
            prompts.append(prompt_of(ids, max_new_tokens, length=length, depth=depth))
    rng.shuffle(prompts)
    return prompts


def prompt_of(ids, max_new_tokens=8, **fields):
    return Prompt("needle", "single", 0, " ".join(map(str, ids)), ("a",), max_new_tokens, chat=False, **fields)


def naive(model, prompt):
    """The tokens `generate` gives for the prompt alone."""
    ids = torch.tensor([[int(word) for word in prompt.text.split()]])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=prompt.max_new_tokens, eos_token_id=END),
        pad_token_id=0,
    )
    return output[0, ids.shape[1] :].tolist()


def answers(model, prompts, whole=True, **options):
    """The text and number of tokens of each prompt's answer, in the order of the prompts, and the generator."""
    generator = LocalGenerator(model, number_tokenizer(), **options)
    generator._whole, generator._chunk = whole, 16  # several pieces a prompt
    found = {prompt.key: completion for prompt, completion in generator.generate(prompts)}
    assert len(found) == len({prompt.key for prompt in prompts})
    return [(found[prompt.key].text, found[prompt.key].tokens) for prompt in prompts], generator


def naive_answers(model, prompts):
    tokens = [naive(model, prompt) for prompt in prompts]
    return [(" ".join(str(token) for token in row if token not in (0, END)), len(row)) for row in tokens]


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_answers_are_those_of_generate(family):
    model, prompts = talking_model(family), needle_grid()
    found, generator = answers(model, prompts, batch_tokens=300)
    assert found == naive_answers(model, prompts)
    assert len(set(found)) > 2  # a model that always says the same would prove little
    # The cache of Gemma 4, whose last layers have no keys of their own, is not cut: its prompts are read whole.
    assert (generator.stats.cached_tokens > 50) == (family in FAMILIES and family != "gemma4")


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "longalign_varlen"])
@pytest.mark.parametrize("whole", [True, False])
def test_attentions(family, attention, whole):
    register_attention()
    prompts = needle_grid(seed=1)
    found, generator = answers(talking_model(family, attention), prompts, whole, batch_tokens=300)
    assert found == naive_answers(talking_model(family, attention), prompts)
    assert generator.stats.cached_tokens > 50


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_any_batch_gives_the_same(family, batch_tokens):
    prompts = [*needle_grid(max_new_tokens=5), *needle_grid(max_new_tokens=12, seed=2), prompt_of([5]), prompt_of([5])]
    model = talking_model(family)
    found, generator = answers(model, prompts, batch_tokens=batch_tokens)
    assert found == naive_answers(model, prompts)
    assert generator.stats.cached_tokens > 0


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_rows_of_a_padded_batch_end_at_different_times(family):
    rng = random.Random(0)
    prompts = [
        prompt_of([rng.randrange(3, 32) for _ in range(66 - room + index % 3)], room)
        for index, room in enumerate([3, 12, 5, 9, 2, 11, 1, 4])
    ]
    found, _ = answers(talking_model(family), prompts, batch_tokens=10_000)
    assert found == naive_answers(talking_model(family), prompts)


def test_prompts_are_told_as_they_are_read_before_their_batch_is_answered():
    generator, prompts, read = LocalGenerator(talking_model("llama"), number_tokenizer()), needle_grid(), []
    generator.on_read = read.append
    answers = generator.generate(prompts)
    next(answers)
    assert {id(prompt) for prompt in read} == {id(prompt) for prompt in prompts}
    assert len(read) == len(list(answers)) + 1 == len(prompts)


def test_what_is_shared_is_computed_once():
    prompts = needle_grid()
    sequences = [tuple(map(int, prompt.text.split())) for prompt in prompts]
    computed = []
    model = talking_model("llama")
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        _, generator = answers(model, prompts, batch_tokens=10_000)
    finally:
        hook.remove()
    beginnings = {ids[: i + 1] for ids in sequences for i in range(len(ids))}  # every node of the tree of prompts
    read = generator.stats.prompt_tokens - generator.stats.cached_tokens
    assert read == len(beginnings)
    assert generator.stats.prompt_tokens == sum(map(len, sequences))
    assert sum(length for rows, length in computed if length > 1) <= read
    # Answers are written together: their forwards hold several rows.
    assert max(rows for rows, length in computed if length == 1) >= 3
    assert generator.stats.generated_tokens == sum(tokens for _, tokens in naive_answers(model, prompts))
    assert generator.stats.seconds > 0


def test_adapters_on_and_off():
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config("llama")).eval()
    with torch.no_grad():
        for weight in base.parameters():
            weight.copy_(0.3 * torch.randn_like(weight))
    plain = naive_answers(base, needle_grid())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn_like(weight))
    adapted, generator = answers(model, needle_grid(), batch_tokens=300)
    assert adapted == naive_answers(model, needle_grid()) != plain
    with model.disable_adapter():
        found = {prompt.key: completion for prompt, completion in generator.generate(needle_grid())}
    assert [(found[prompt.key].text, found[prompt.key].tokens) for prompt in needle_grid()] == plain


def test_adapters_that_look_at_the_text_go_one_by_one(caplog):
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config("llama")).eval()
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    prompts = needle_grid()
    found, generator = answers(model, prompts)
    assert found == naive_answers(model, prompts)
    assert generator.stats.cached_tokens == 0 and "PROMPT_TUNING" in caplog.text
    alora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8])
    model = get_peft_model(LlamaForCausalLM(tiny_config("llama")), alora).eval()
    assert answers(model, prompts[:2])[1].stats.cached_tokens == 0


def test_rope_that_depends_on_the_length_goes_one_by_one():
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.max_position_embeddings = 32
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(scale_rope(config, 256, "dynamic")).eval()
    prompts = [p for one in needle_grid() if one.length > 20 for p in (prompt_of([3, 11, 5] * 70), one)]
    found, generator = answers(model, prompts)
    alone = []
    for prompt in prompts:
        fresh = LlamaForCausalLM(model.config).eval()  # "dynamic" remembers the longest text it has seen
        fresh.load_state_dict(model.state_dict())
        alone += naive_answers(fresh, [prompt])
    assert found == alone
    assert generator.stats.cached_tokens == 0


def test_an_answer_ends_at_stop_texts_and_at_every_end_token():
    model = talking_model("llama")
    starts = ([first, 9, 14, 5] for first in range(3, 32))
    ids = next(ids for ids in starts if not {0, END} & set(naive(model, prompt_of(ids, 10))))
    tokens = naive(model, prompt_of(ids, 10))
    words = [str(token) for token in tokens]
    third = next(i for i in range(2, 10) if words[i] not in " ".join(words[:i]))
    stop = prompt_of(ids, 10, stop=("none such", words[third]))
    before = " ".join(words[:third])
    assert answers(model, [stop])[0][0][0].startswith(before)
    assert answers(model, [stop])[0][0][0].strip() == before
    assert answers(model, [stop])[0][0][1] == third + 1
    assert answers(model, [prompt_of(ids, 3)])[0] == [(" ".join(words[:3]), 3)]
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[END, tokens[third]])
    try:
        assert answers(model, [prompt_of(ids, 10)])[0] == [(before, third + 1)]
    finally:
        model.generation_config = own


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_penalties_of_the_generation_config_do_not_count(family):
    model, prompts = tiny_model(family), needle_grid()[:3]
    expected = naive_answers(model, prompts)
    own = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=5.0, temperature=0.7, do_sample=True)
    try:
        assert answers(model, prompts)[0] == expected
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own


class Memory:
    """A GPU that is out of memory when a forward's tokens, those of the cache included, exceed `most`."""

    def __init__(self, model, most, longest_piece=10_000):
        self.most, self.longest_piece, self.failures = most, longest_piece, 0
        self.hook = model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs):
        rows, length = kwargs["input_ids"].shape
        held = kwargs["past_key_values"].get_seq_length()
        if rows * (held + length) > self.most or length > self.longest_piece:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def test_out_of_memory_halves_the_batches_and_loses_nothing(caplog):
    model, prompts = talking_model("llama"), needle_grid()
    expected = naive_answers(model, prompts)
    with Memory(model, most=170) as memory:
        found, generator = answers(model, prompts, batch_tokens=10_000)
    assert memory.failures and found == expected
    assert 0 < generator.batch_tokens < 350 and "going on with `batch_tokens=" in caplog.text


def test_out_of_memory_on_a_whole_prompt_reads_it_in_pieces_and_keeps_the_batches(caplog):
    model, prompts = talking_model("llama"), needle_grid()
    expected = naive_answers(model, prompts)
    with Memory(model, most=10_000, longest_piece=16) as memory:
        found, generator = answers(model, prompts, batch_tokens=300)
    assert memory.failures == 1 and found == expected
    assert generator.batch_tokens == 300 and "read in pieces of 16 tokens" in caplog.text


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("mistral_window", "sdpa")])
def test_what_would_need_a_whole_mask_is_read_in_pieces(family, attention):
    model, prompts = talking_model(family, attention), needle_grid()
    expected, lengths = naive_answers(model, prompts), []
    generator = LocalGenerator(model, number_tokenizer())
    generator._chunk = 16
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = {prompt.key: completion for prompt, completion in generator.generate(prompts)}
    hook.remove()
    assert max(lengths) == 16
    assert [(found[prompt.key].text, found[prompt.key].tokens) for prompt in prompts] == expected


def test_out_of_memory_while_reading_reads_in_smaller_pieces():
    prompts = [prompt_of([5] * 200, 4), prompt_of([6] * 30, 4)]
    model = tiny_llama(max_position_embeddings=4096, vocab_size=32)
    expected = naive_answers(model.eval(), prompts)
    generator = LocalGenerator(model, number_tokenizer(), batch_tokens=100)
    generator._chunk = 1024
    with Memory(model, most=10_000, longest_piece=128):
        with pytest.raises(torch.OutOfMemoryError, match="204 tokens"):
            list(generator.generate(prompts))
        generator._chunk = 100
        found = {prompt.key: completion.text for prompt, completion in generator.generate(prompts)}
    assert [found[prompt.key] for prompt in prompts] == [text for text, _ in expected]


def test_what_was_answered_before_memory_ran_out_stays():
    model, prompts = talking_model("llama"), [prompt_of([9] * 200, 4), prompt_of([5] * 20, 4)]
    generator = LocalGenerator(model, number_tokenizer(), batch_tokens=1)
    done = []
    with Memory(model, most=100), pytest.raises(torch.OutOfMemoryError, match="must fit into memory alone"):
        done += (prompt for prompt, _ in generator.generate(prompts))
    assert done == [] or done == [prompts[1]]


def test_the_model_is_left_as_it_was():
    model = tiny_llama(vocab_size=32).train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    generator = LocalGenerator(model, number_tokenizer())
    for _ in generator.generate(needle_grid()):
        assert not model.training and not torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == flags
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert list(generator.generate([])) == []


def test_chat_prompts_go_through_the_template():
    model, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    prompt = Prompt("needle", "single", 0, "What did Ardel sell?", ("salt",), 6)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    expected = model.generate(input_ids=ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    ((_, completion),) = LocalGenerator(model, tokenizer).generate([prompt])
    assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_prompts_beyond_the_range_are_refused_before_anything_is_generated():
    model = talking_model("llama")
    long = prompt_of([5] * 250, 7)
    with pytest.raises(ValueError, match=r"`length` must be at most 256, .* got 257\. .*scale_rope"):
        next(LocalGenerator(model, number_tokenizer()).generate([prompt_of([5]), long]))
    with pytest.raises(ValueError, match="must have a token"):
        next(LocalGenerator(model, number_tokenizer()).generate([prompt_of([])]))


words = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=8)


@given(words)
def test_the_reading_order_reads_every_shared_beginning_once(lists):
    arrays = [np.array(ids, dtype=np.int32) for ids in lists]
    ordered = [arrays[i] for i in reading_order(arrays)]
    shared = shared_lengths(ordered)
    nodes = {tuple(ids[: i + 1]) for ids in lists for i in range(len(ids))}
    whole_again = sum(
        any(np.array_equal(ids, other) for other in ordered[:i]) for i, ids in enumerate(ordered)
    )  # its last token is read again
    assert sum(ids.size for ids in ordered) - sum(shared) == len(nodes) + whole_again
    for index in range(len(ordered)):
        points = branch_points(shared, index)
        for later in range(index + 1, len(ordered)):
            common = min(shared[index + 1 : later + 1])
            assert np.array_equal(ordered[index][:common], ordered[later][:common])
            assert not common or common in points


@given(st.lists(st.integers(1, 500), max_size=30), st.integers(1, 2000))
def test_pools_hand_out_everything_once_within_the_budget(sizes, batch_tokens):
    pools = Pools(batch_tokens)
    batches = [batch for number, size in enumerate(sizes) for batch in pools.add(number, size)] + pools.empty()
    assert sorted(number for batch in batches for number in batch) == list(range(len(sizes)))
    for batch in batches:
        largest = max(sizes[number] for number in batch)
        assert len(batch) == 1 or len(batch) * largest <= batch_tokens
        assert min(sizes[number] for number in batch) >= largest / 1.2
