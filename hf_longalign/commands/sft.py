"""Instruction-tune a causal language model on short data with skipped positions.

    accelerate launch recipes/sft.py --config recipes/qwen2.5-0.5b/sft_skipalign.yaml --output_dir outputs/qwen

Every option of TRL's `ScriptArguments`, `LongAlignSFTConfig`, `ModelConfig` and of the classes below can stand in
the YAML or on the command line, which wins.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import HubStrategy
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.data_utils import get_dataset_column_names

from hf_longalign import LongAlignSFTConfig, LongAlignSFTTrainer
from hf_longalign.commands.publishing import PublishArguments, start_logging
from hf_longalign.hub import PublishError, check_base_name, publish_command


logger = logging.getLogger(__name__)

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class DataArguments(ScriptArguments):
    """The data set: a Hub id, a folder, or a JSONL or Parquet file (`dataset_name`), in any TRL format."""

    dataset_revision: str | None = field(
        default=None, metadata={"help": "Revision of a Hub data set: branch, tag or commit."}
    )
    test_size: float = field(
        default=0.0,
        metadata={"help": "Share of the training split to hold out for evaluation where there is no test split."},
    )


ARGUMENTS = (DataArguments, LongAlignSFTConfig, ModelConfig, PublishArguments)


def read_dataset(args: DataArguments) -> DatasetDict | IterableDatasetDict:
    """Load the data set and hold out a test split if one is asked for and none is there."""
    if args.dataset_name is None:
        raise ValueError("`dataset_name` must be a Hub id, a folder or a file, got None. Set it in the YAML.")
    file_format = FILE_FORMATS.get(Path(args.dataset_name).suffix)
    if file_format and not Path(args.dataset_name).is_file():
        raise ValueError(f"`dataset_name` must be a file that exists, got {args.dataset_name!r}. Set it to its path.")
    if file_format:
        source = {"path": file_format, "data_files": args.dataset_name}
    else:
        source = {"path": args.dataset_name, "name": args.dataset_config, "revision": args.dataset_revision}
    dataset = load_dataset(**source, streaming=args.dataset_streaming)
    if args.dataset_train_split not in dataset:
        raise ValueError(
            f"`dataset_train_split` must be one of {sorted(dataset)}, got {args.dataset_train_split!r}. "
            "Set one of them."
        )
    if args.test_size and args.dataset_test_split not in dataset:
        if args.dataset_streaming:
            raise ValueError(
                "`test_size` cannot cut a streamed data set. Set `dataset_test_split` to one of its splits."
            )
        halves = dataset[args.dataset_train_split].train_test_split(test_size=args.test_size, seed=0)
        dataset[args.dataset_train_split], dataset[args.dataset_test_split] = halves["train"], halves["test"]
    return dataset


def check_columns(dataset: Dataset | IterableDataset, text_field: str) -> None:
    """Refuse a data set that is in none of TRL's formats."""
    columns = get_dataset_column_names(dataset)
    formats = ({text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})
    if not any(needed <= set(columns) for needed in formats):
        raise ValueError(
            f"The data set must have a column {text_field!r} (`dataset_text_field`), 'messages', 'conversations', "
            f"'prompt' and 'completion', or 'input_ids', got {columns}. Rename its columns, or set "
            "`dataset_text_field`."
        )


def last_checkpoint(output_dir: str) -> str | None:
    """Return the newest checkpoint that was written whole; a run killed while saving leaves another."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())  # the last file of a checkpoint
        except (OSError, json.JSONDecodeError):
            logger.warning("%s is not complete and left aside.", path)
        else:
            return str(path)
    return None


def publish(trainer: LongAlignSFTTrainer, args: PublishArguments) -> str:
    """Save the model and publish it, and return what to tell the user."""
    training_args = trainer.args
    command = publish_command(
        "publish_adapter",
        training_args.output_dir,
        repository(training_args),
        base_model=training_args.base_name,
        private=training_args.hub_private_repo,
        **args.options(),
    )
    return args.push(lambda branch, **more: trainer.push_to_hub(revision=branch, **more), command)


def repository(args: LongAlignSFTConfig) -> str:
    """Return the name of the repository to push to; unset, it is that of the output folder."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def run(
    data_args: DataArguments,
    training_args: LongAlignSFTConfig,
    model_args: ModelConfig,
    publish_args: PublishArguments,
) -> None:
    """Train, evaluate, save, publish."""
    pushes = training_args.push_to_hub
    if pushes:
        publish_args.check(repository(training_args), training_args.hub_token)
        check_base_name(training_args.base_name, model_args.model_name_or_path)
        training_args.hub_revision = publish_args.branch or training_args.hub_revision
        if publish_args.create_pr or publish_args.push_dry_run:
            training_args.hub_strategy = HubStrategy.END  # one pull request, or one folder, and none per checkpoint
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = read_dataset(data_args)
    check_columns(dataset[data_args.dataset_train_split], training_args.dataset_text_field)
    evaluates = training_args.eval_strategy != "no"
    if evaluates and data_args.dataset_test_split not in dataset:
        raise ValueError(
            f"`eval_strategy={training_args.eval_strategy}` needs the split {data_args.dataset_test_split!r}, got "
            f"{sorted(dataset)}. Set `test_size`, `dataset_test_split` or `eval_strategy: no`."
        )
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    trainer = LongAlignSFTTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[data_args.dataset_train_split],
        eval_dataset=dataset[data_args.dataset_test_split] if evaluates else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir) if resume == "auto" else resume)
    if pushes:
        trainer.accelerator.print(publish(trainer, publish_args))
    else:
        trainer.save_model(training_args.output_dir)
        trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    # The wrapper goes before the process group: the last to hold a gloo group, it would close it without ever letting
    # go of Python's lock, for which a thread of that group may be waiting.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    if hasattr(trainer, "end"):  # transformers >= 5.18 closes the trackers here
        trainer.end()


def main() -> int:
    """Read the options and train."""
    start_logging()
    try:
        run(*TrlParser(ARGUMENTS).parse_args_and_config())
    except PublishError as error:
        sys.exit(str(error))
    return 0
