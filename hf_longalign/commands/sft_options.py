"""The options of `sft`, and what is wrong with them before torch is loaded."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments

from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import HubOptions, PublishOptions
from hf_longalign.hub import check_base_name
from hf_longalign.training_options import TrainingOptions


DESCRIPTION = """Instruction-tune a causal language model on short data with skipped positions.

    hf-longalign sft --config recipes/qwen2.5-0.5b/sft_skipalign.yaml --output_dir outputs/qwen
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m hf_longalign sft …      # on several processes

Every option of TRL's ScriptArguments, SFTConfig and ModelConfig is there. --resume_from_checkpoint auto goes on from
the newest whole checkpoint."""
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class DataOptions(ScriptArguments):
    """The data set: a Hub id, a folder, or a JSONL or Parquet file (`dataset_name`), in any TRL format."""

    dataset_revision: str | None = field(
        default=None, metadata={"help": "Revision of a Hub data set: branch, tag or commit."}
    )
    test_size: float = field(
        default=0.0,
        metadata={"help": "Share of the training split to hold out for evaluation where there is no test split."},
    )

    @property
    def file_format(self) -> str | None:
        """How `datasets` calls the format of a file; `None` for a folder or a Hub id."""
        return FILE_FORMATS.get(Path(self.dataset_name or "").suffix)

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
        "sft",
        (DataOptions, ModelConfig, TrainingOptions, HubOptions, PublishOptions),
        foreign=_trainer_fields(),
    )
    if not {"-h", "--help"} & set(arguments):
        _, model, training, hub, publish = early.read(arguments)
        try:
            check(model, training, hub, publish)
        except ValueError as error:
            early.error(str(error))
    from hf_longalign.config import LongAlignSFTConfig

    classes = (DataOptions, LongAlignSFTConfig, ModelConfig, PublishOptions)
    return OptionParser("sft", classes, DESCRIPTION).read(arguments)


def check(model: ModelConfig, training: TrainingOptions, hub: HubOptions, publish: PublishOptions) -> None:
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
