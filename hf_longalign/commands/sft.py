"""Instruction-tune a causal language model on short data with skipped positions: what `hf-longalign sft` runs."""

import ast
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ModelConfig, ScriptArguments

from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import HubOptions, PublishOptions, destination
from hf_longalign.hub import check_base_name, publish_command
from hf_longalign.options import option
from hf_longalign.training_options import TrainingOptions


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    from hf_longalign.config import LongAlignSFTConfig

DESCRIPTION = """Instruction-tune a causal language model on short data with skipped positions.

    hf-longalign sft --config recipes/qwen2.5-0.5b/sft_skipalign.yaml --output_dir outputs/qwen
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m hf_longalign sft …      # on several processes

Every option of TRL's ScriptArguments, SFTConfig and ModelConfig is there. --resume_from_checkpoint auto goes on from
the newest whole checkpoint."""
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class DataOptions(ScriptArguments):
    """The data set: a Hub id, a folder, or a JSONL or Parquet file (`dataset_name`), in any TRL format."""

    dataset_revision: str | None = option(None, "Revision of a Hub data set: branch, tag or commit.")
    test_size: float = option(
        0.0, "Share of the training split to hold out for evaluation where there is no test split."
    )

    @property
    def file_format(self) -> str | None:
        """How `datasets` calls the format of a file; `None` for a folder or a Hub id."""
        return FILE_FORMATS.get(Path(self.dataset_name or "").suffix)

    def load(self) -> Any:
        """Return the data set's splits by name."""
        from datasets import load_dataset

        if self.file_format:
            return load_dataset(self.file_format, data_files=self.dataset_name, streaming=self.dataset_streaming)
        return load_dataset(
            self.dataset_name, self.dataset_config, revision=self.dataset_revision, streaming=self.dataset_streaming
        )

    def check(self) -> None:
        """Refuse a data set that is not there, as far as this machine can tell."""
        if self.dataset_name is None:
            raise ValueError("`dataset_name` must be a Hub id, a folder or a file, got None. Set it to one.")
        if self.file_format and not Path(self.dataset_name).is_file():
            raise ValueError(
                f"`dataset_name` must be a file that exists, got {self.dataset_name!r}. Set it to its path."
            )
        if not 0 <= self.test_size < 1:
            raise ValueError(f"`test_size` must be from 0 to below 1, got {self.test_size}. Set 0.1 for a tenth.")
        if self.test_size and self.dataset_streaming:
            raise ValueError(
                "`test_size` cannot cut a streamed data set. Set `dataset_test_split` to one of its splits."
            )


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return data, training, model and publishing options."""
    # Most mistakes are found without TRL's SFTConfig, which takes torch, transformers and six seconds to import.
    early = OptionParser(
        "sft", (DataOptions, ModelConfig, TrainingOptions, HubOptions, PublishOptions), foreign=_trainer_fields()
    )
    if not {"-h", "--help"} & set(arguments):
        early.read(arguments, check)
    from hf_longalign.config import LongAlignSFTConfig

    classes = (DataOptions, LongAlignSFTConfig, ModelConfig, PublishOptions)
    return OptionParser("sft", classes, DESCRIPTION).read(arguments)


def check(
    data: DataOptions, model: ModelConfig, training: TrainingOptions, hub: HubOptions, publish: PublishOptions
) -> None:
    """Refuse what is wrong with several of the options together."""
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` must be a Hub id or a folder, got None. Set it to one.")
    publish.check_idle(push_to_hub=bool(hub.push_to_hub))
    if hub.push_to_hub:
        publish.check_push(hub, "output")
        check_base_name(training.base_name, model.model_name_or_path)


def _trainer_fields() -> set[str]:
    """Names of the fields of `trl.SFTConfig` and of the classes below it, read in their source."""
    names = set()
    for package, pattern in (("trl", "trainer/*_config.py"), ("transformers", "training_args.py")):
        spec = find_spec(package)
        for file in Path(str(spec and spec.origin)).parent.glob(pattern):
            classes = [node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
            lines = [line for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
            names |= {line.target.id for line in lines if isinstance(line.target, ast.Name)}
    return names


logger = logging.getLogger(__name__)


def read_dataset(args: DataOptions) -> "DatasetDict | IterableDatasetDict":
    """Load the data set and hold out a test split if one is asked for and none is there."""
    dataset = args.load()
    if args.dataset_train_split not in dataset:
        raise ValueError(
            f"`dataset_train_split` must be one of {sorted(dataset)}, got {args.dataset_train_split!r}. "
            "Set one of them."
        )
    if args.test_size and args.dataset_test_split not in dataset:
        # A fixed seed: a run that is resumed must hold out the same rows.
        halves = dataset[args.dataset_train_split].train_test_split(test_size=args.test_size, seed=0)
        dataset[args.dataset_train_split], dataset[args.dataset_test_split] = halves["train"], halves["test"]
    return dataset


def check_columns(dataset: "Dataset | IterableDataset", text_field: str, remedy: str = "Rename its columns.") -> None:
    """Refuse a data set that is in none of TRL's formats."""
    from trl.data_utils import get_dataset_column_names

    columns = get_dataset_column_names(dataset)
    formats = ({text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})
    if not any(needed <= set(columns) for needed in formats):
        raise ValueError(
            f"The data set must have a column {text_field!r}, 'messages', 'conversations', 'prompt' and 'completion', "
            f"or 'input_ids', got {columns}. {remedy}"
        )


