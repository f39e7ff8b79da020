"""Losses by position are those of a plain forward over each window, for models read in pieces and for all others."""

import numpy as np
import pytest
import torch
from families import tiny_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from hf_longalign.evaluation import perplexity
from hf_longalign.evaluation.perplexity import PerplexitySuite, perplexity_by_position, position_edges


def document(length, seed=0):
    return np.random.default_rng(seed).integers(3, 32, length)


def naive_loss(model, documents, window, stride, edges, bos=None):
    """Mean loss and number of tokens of each bin, token by token from full logits."""
    found = [[] for _ in edges[1:]]
    for ids in documents:
        text = window if bos is None else window - 1
        for start in range(0, len(ids), stride):
            content = ids[start : start + text]
            if len(content) < text and start > 0:
                continue
            tokens = torch.tensor([[bos, *content] if bos is not None else [*content]])
            with torch.no_grad():
                likelihoods = model(tokens).logits[0].double().log_softmax(-1)
            for place in range(1, tokens.shape[1]):
                loss = -likelihoods[place - 1, tokens[0, place]].item()
                (one,) = (i for i in range(len(edges) - 1) if edges[i] <= place < edges[i + 1])
                found[one].append(loss)
    return [np.mean(losses) for losses in found], [len(losses) for losses in found]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(perplexity, "_CHUNK", 7)
    monkeypatch.setattr(perplexity, "_ROWS", 3)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt_oss", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("bos", [None, 1])
def test_losses_are_those_of_a_plain_forward(family, bos, small_pieces):
    # Longer than the window, as long, and shorter: the last is read whole.
    model, documents = tiny_model(family), [document(90), document(40, seed=1), document(23, seed=2)]
    options = {"window": 40, "stride": 15}
    found = perplexity_by_position(model, documents, **options, bos_token_id=bos)
    nll, counts = naive_loss(model, documents, *options.values(), position_edges(40), bos=bos)
    assert found.counts.tolist() == counts
    np.testing.assert_allclose(np.log(found.perplexity), nll, rtol=1e-4)


def test_the_whole_window_is_never_in_the_logits(small_pieces):
    model, most = tiny_model("llama"), []
    hook = model.register_forward_hook(lambda module, inputs, output: most.append(output.logits.shape[1]))
    try:
        perplexity_by_position(model, [document(100)], window=100, stride=100)
    finally:
        hook.remove()
    assert max(most) == 7 and sum(most) == 100


def test_an_adapter_on_and_off():
    torch.manual_seed(0)
    base = tiny_llama(vocab_size=32)
    before = perplexity_by_position(base, [document(60)], window=60, stride=60).sums
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    flags = [module.training for module in model.modules()]
    after = perplexity_by_position(model, [document(60)], window=60, stride=60).sums
    with model.disable_adapter():
        np.testing.assert_array_equal(perplexity_by_position(model, [document(60)], window=60, stride=60).sums, before)
    assert np.abs(after - before).max() > 1e-3
    assert [module.training for module in model.modules()] == flags


def test_half_precision_is_summed_in_float32():
    model = tiny_llama(vocab_size=32).to(torch.bfloat16).eval()
    ids = document(50)
    found = perplexity_by_position(model, [ids], window=50, stride=50)
    logits = model(torch.tensor(ids)[None]).logits[0, :-1].float()
    assert logits.dtype == torch.float32 and model.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    assert found.sums.sum() / found.counts.sum() == pytest.approx(expected.item(), rel=1e-5)


def test_positions_without_tokens_have_no_perplexity():
    found = perplexity_by_position(tiny_model("llama"), [document(10)], window=40, stride=40)
    empty = found.counts == 0
    assert found.counts.sum() == 9 and empty.any()
    assert np.isnan(found.perplexity[empty]).all() and (found.perplexity[~empty] > 1).all()


def test_any_documents_in_any_number_are_read():
    model = tiny_model("llama")
    empty = perplexity_by_position(model, [[], [5]], window=16, stride=8)
    assert empty.counts.sum() == 0 and np.isnan(empty.perplexity).all()
    many = perplexity_by_position(model, [document(3, seed) for seed in range(50)], window=16, stride=8)
    assert many.counts.sum() == 100 and np.isnan(many.perplexity[-1])
    tokenizer, texts = tiny_tokenizer(), [f"Ardel sold salt in year {year}." for year in range(40)]
    suite = PerplexitySuite(model, tokenizer, iter(texts), window=64, limit=None)
    joined = tokenizer("".join(text + "\n\n" for text in texts), add_special_tokens=False)["input_ids"]
    assert np.concatenate(suite.documents).tolist() == joined
    assert [len(ids) >= 64 for ids in suite.documents[:-1]] == [True] * (len(suite.documents) - 1)
    assert len(PerplexitySuite(model, tokenizer, iter(texts), window=64, limit=3).documents) == 3
    (short,) = PerplexitySuite(model, tokenizer, texts[:1], window=64).documents
    assert 1 < len(short) < 64
    with pytest.raises(ValueError, match="`perplexity_documents` must hold texts, got none"):
        PerplexitySuite(model, tokenizer, [], window=64)


def test_texts_longer_than_the_tokenizer_s_range_are_no_news(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 32
    PerplexitySuite(tiny_model("llama"), tokenizer, ["Ardel sold salt. " * 40], window=64)
    assert "longer than the specified maximum" not in caplog.text


def test_a_window_beyond_the_range_is_refused_before_any_suite_works():
    with pytest.raises(ValueError, match="`perplexity_window` must be at most 256, the range of this"):
        PerplexitySuite(tiny_model("llama"), tiny_tokenizer(), ["text " * 400], window=300)


def test_bad_requests_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="`documents` must hold at least one"):
        perplexity_by_position(model, [], window=20, stride=10)
    with pytest.raises(ValueError, match=r"at most 256, the range of this .* got 300"):
        perplexity_by_position(model, [document(300)], window=300, stride=10)
    with pytest.raises(ValueError, match="`stride` must be from 1 to the window, 20, got 21"):
        perplexity_by_position(model, [document(40)], window=20, stride=21)
    with pytest.raises(ValueError, match="`window` must be at least 2"):
        perplexity_by_position(model, [document(40)], window=1, stride=1)
    assert position_edges(4096)[-2:] == [2048, 4096]
