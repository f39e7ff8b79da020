"""The builder: seeds become a data set with the configurations `chat`, `contexts` and `rejected`."""

import hashlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, fields
from functools import cache
from glob import glob
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import datasets

from hf_longalign.endpoint.protocol import Generator, SwitchGenerator
from hf_longalign.synthesis.budget import Budget
from hf_longalign.synthesis.config import SynthesisOptions
from hf_longalign.synthesis.export import check_output, export
from hf_longalign.synthesis.files import Files
from hf_longalign.synthesis.outcome import CONFIGS, features
from hf_longalign.synthesis.pipeline import Pipeline
from hf_longalign.text import digest


# Raised whenever the same fields give other rows: datasets does not see a change of code.
VERSION = "1.2.0"


@dataclass
class ContextSynthesisConfig(SynthesisOptions, datasets.BuilderConfig):
    """The configuration of `ContextSynthesisBuilder`.

    Its id, which names the cache folder, is a digest of the fields and of what the named files hold: equal data gives
    equal folders on every machine, and neither a path nor anything of an endpoint stands in it. The builder sets
    `generator` ("openai", "batch", "transformers", "vllm" or "documents"), `model` and `judge_model`.
    """

    version: datasets.Version | str | None = VERSION
    generator: str = "documents"
    model: str = ""
    judge_model: str = ""

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Any = None) -> str:
        """Return the name of the configuration and the digest."""
        # datasets skips what is None, as if it had not been given: `temperature: null` would be 0.8. Here is the last
        # place before the fields are used.
        for name, value in config_kwargs.items():
            if value is None and hasattr(self, name):
                setattr(self, name, None)
        return f"{self.name}-{self.fingerprint()}"

    def fingerprint(self, without: tuple[str, ...] = ()) -> str:
        """Return a digest of everything that shapes the rows, the fields `without` left out."""
        parts = [VERSION, self.generator, self.model, self.judge_model]
        for option in fields(SynthesisOptions):
            if option.name not in without:
                parts += [option.name, _content(getattr(self, option.name))]
        return digest(*parts)


def _content(value: Any) -> str:
    """A digest of the file or data behind a value; the value itself where there is none."""
    if isinstance(value, list):
        # One by one: seeds in memory may be many, and their texts would all be held at once.
        state = hashlib.blake2b(digest_size=8)
        for part in value:
            state.update(digest(_content(part)).encode())
        return f"{len(value)} {state.hexdigest()}"
    if isinstance(value, datasets.Dataset):
        # datasets' own digest of how it was made; hashing the rows would read them all.
        return str(value._fingerprint)
    if hasattr(value, "to_dict") and hasattr(value, "isna"):
        # The text of a DataFrame shows a few of its rows.
        return digest(value.to_json(orient="split"))
    if hasattr(value, "backend_tokenizer"):
        # The text of a tokenizer object shows its path, and two versions may lie at one.
        return digest(value.backend_tokenizer.to_str(), str(value.chat_template))
    if isinstance(value, str):
        task, _, name = value.rpartition("=")
        if any(char in name for char in "*?[") and (paths := sorted(glob(name, recursive=True))):
            return digest(*map(_content, paths))
        # A folder that is named is mostly a tokenizer's, whose weights and logs change no count.
        path = Path(name, "tokenizer.json" if isdir(name) else "")
        # Not `path.is_file()`, which raises for a text that is longer than a file's name can be, such as `extra_body`.
        if isfile(path):
            return digest(task, path.name, _file_digest(path, path.stat().st_mtime_ns))
    return repr(value)