def agreed_checkpoint(output_dir: str) -> str | None:
    """Return the newest checkpoint that was written whole; a run killed while saving leaves another.

    Raises:
        ValueError: machines see different folders: some processes would go on and some begin.
    """
    from accelerate.utils import gather_object

    newest: str | None = None
    # By number: `checkpoint-1000` stands before `checkpoint-200` in the alphabet. `checkpoint-best` is somebody's own.
    numbered = {
        int(path.name[11:]): path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()
    }
    for _, path in sorted(numbered.items()):
        try:
            json.loads((path / "trainer_state.json").read_text())  # the last file of a checkpoint
        except (OSError, json.JSONDecodeError):
            logger.warning("%s is not complete and left aside.", path)
        else:
            newest = str(path)
    found = gather_object([newest and Path(newest).name])
    if len(set(found)) > 1:
        raise ValueError(
            f"`output_dir` must hold the same checkpoints for every process, got {found} in {output_dir!r}. Set it to "
            "a folder that all machines share, or copy the newest checkpoint to each of them."
        )
    return newest


def run(
    data_args: DataOptions, training_args: "LongAlignSFTConfig", model_args: ModelConfig, publish_args: PublishOptions
) -> int:
    """Train, evaluate, save, publish."""
    from transformers import AutoTokenizer
    from transformers.trainer_utils import HubStrategy
    from trl import get_peft_config, get_quantization_config

    from hf_longalign.trainer import LongAlignSFTTrainer

    output_dir = str(training_args.output_dir)
    if training_args.push_to_hub:
        publish_args.check_push(training_args, output_dir, training_args.hub_token)
        if publish_args.create_pr or publish_args.push_dry_run:
            training_args.hub_strategy = HubStrategy.END  # one pull request, or one folder, and none per checkpoint
    given: Any = training_args.model_init_kwargs or {}  # TRL has read the JSON of a command line
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    dataset = read_dataset(data_args)
    check_columns(
        dataset[data_args.dataset_train_split],
        training_args.dataset_text_field,
        "Rename its columns, or set `dataset_text_field`.",
    )
    evaluates = training_args.eval_strategy != "no" or bool(training_args.eval_distances)
    if evaluates and data_args.dataset_test_split not in dataset:
        raise ValueError(
            f"`eval_strategy` or `eval_distances` needs the split {data_args.dataset_test_split!r}, got "
            f"{sorted(dataset)}. Set `test_size` or `dataset_test_split`, or leave both out."
        )
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    trainer = LongAlignSFTTrainer(
        str(model_args.model_name_or_path),
        args=training_args,
        train_dataset=dataset[data_args.dataset_train_split],
        eval_dataset=dataset[data_args.dataset_test_split] if evaluates else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=agreed_checkpoint(output_dir) if resume == "auto" else resume)
    if training_args.push_to_hub:
        to = destination(training_args, output_dir)
        command = publish_command(output_dir, base_model=training_args.base_name, **to, **publish_args.options())
        trainer.accelerator.print(publish_args.push(trainer.push_to_hub, command))
    else:
        trainer.save_model(output_dir)
        trainer.accelerator.print(f"Saved to {output_dir}")
    # The wrapper goes before the process group: the last to hold a gloo group, it would close it without ever letting
    # go of Python's lock, for which a thread of that group may be waiting.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    if hasattr(trainer, "end"):  # transformers >= 5.18 closes the trackers here
        trainer.end()
    return 0
