"""Cutting a prompt's middle out where it is longer than the model reads: its two ends hold the instructions."""

from transformers import PreTrainedTokenizerBase

from hf_longalign.evaluation.encoding import encode_text


def cut_middle(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, chat: bool) -> str:
    """Return the text, its middle left out where it takes more than `max_tokens` tokens, template included.

    As LongBench does it (https://arxiv.org/abs/2308.14508): the first and the last half of the tokens that fit are
    decoded and joined. The joint and the template can change the count, so it is taken again, and tokens go from the
    middle until the whole fits. A character cut in two at the joint becomes U+FFFD.

    Args:
        text: what the user says.
        tokenizer: the model's.
        max_tokens: what the model may be given.
        chat: whether the text goes through the chat template.

    Raises:
        ValueError: `max_tokens` leaves no room for the text, or `chat` without a chat template.
    """
    surplus = len(encode_text(tokenizer, text, chat=chat)) - max_tokens
    if surplus <= 0:
        return text
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = len(token_ids)
    while surplus > 0:
        kept -= surplus
        half = kept // 2
        if half < 1:
            raise ValueError(
                f"`max_length` must leave room for a prompt beside the answer and the chat template, got {max_tokens} "
                "tokens without the answer's. Set it to more."
            )
        ends = (token_ids[:half], token_ids[-half:])
        shortened = "".join(str(tokenizer.decode(end, clean_up_tokenization_spaces=False)) for end in ends)
        surplus = len(encode_text(tokenizer, shortened, chat=chat)) - max_tokens
    return shortened