# By the time of change: three configurations digest the same gigabytes.
@cache
def _file_digest(path: Path, modified: int) -> str:
    state = hashlib.blake2b()
    with path.open("rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


class ContextSynthesisBuilder(datasets.GeneratorBasedBuilder):
    """Builds long-context chat data from short instruction-answer pairs.

    A builder like any other of `datasets`: `download_and_prepare(num_proc=…)`, then `as_dataset()`, or
    `as_streaming_dataset()`. The configurations are `chat` (rows to train on, the default), `contexts` (the texts) and
    `rejected` (what did not pass, with the reason); preparing a second one pays for nothing again. Rows are the same
    for any `num_proc`, and after any interruption.

    Method: Context Synthesis, https://arxiv.org/abs/2502.15592.

    Args:
        generator: writes the contexts (`OpenAIGenerator`, `TransformersGenerator`, `VLLMGenerator` …), or "documents"
            where the seeds have theirs.
        judge: another generator that judges and answers; by default the one that writes.
        journal: path of the journal of replies; by default `journal.sqlite` beside the prepared data.
        budget: what a run may spend at most.
        show_progress: a bar (`True`), none (`False`), or a bar on a terminal and log lines elsewhere (`None`).
        cache_dir: where the data is prepared, as for every builder.
        dataset_name: the name of the folder in it.
        config_name: "chat", "contexts" or "rejected".
        **config: the fields of `ContextSynthesisConfig`.

    Raises:
        ValueError: a bad field, seed, document or tokenizer, named with its remedy, before anything is paid for.

    >>> import tempfile
    >>> pairs = [{"instruction": f"Which of the dams is dam {n}?", "answer": f"dam {n}", "context": f"It is dam {n}."}
    ...          for n in range(3)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     builder = ContextSynthesisBuilder(
    ...         cache_dir=folder, seeds=pairs, n_distractors=2, checks=["support"], show_progress=False
    ...     )
    ...     builder.download_and_prepare()
    ...     row = builder.as_dataset(split="train")[0]
    >>> row["n_contexts"], [part["kind"] for part in row["parts"]]
    (3, ['context', 'context', 'context', 'question'])
    """

    BUILDER_CONFIG_CLASS = ContextSynthesisConfig
    BUILDER_CONFIGS = [ContextSynthesisConfig(name=name) for name in CONFIGS]  # noqa: RUF012 - datasets' own protocol
    DEFAULT_CONFIG_NAME = "chat"

    config: ContextSynthesisConfig

    def __init__(
        self,
        *,
        generator: Generator | str = "documents",
        judge: Generator | None = None,
        journal: str | Path | None = None,
        budget: Budget | None = None,
        show_progress: bool | None = None,
        cache_dir: str | Path | None = None,
        dataset_name: str = "context_synthesis",
        config_name: str = "chat",
        **config: Any,
    ):
        if isinstance(generator, str) and generator != "documents":
            raise ValueError(
                f'`generator` must be a generator or "documents", got {generator!r}. '
                "Pass `OpenAIGenerator(model, endpoints)` or `TransformersGenerator(model)`."
            )
        writer = None if isinstance(generator, str) else generator
        if isinstance(config.get("seeds"), str):
            config["seeds"] = [config["seeds"]]
        # What a builder of another configuration is made with.
        who: dict[str, Any] = {"generator": generator, "judge": judge}
        self._arguments = {"cache_dir": cache_dir, "dataset_name": dataset_name, **who, **config}
        super().__init__(
            cache_dir=None if cache_dir is None else str(cache_dir),
            dataset_name=dataset_name,
            config_name=config_name,
            # `OpenAIGenerator` -> "openai"
            generator=type(writer).__name__.removesuffix("Generator").lower() if writer else "documents",
            model=writer.model if writer else "",
            judge_model=judge.model if judge else "",
            **config,
        )
        self.config.check()
        self.files = Files(self.config, Path(self._cache_dir_root) / self.dataset_name)
        self.pipeline = Pipeline(
            config=self.config,
            files=self.files,
            generator=SwitchGenerator([writer, judge]) if writer and judge else writer or judge,
            journal=Path(journal) if journal is not None else self.files.folder / "journal.sqlite",
            budget=budget,
            show_progress=show_progress,
        )

    def __getstate__(self) -> dict[str, Any]:
        # Sent to the processes that compose, which ask nobody: clients, open files and seeds stay here.
        config = copy(self.config)
        config.seeds = None
        return {**self.__dict__, "config": config, "pipeline": None, "_arguments": None}

    def other(self, config_name: str) -> "ContextSynthesisBuilder":
        """Return the builder of another configuration of the same data: seeds are read and checked once for all."""
        # Made anew, since `datasets` fixes folder and features in the constructor; then it shares what was read.
        builder = type(self)(config_name=config_name, **self._arguments)
        builder.pipeline, builder.files = self.pipeline, self.files
        return builder

    def prepare_outcomes(self) -> bool:
        """Write or check every context, if that is not done yet; here the money is spent. See `Pipeline.run`."""
        return self.pipeline.run()

    def export(
        self,
        folder: str | Path,
        *,
        num_proc: int | None = None,
        license: str | None = None,
        seeds_license: str | None = None,
    ) -> Path:
        """Prepare all configurations and write them to a folder with their card. See `synthesis.export.export`."""
        check_output(Path(folder), self.pipeline.journal, self.files.folder)
        data = {}
        for name in CONFIGS:
            builder = self if name == self.config.name else self.other(name)
            builder.download_and_prepare(num_proc=num_proc)
            data[name] = builder.as_dataset()
        pipeline = self.pipeline
        return export(
            folder,
            data,
            self.config,
            journal=pipeline.journal,
            budget=pipeline.budget,
            license=license,
            seeds_license=seeds_license,
        )

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Long-context instruction data: pairs with written or given contexts.",
            features=features(self.config.name),
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.prepare_outcomes()
        splits = self.files.splits(self.config.name)
        return [datasets.SplitGenerator(name, gen_kwargs={"rows": rows}) for name, rows in splits.items()]

    def _as_dataset(self, split: Any = datasets.Split.TRAIN, in_memory: bool = False) -> datasets.Dataset:
        if self.config.name == "chat" and not self.info.splits.total_num_examples:
            raise ValueError(
                f"No row fits into `target_tokens`, {self.config.target_tokens}: each context alone exceeds it. Raise "
                "it, or ask for fewer `context_words`."
            )
        named = self.info.splits.get(str(split))  # `None` for a slice or a sum of splits
        if named is not None and not named.num_examples:  # datasets cannot read a split without rows
            empty: dict[str, list[Any]] = {name: [] for name in self.info.features}
            return datasets.Dataset.from_dict(empty, features=self.info.features, split=split)
        return super()._as_dataset(split, in_memory)

    def _generate_examples(self, rows: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in rows:
            row = self.files.row(self.config.name, number)
            if row is not None:
                yield number, row
