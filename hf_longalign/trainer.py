"""`LongAlignSFTTrainer`: TRL's `SFTTrainer` with skipped positions, exact packing and a proof of both."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
from accelerate.state import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, pack_dataset
from trl.data_utils import get_dataset_column_names

from hf_longalign import __version__
from hf_longalign.adapter import weights_sample
from hf_longalign.attention import exactness_problem, mark_boundaries, register_attention
from hf_longalign.callback import SkipPositionCallback, StreamCount, check_parallelism
from hf_longalign.collator import SkipPositionDataCollator
from hf_longalign.config import LongAlignSFTConfig, load_processing_class, model_config, scaled_rope
from hf_longalign.coverage import CoverageCallback
from hf_longalign.distances import WatchingSFTTrainer, first_documents
from hf_longalign.loss import (
    SequenceWeightedModel,
    fused_log_probs,
    ignore_padding_of_packed_rows,
    leave_head_uncompiled,
    one_label_per_sequence,
)
from hf_longalign.positions import BOUNDARY_STRATEGIES
from hf_longalign.preflight import check_no_virtual_tokens
from hf_longalign.preparation import (
    FLAGS,
    RowPreparer,
    as_conversations,
    is_fast,
    kept_tokens,
    lacks_marks,
    map_options,
    prepare_rows,
)
from hf_longalign.records.training import BatchesRecord, PositionsRecord, TrainingRecord
from hf_longalign.rope import check_range, model_range, rope_record
from hf_longalign.run_record import base_source, data_source, hardware, run_facts, versions


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)


class LongAlignSFTTrainer(WatchingSFTTrainer):
    """Supervised fine-tuning for long contexts from short data; used exactly like [`trl.SFTTrainer`].

    On top of it: positions are skipped as [`LongAlignSFTConfig`] says, where the rows tell their blocks (turns, the
    runs of ignored labels, a `parts` column with the character offsets of contexts and question, or `block_lengths`);
    packed rows run on an attention that keeps documents apart; the loss may weigh sequences instead of tokens; and a
    preflight proves all of it on the model before the first step. Evaluation keeps ordinary positions, so that its
    loss compares with any other run.

    Args:
        model: as in `SFTTrainer`.
        args: a [`LongAlignSFTConfig`]; any other training arguments are completed with its defaults.
        data_collator: `None`, or a [`SkipPositionDataCollator`] that replaces the fields of `args`. Another collator
            is taken only with `skip_strategy="none"`.
        train_dataset: as in `SFTTrainer`, like every argument after it.

    Raises:
        ValueError: the model cannot be trained exactly this way; the message names backend, layer kind and remedy.

    Example:

    ```python
    trainer = LongAlignSFTTrainer(
        "Qwen/Qwen2.5-0.5B-Instruct",
        args=LongAlignSFTConfig(output_dir="out", packing=True, max_length=4096, skip_target_length=32768),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
        peft_config=LoraConfig(),
    )
    trainer.train()
    ```
    """

    data_collator: Any

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
    ) -> None:
        args = LongAlignSFTConfig.of(args, model)
        own_collator = data_collator if isinstance(data_collator, SkipPositionDataCollator) else None
        if data_collator is not None and own_collator is None and args.skip_strategy != "none":
            raise ValueError(
                f"`data_collator` must be None or a SkipPositionDataCollator with "
                f"`skip_strategy={args.skip_strategy!r}`, got {type(data_collator).__name__}. "
                "Set `skip_strategy='none'` to keep your collator."
            )
        self._strategy = args.skip_strategy if own_collator is None else own_collator.strategy
        self._resumed = False
        self._stream_count = StreamCount(FLAGS.values())
        # Of the data set as given: what TRL makes of it may lie elsewhere.
        self._data_source = data_source(train_dataset)
        if args.assistant_only_loss and processing_class is None:
            processing_class = load_processing_class(model, args)
        self._answers_by_turns = (
            args.assistant_only_loss and formatting_func is None and lacks_marks(processing_class, train_dataset)
        )
        with scaled_rope(model, args), _unmarked_answers(args, self._answers_by_turns):
            # Else a target out of range would be refused after the whole data set has been prepared.
            asked, name = args.skip_target_length, "skip_target_length"
            if own_collator is not None:
                asked, name = own_collator.target_length, "target_length"
            if self._strategy != "none" and asked is not None:
                check_range(model_config(model, args), asked, name)
            if args.eval_distances:
                check_range(model_config(model, args), max(args.eval_distances), "eval_distances")
            super().__init__(
                model,
                args=args,
                # TRL refuses packed rows with any collator but its own, which ours replaces afterwards.
                data_collator=None if own_collator is not None else data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        self.add_callback(self._stream_count)
        # Before anything is wrapped, sharded or trained.
        self._base_weights = weights_sample(self.bare_model) if is_peft_model(self.model) else {}
        if self._is_vision_dataset and self._strategy != "none":
            raise ValueError("Positions are skipped in text alone, got a vision data set. Set `skip_strategy='none'`.")

        if own_collator is not None:
            if self.padding_free and not own_collator.padding_free:
                raise ValueError("`padding_free` of the collator must be True with packed rows, got False. Set it.")
            self.data_collator = own_collator
        elif data_collator is None and not self._is_vision_dataset:
            self.data_collator = self._make_collator()
        self.coverage: CoverageCallback | None = None
        if isinstance(self.data_collator, SkipPositionDataCollator):
            self._use_collator(self.data_collator)
        elif args.eval_distances:
            raise ValueError(
                "`eval_distances` needs the trainer's own collator or a SkipPositionDataCollator, got "
                f"{type(self.data_collator).__name__}. Leave `data_collator` or `eval_distances` out."
            )

    def _make_collator(self) -> SkipPositionDataCollator:
        target_length: Any = self.args.skip_target_length
        # A model without rotary positions has no range.
        if target_length is None and self._strategy != "none":
            target_length = model_range(self.model.config)
        return SkipPositionDataCollator(
            self._tokenizer,
            target_length=target_length,
            strategy=self._strategy,
            skip_probability=self.args.skip_probability,
            padding_free=self.padding_free,
            pad_to_multiple_of=self.args.pad_to_multiple_of,  # type: ignore[arg-type] # TRL has resolved "auto"
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            few_shapes=self.args.compiled,
        )

    def _use_collator(self, collator: SkipPositionDataCollator) -> None:
        """Set up everything that the training and evaluation batches of this collator need."""
        # TRL may pack evaluation rows alone; a padded batch would let their documents see each other.
        packs = collator.padding_free or bool(self.args.eval_packing)
        self._eval_collator = dataclasses.replace(collator, strategy="none", padding_free=packs)
        exact = collator.strategy != "none" or packs or bool(self.args.eval_distances)
        check_parallelism(whole_rows=exact or self.args.loss_weighting == "sequence")
        if exact:
            check_no_virtual_tokens(self.model)
        self._choose_attention(collator)
        if packs and collator.pad_to_multiple_of is not None and self.aux_loss_enabled:
            backbone = self.bare_model.base_model
            ignore_padding_of_packed_rows(backbone, collator.pad_token_id, collator.pad_to_multiple_of)
        if collator.strategy != "none":
            self._check_lengths(collator.target_length)
            self.coverage = CoverageCallback(collator.target_length, copies=self.get_tp_size())
            self.add_callback(self.coverage)
        self.add_callback(SkipPositionCallback(collator, preflight=self.args.preflight, log_probs=fused_log_probs))
        if self.args.eval_distances:
            self._watch_distances(self._eval_collator)

    def _choose_attention(self, collator: SkipPositionDataCollator) -> None:
        """Keep the model's attention where it is exact, else take "longalign_varlen", else refuse."""
        base = self.bare_model
        config = base.config.get_text_config()
        present = config._attn_implementation
        problem = self._attention_problem(config, present, collator)
        if problem is not None:
            if self._attention_problem(config, "longalign_varlen", collator) is not None:
                raise ValueError(problem)
            logger.warning(
                "Attention %r would not be exact here and is replaced by 'longalign_varlen': %s", present, problem
            )
        if problem is not None or present == "longalign_varlen":
            register_attention()
            base.set_attn_implementation("longalign_varlen")
            if config._attn_implementation != "longalign_varlen":
                # transformers only warns where a model computes its attention itself.
                raise ValueError(
                    f"{type(base).__name__} computes its attention itself, and {present!r} is not exact here for "
                    "packed rows or skipped positions. Set packing=False and skip_strategy='none'."
                )

    def _attention_problem(self, config: Any, attention: str, collator: SkipPositionDataCollator) -> str | None:
        """Why an attention is not exact for the training or the evaluation batches."""
        packs, target_length = self._eval_collator.padding_free, collator.target_length
        asked = [(collator.padding_free, collator.strategy != "none", target_length), (packs, False, target_length)]
        asked += [(packs, True, distance) for distance in self.args.eval_distances or ()]
        problems = (
            exactness_problem(config, attention, packed=packed, skipped=skipped, target_length=length)
            for packed, skipped, length in asked
        )
        return next((problem for problem in problems if problem is not None), None)

    def _check_lengths(self, limit: Any) -> None:
        """Refuse before the first step what the collator would refuse in the middle of a run."""
        truncated = self.args.max_length is not None and self.args.max_length <= limit
        if (truncated and not self._skip_prepare_dataset) or not isinstance(self.train_dataset, Dataset):
            return
        column = "seq_lengths" if "seq_lengths" in self.train_dataset.column_names else "input_ids"
        if column not in self.train_dataset.column_names:
            return
        for table in self.train_dataset.select_columns([column]).with_format("arrow").iter(1000):
            rows = table[column]
            longest = pc.max(pc.list_flatten(rows) if column == "seq_lengths" else pc.list_value_length(rows)).as_py()
            if longest is not None and longest > limit:
                raise ValueError(
                    f"`skip_target_length` must be at least the longest sample, {longest} tokens, got {limit}. Lower "
                    "`max_length`, raise `skip_target_length` (with RoPE scaling past the model's range), or set "
                    "`skip_strategy='none'`."
                )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if packing and "seq_lengths" in get_dataset_column_names(dataset):
            return dataset  # packed already: packed again, it would forget where its documents end
        watched = bool(args.eval_distances) and dataset_name != "train"
        needs_blocks = watched or (self._strategy in BOUNDARY_STRATEGIES and dataset_name == "train")
        made_when_read = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"  # which TRL refuses
        if not (needs_blocks or self._answers_by_turns) or made_when_read:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        progress = map_options(dataset, args, f"Preparing {dataset_name} dataset")
        rows: Any = None
        if formatting_func is None and is_fast(processing_class):
            with PartialState().local_main_process_first():
                rows = as_conversations(dataset, **progress)
        if rows is None:
            # In rows with tokens it is a preparation's, else somebody's own, and perhaps the text itself.
            own = [name for name in get_dataset_column_names(dataset) if name in ("blocks", "input_ids")] == ["blocks"]
            # Text, and what only a processor or a slow tokenizer can read, is TRL's to tokenise.
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            rows = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
            if own and "blocks" in get_dataset_column_names(rows):
                rows = rows.remove_columns("blocks")
        preparer = RowPreparer(
            self._tokenizer,
            text_field=args.dataset_text_field,
            chat_template=self.chat_template,
            completion_only=self.completion_only_loss,
            answers_only="turns" if self._answers_by_turns else "marks" if args.assistant_only_loss else None,
            kept=kept_tokens(args, packing),
        )
        # The other processes of a machine find in the cache of `datasets` what the first one has made.
        with PartialState().local_main_process_first():
            dataset = prepare_rows(
                rows, preparer, dataset_name, only_tokens=packing, stream_count=self._stream_count, **progress
            )
            if watched:  # before they are packed and shuffled: the same rows for every run
                self._distance_rows[dataset_name] = first_documents(dataset, self.watched_rows)
            if packing:
                if args.shuffle_dataset:
                    dataset = dataset.shuffle(seed=args.seed)
                # Not TRL's preparation, which drops every column but `input_ids` and `labels` before this.
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, progress)
            return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        # Anew each time, for `data_collator` may be replaced, and others cannot make tensors of these columns.
        self._signature_columns = None
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if isinstance(self.data_collator, SkipPositionDataCollator):
            columns += ["blocks", "block_lengths"]

    @contextmanager
    def _ordinary_positions(self) -> Iterator[None]:
        train_collator = self.data_collator
        if isinstance(train_collator, SkipPositionDataCollator):
            self.data_collator = self._eval_collator
        try:
            yield
        finally:
            self.data_collator = train_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the evaluation dataloader, whose batches have ordinary positions."""
        with self._ordinary_positions():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the test dataloader, whose batches have ordinary positions."""
        with self._ordinary_positions():
            return super().get_test_dataloader(test_dataset)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if self.args.loss_weighting == "sequence" and batch_samples and "labels" in batch_samples[0]:
            # Trainer counts and gathers labels, the first of a row apart: hand it one per sequence that has targets.
            batch_samples = [{"labels": one_label_per_sequence(batch)} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch, weighted by token or by sequence; see [`trl.SFTTrainer.compute_loss`]."""
        # Another collator may have taken the place of ours, without positions.
        if self.model.training and self.coverage is not None and "position_ids" in inputs:
            self.coverage.observe(inputs)
        if self.args.compiled:
            mark_boundaries(inputs)
            leave_head_uncompiled()
        if self.args.loss_weighting == "sequence":
            model = SequenceWeightedModel(model, inputs, num_items_in_batch)
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding to a training log what the positions of all processes covered since the last one."""
        if self.model.training and self.coverage is not None:
            logs.update(self.coverage.metrics())
        super().log(logs, start_time)

    def training_record(self) -> TrainingRecord:
        """Return what a reader of the model or adapter must know to load, repeat and judge it."""
        collator, base = self.data_collator, self.bare_model
        positions, coverage = PositionsRecord(), None
        if self.coverage is not None and isinstance(collator, SkipPositionDataCollator):
            strategy = collator.strategy if isinstance(collator.strategy, str) else "callable"
            positions = PositionsRecord(strategy, collator.target_length, collator.skip_probability, collator.seed)
            coverage = self.coverage.record()
        options = self.args.model_init_kwargs
        return TrainingRecord(
            rope=rope_record(base.config),
            positions=positions,
            training=BatchesRecord(
                loss_weighting=self.args.loss_weighting,
                packing=self.args.packing,
                padding_free=bool(self.padding_free),
                max_length=self.args.max_length,
                attention=base.config.get_text_config()._attn_implementation,
            ),
            run=run_facts(self.args, self.state, resumed=self._resumed, copies=self.get_tp_size()),
            seed=self.args.seed,
            base=base_source(base.config, options.get("revision") if isinstance(options, dict) else None),
            architecture=type(base).__name__.removeprefix("FSDP"),  # FSDP2 renames the class while it trains
            data=self._data_source,
            coverage=coverage,
            distances=self.distances.record(self.state) if self.distances is not None else None,
            base_weights=self._base_weights,
            hardware=hardware(self.args),
            versions=versions(),
            hf_longalign=__version__,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.coverage is not None and self.args.should_save:
            self.coverage.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed = checkpoint is not None
        if self.coverage is not None and checkpoint is not None:
            self.coverage.load(checkpoint)


@contextmanager
def _unmarked_answers(args: LongAlignSFTConfig, unmarked: bool) -> Iterator[None]:
    """Keep TRL from refusing a template without marks; the answers are found all the same."""
    args.assistant_only_loss = args.assistant_only_loss and not unmarked
    try:
        yield
    finally:
        args.assistant_only_loss = args.assistant_only_loss or unmarked
