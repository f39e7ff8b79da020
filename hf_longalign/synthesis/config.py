"""What a data set is made from and how: the options of a synthesis, checked as a whole, before anything is loaded.

No field holds a key, an address or anything else of an endpoint: those belong to the generator object.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_longalign.options import check_rules, json_object, option
from hf_longalign.synthesis.checks import CHECKS, DEFAULT_CHECKS
from hf_longalign.synthesis.pool import SOURCES
from hf_longalign.synthesis.selection import USES


# Ten contexts a sample, as in https://arxiv.org/abs/2502.15592.
PUBLISHED_DISTRACTORS = 9


@dataclass
class SynthesisOptions:
    """The fields of `ContextSynthesisConfig` without those of `datasets.BuilderConfig`, for a command line."""

    # Parameters that control the seeds
    seeds: list[str] | None = option(
        None,
        "Files (.jsonl, .csv, .parquet), or Hub data sets user/name[:config][@split], each with an "
        "optional task= in front. Columns: instruction, answer; optional task, context, title, id.",
    )
    contexts: list[str] = option(
        [], "task=file: contexts of that task's seeds, line by line, where they stand in a second file."
    )
    on_bad_seed: str = option("raise", "Stop at a bad row, or count it and go on.", choices=["raise", "skip"])
    on_control_tokens: str = option(
        "neutralise",
        "What to do about marks of chat templates (<|im_end|>, </s> …) in seeds and documents: "
        '"neutralise" makes plain words of them, "reject" makes theirs a bad row. Replies with one are asked for '
        "again.",
        choices=["neutralise", "reject"],
    )
    seeds_per_task: int | None = option(None, "Use only the first so many seeds of a task.", least=1)

    # Parameters that control how contexts are written
    method: str = option(
        "context",
        "Texts for human pairs (context), or as a baseline pairs for texts of `documents` (instruction).",
        choices=["context", "instruction"],
    )
    context_words: int = option(2000, "Words asked for per context.", least=1)
    reply_words: int = option(
        2000, "The most words asked for in one reply; a longer context is an outline, then sections.", least=1
    )
    facts_first: bool = option(False, "Ask for evidence and distraction first, then for the text that holds them.")
    prompt_template: str | None = option(None, "A text file with a prompt of your own in place of the built-in one.")
    temperature: float | None = option(
        0.8, "Sampling temperature; 0.8 is the paper's for open models. null: it is not sent."
    )
    top_p: float | None = option(1.0, "Nucleus sampling; null: it is not sent.")
    max_tokens: int = option(4096, "The most tokens of one reply.")
    sampling_seed: int | None = option(0, "Seed of the first reply; a retry adds one. null: none is sent.")
    extra_body: dict[str, Any] | str | None = option(
        None, "More fields of a request, as JSON or YAML: chat_template_kwargs, min_p, max_completion_tokens …"
    )
    retries: int = option(
        2, "How many more replies a seed may cost when one is unreadable or fails a check.", least=0, most=100
    )
    chunk_words: int = option(3000, 'Words of a chunk of a document, with method "instruction".', least=1)
    pairs_per_document: int = option(1, 'Chunks drawn from each document, with method "instruction".', least=1)

    # Parameters that control verification
    checks: list[str] = option(list(DEFAULT_CHECKS), f"Checks to run, out of {', '.join(CHECKS)}.", choices=CHECKS)
    min_words: int = option(200, "A context of fewer words is rejected.", least=0)
    max_words: int | None = option(None, "A context of more words is rejected.", least=1)
    language: str | None = option(None, "Two-letter code the contexts must have; unset: the language of the seeds.")

    # Parameters that control difficulty
    difficulty: str | None = option(
        None,
        '"closed_book" (the judge, or else the generator, answers without context) or "answer_loss" (a local model).',
        choices=["closed_book", "answer_loss"],
    )
    difficulty_use: str = option("record", f"How seeds are chosen by it: {', '.join(USES)}.", choices=USES)
    difficulty_share: float = option(0.5, "The share of each task's seeds that is kept.")
    difficulty_samples: int = option(1, "Closed-book answers per seed.", least=1, most=1000)
    difficulty_model: str | None = option(None, 'The local model of "answer_loss".')
    answerability: bool = option(
        False, "Record how well the judge, or else the generator, answers each row with and without context."
    )

    # Parameters that control composition
    n_distractors: int | None = option(
        None, "Distractors per sample; unset: 9 as published, or with `target_tokens` as many as fit.", least=0
    )
    target_tokens: int | None = option(
        None, "Fill each sample up to so many tokens, chat template and answer included.", least=1
    )
    tokenizer: str | None = option(None, "The tokenizer that counts: the one you train with.")
    distractor_sources: list[str] = option(
        ["same_task"],
        f"Where distractors come from, out of {', '.join(SOURCES)}; the next when one is used up.",
        choices=SOURCES,
    )
    documents: list[str] = option(
        [], "Text files, patterns, or data sets with a column text or context, for distractors or pairs."
    )
    hard_share: float = option(0.0, "How likely the next distractor is the closest to the gold.", least=0, most=1)
    embedding_model: str | None = option(None, "The transformers encoder that says what is closest; unset: BM25 does.")
    reference: str = option(
        "auto",
        'Name the gold context by title or ID in the prompt: "auto" where the instruction does not tell '
        'which context is meant, "all", or "none".',
        choices=["auto", "all", "none"],
    )
    seed: int = option(0, "Seed of everything that is drawn after the replies.")

    # Parameters that control the data set as a whole
    test_share: float = option(0.0, "Share of the seeds whose rows go into a test split.", least=0, most=0.99)
    general_data: list[str] = option([], "Data with a column `messages` to mix into the train split.")
    general_share: float = option(0.0, "Share of the train rows that is general data.", least=0, most=0.99)
    decontaminate_against: list[str] = option([], "Evaluation files; seeds and contexts that overlap are rejected.")
    decontaminate_ngram: int = option(13, "Words in a row that make an overlap.", least=1, most=1000)

    def check(self) -> None:
        """Check every field that can be checked without reading data.

        Raises:
            ValueError: names the field, its value and the remedy.
        """
        check_rules(self)
        json_object("extra_body", self.extra_body)
        # Last, as these read fields whose own values must be right first.
        documents = self.method == "instruction" or "documents" in self.distractor_sources
        for missing, message in (
            (self.method == "context" and self.seeds is None, "`seeds` must be given, got None. Name files of pairs."),
            (
                documents and not self.documents,
                '`documents` must be given with method "instruction", and where `distractor_sources` holds '
                '"documents", got none. Name files.',
            ),
            (
                self.difficulty == "answer_loss" and self.difficulty_model is None,
                '`difficulty_model` must be given with difficulty "answer_loss", got None. Name a causal model.',
            ),
            (
                self.difficulty_use != "record" and self.difficulty is None,
                f"`difficulty` must be given with difficulty_use {self.difficulty_use!r}, got None.",
            ),
            (
                not 0 < self.difficulty_share <= 1,
                f"`difficulty_share` must be above 0 and at most 1, got {self.difficulty_share!r}. Set it to the "
                "share to keep.",
            ),
            (
                bool(self.general_share) != bool(self.general_data),
                "`general_share` and `general_data` must be given together, "
                f"got {self.general_share!r} and {self.general_data!r}.",
            ),
        ):
            if missing:
                raise ValueError(message)

    @property
    def hard_by(self) -> str:
        """What says which context is closest to the gold one."""
        return "bm25" if self.embedding_model is None else "embeddings"

    @property
    def distractor_limit(self) -> int | None:
        """How many distractors a row gets at most; `None` for as many as the budget holds."""
        if self.n_distractors is None and self.target_tokens is None:
            return PUBLISHED_DISTRACTORS
        return self.n_distractors

    def available_distractors(self, tasks: Mapping[str, int], documents: int) -> dict[str, int]:
        """Return how many distractors a row of each task can have, given the number of contexts per task."""
        total = sum(tasks.values())
        found = {}
        for task, count in sorted(tasks.items()):
            by_source = {"same_task": count - 1, "other_tasks": total - count, "documents": documents}
            found[task] = sum(by_source[source] for source in self.distractor_sources)
        return found
