import asyncio
import math
from collections import Counter

import pytest

from hf_longalign.endpoint.protocol import GenerationError, Reply, Sampling
from hf_longalign.synthesis.checks import Rules
from hf_longalign.synthesis.seeds import Seed
from hf_longalign.synthesis.selection import answer_losses, choose_seeds
from hf_longalign.synthesis.writer import Plan, score_answer, score_answers


PAIRS = [Seed(f"{task}{number}", task, "Why?", "So.") for task in ("qasper", "qmsum") for number in range(100)]
PLAN = Plan("openai", "writer", Sampling(), Rules(()), answering="m")
HARDNESS = [number / 100 for _ in range(2) for number in range(100)]


@pytest.mark.parametrize(
    "answer, reply, score",
    [
        ("The Georgia Peach", "the georgia peach!", 1.0),
        ("1912", "In 1912, I think.", 1.0),
        ("1912", "In 1913.", 0.0),
        ("yes", "Yes, they are.", 1.0),
        ("no", "Yes.", 0.0),
        ("a professional ballet dancer in New York", "a dancer in New York", 2 * 4 / (6 + 4)),
        ("x", "", 0.0),
        ("...", "anything", 0.0),
    ],
)
def test_score(answer, reply, score):
    assert score_answer(answer, reply) == pytest.approx(score)


def test_closed_book_is_the_mean_of_different_samples_and_open_book_shows_the_context():
    replies, asked = iter(["1912", "1913", "1912"]), []

    async def ask(request):
        asked.append(request)
        return Reply(next(replies), "stop", 1, 1, "m")

    pair = Seed("a", "narrativeqa", "When?", "1912")
    assert asyncio.run(score_answers(pair, PLAN, ask, samples=2)) == 0.5
    assert [request.sampling.seed for request in asked] == [0, 1] and len({request.key for request in asked}) == 2
    assert asyncio.run(score_answers(pair, PLAN, ask, context="Built in 1912.")) == 1.0
    assert "Story: Built in 1912." in asked[2].messages[0][1] and "Built" not in asked[0].messages[0][1]


def test_a_model_that_will_not_answer_has_no_score():
    async def ask(request):
        raise GenerationError("content_filter", "no")

    assert asyncio.run(score_answers(PAIRS[0], PLAN, ask, samples=3)) is None


def test_select_keeps_the_hardest_share_of_every_task():
    kept = choose_seeds(PAIRS, HARDNESS, "select", 0.25)
    assert kept == [*range(75, 100), *range(175, 200)]
    assert choose_seeds(PAIRS, HARDNESS, "record", 0.1) == list(range(200))


def test_stratify_keeps_as_many_of_every_quarter():
    kept = choose_seeds(PAIRS, HARDNESS, "stratify", 0.2)
    assert Counter((PAIRS[number].task, int(HARDNESS[number] * 4)) for number in kept) == {
        (task, quarter): 5 for task in ("qasper", "qmsum") for quarter in range(4)
    }


def test_weight_prefers_the_hard_ones():
    kept = Counter(
        HARDNESS[n] >= 0.5 for seed in range(20) for n in choose_seeds(PAIRS, HARDNESS, "weight", 0.2, seed)
    )
    assert kept[True] > 1.3 * kept[False] > 0


def test_a_draw_depends_on_the_pair_alone():
    kept = {PAIRS[n].seed_id for n in choose_seeds(PAIRS, HARDNESS, "stratify", 0.2)}
    turned = PAIRS[::-1]
    assert {turned[n].seed_id for n in choose_seeds(turned, HARDNESS[::-1], "stratify", 0.2)} == kept


def test_answer_loss_is_the_mean_over_the_answer_tokens(tiny_model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pairs = [
        Seed("a", "general", "When was the dam built?", "In 1912."),
        Seed("b", "general", "Who?", "Ada Lovell did."),
    ]
    losses = answer_losses(pairs, tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    from hf_longalign.synthesis.prompts import answer_prompt
    from hf_longalign.synthesis.tasks import TASKS

    for pair, loss in zip(pairs, losses, strict=True):
        messages = [{"role": "user", "content": answer_prompt(pair, TASKS["general"])[0][1]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        each = [-logits[len(prompt) + number - 1, token].item() for number, token in enumerate(answer)]
        assert math.isclose(loss, sum(each) / len(each), rel_tol=1e-4)
