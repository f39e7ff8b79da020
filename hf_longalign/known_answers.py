"""How a model is known again by its answers: the first tokens of greedy answers to a few fixed prompts.

Two of the prompts are longer than the base's own range, where a server that has lost the RoPE scaling answers
otherwise, if the range is below 16,384 tokens: longer ones would cost too much to read. [`not_past_range`] tells where
no answer comes from there. Engines round differently, so an answer ends where the model was not sure of its next
token.
"""

from typing import Any

import torch
from transformers import GenerationConfig

from hf_longalign.records.training import AnswersRecord, RopeRecord


NEW_TOKENS = 12
# How much more likely the first choice is than the second, in nats: rounding in half precision moves it by far less.
MARGIN = 0.5
# The most tokens of a prompt; where the range of the base is as long, the long prompts stay inside it.
LONGEST = 16384
TOWNS = ("Ardel", "Bemo", "Cato", "Dunra", "Ekest", "Fallo", "Gorin")
QUESTIONS = (
    "Copy line 1 word for word.",
    "How many carts were sold in line 1? Answer with a number.",
    "Repeat the line above.",
    "Say the word yes.",
)
GOODS = ("salt", "wool", "glass", "copper", "honey")


def ledger(lines: int, question: int = 0) -> str:
    """Return a prompt of so many lines and one of the `QUESTIONS` about them.

    >>> print(ledger(2))
    Line 1: Ardel sold 17 carts of salt.
    Line 2: Bemo sold 54 carts of wool.
    Copy line 1 word for word.
    """
    rows = (f"Line {n + 1}: {TOWNS[n % 7]} sold {17 + 37 * n % 83} carts of {GOODS[n % 5]}." for n in range(lines))
    return "\n".join([*rows, QUESTIONS[question]])


def base_range(rope: RopeRecord) -> int:
    """Return the range of a model before its RoPE was scaled, as far as its parameters tell.

    >>> base_range(RopeRecord("llama", 32768, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}))
    8192
    """
    reach = rope.max_position_embeddings or LONGEST
    # Of "dynamic", whose factor is applied only past it, the range itself is the original one.
    scaled = [part for part in rope.parts if part.get("rope_type") != "dynamic"]
    before = (
        part.get("original_max_position_embeddings") or round(reach / (part.get("factor") or 1)) for part in scaled
    )
    return min([reach, *before])


def not_past_range(answers: AnswersRecord, rope: RopeRecord) -> str | None:
    """Return why no answer shows what a model does past the range of its base; `None` where one does, or none must.

    >>> rope = RopeRecord("llama", 65536, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    >>> not_past_range(AnswersRecord(tokens=[30, 16380]), rope)
    'none past 32,768 tokens, the range of its base: no prompt is longer than 16,384'
    """
    reach = base_range(rope)
    if reach >= (rope.max_position_embeddings or LONGEST) or max(answers.tokens, default=0) > reach:
        return None
    is_asked = reach < LONGEST
    why = "the model is not sure of its answers there" if is_asked else f"no prompt is longer than {LONGEST:,}"
    return f"none past {reach:,} tokens, the range of its base: {why}"


@torch.no_grad()
def known_answers(model: Any, tokenizer: Any, rope: RopeRecord) -> AnswersRecord:
    """Ask a model the fixed prompts and return the beginnings of its answers.

    Args:
        model: a `PreTrainedModel` with or without an adapter, in eval mode.
        tokenizer: its own; with a chat template, prompts go through it.
        rope: the RoPE and range it was trained with.
    """
    chat = bool(tokenizer.chat_template)

    def encode(lines: int, question: int = 0) -> dict[str, Any]:
        text = ledger(lines, question)
        if not chat:
            return dict(tokenizer(text, return_tensors="pt"))
        options: Any = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return dict(tokenizer.apply_chat_template([{"role": "user", "content": text}], **options))

    reach = rope.max_position_embeddings or LONGEST
    past = min(base_range(rope) + 64, reach - NEW_TOKENS, LONGEST)
    settings: Any = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = AnswersRecord(chat=chat)
    few, more = (encode(lines)["input_ids"].shape[1] for lines in (4, 12))
    # The fewest lines, near enough, whose prompt reaches past the range of the base.
    longest = max(1, round(4 + (past - few) / ((more - few) / 8) + 0.5))
    # Two of the long prompt, for each is read anew; all of a short one, for a small model is sure of few.
    asked = sorted({*((lines, n) for lines in (1, 24) for n in range(len(QUESTIONS))), (longest, 0), (longest, 1)})
    for lines, question in asked:
        encoded = encode(lines, question).items()
        # Which some tokenizers give, and few of the models take.
        inputs = {key: value.to(model.device) for key, value in encoded if key != "token_type_ids"}
        length = inputs["input_ids"].shape[1]
        if length > reach - NEW_TOKENS:
            continue
        output: Any = model.generate(**inputs, generation_config=settings)
        first, second = torch.stack(output.logits)[:, 0].float().log_softmax(-1).topk(2).values.unbind(-1)
        sure = (first - second >= MARGIN).long().cumprod(0).sum().item()
        answer = tokenizer.decode(output.sequences[0, length:][:sure], skip_special_tokens=True)
        # An answer may end in the middle of a character of several tokens.
        if answer := answer.rstrip("\ufffd").strip():
            found.lines.append(lines)
            found.questions.append(question)
            found.tokens.append(length)
            found.answers.append(answer)
    return found
