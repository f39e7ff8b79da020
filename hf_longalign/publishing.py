"""`PublishingSFTTrainer`: TRL's `SFTTrainer` with the card, the record and the push of this package."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers.trainer_utils import HubStrategy
from trl import SFTTrainer

from hf_longalign.adapter import expected_mark, mark_scaled
from hf_longalign.config import LongAlignSFTConfig
from hf_longalign.records.training import HubSource, TrainingRecord
from hf_longalign.run_record import save_record


logger = logging.getLogger(__name__)


class PublishingSFTTrainer(SFTTrainer):
    """`SFTTrainer` that writes one and the same card into checkpoints, output folder and repository.

    A push is one commit, complete or not there at all, with nothing private in it.
    """

    args: LongAlignSFTConfig
    model: Any
    hub_model_id: Any
    _data_source: HubSource | None = None

    _tag_names = ["trl", "sft", "hf_longalign"]  # noqa: RUF012 - TRL's attribute

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_peft_model(self.model):
            # Else PEFT writes a template with nothing filled in into every folder, or into a person's card.
            self.model.create_or_update_model_card = lambda output_dir: None

    @property
    def bare_model(self) -> Any:
        """The model without the adapter on it, if there is one."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def training_record(self) -> TrainingRecord:
        """Return what a reader of the model or adapter must know to load, repeat and judge it."""
        raise NotImplementedError

    def create_model_card(  # type: ignore[override] # TRL's signature, not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card into `output_dir`: the one that checkpoints hold and [`push_to_hub`] publishes.

        What people wrote into the card that is there stays, see `hf_longalign.cards.merge_card`.

        Args:
            model_name: not used; the card is called after the base model.
            dataset_name: Hub id of the training data, where the data set itself does not tell.
            tags: more tags.
        """
        if dataset_name and self._data_source is None and not Path(dataset_name).exists():
            self._data_source = HubSource(dataset_name)
        if self.is_world_process_zero():
            self._write_card(str(self.args.output_dir), [tags] if isinstance(tags, str) else tags or ())

    def _write_card(self, folder: str, tags: Sequence[str] = ()) -> None:
        from hf_longalign.cards import write_adapter_card
        from hf_longalign.plots import draw_training

        record, config = self.training_record(), None
        if is_peft_model(self.model):
            # As PEFT saves it: sets of modules are lists there.
            plain = self.model.active_peft_config.to_dict()
            config = json.loads(json.dumps(plain, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
        try:
            draw_training(record, Path(folder) / "assets")
        except ImportError as error:
            logger.warning("The card has no picture: %s", error)
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            write_adapter_card(
                folder,
                record=record,
                adapter_config=config,
                tags=tags,
                **self.args.card(),
            )
        except ValueError as error:  # what a person wrote must not end a training; a push will say it again
            logger.warning("The card in %s stays as it is: %s", folder, error)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check what a push needs; the repository is made by the push, which is complete or changes nothing.

        Raises:
            ValueError: what no push could do, named by the option to set.
        """
        from hf_longalign.hub import Destination, check_base_name

        # Trainer calls this in its constructor, so that nobody trains for a push that cannot be.
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                "`hub_strategy` must be 'end' or 'every_save', got "
                f"{strategy.value!r}, which publishes optimizer states and pickles that hold paths of this machine. "
                "Set 'every_save', and resume from the checkpoints in `output_dir`."
            )
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name
        Destination(name, "model", branch=self.args.hub_revision).check()
        check_base_name(self.args.base_name, self.bare_model.config._name_or_path)
        self.hub_model_id = name

    def push_to_hub(  # type: ignore[override] # transformers' commit information is a string too
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        tag: str | None = None,
        dry_run: str | None = None,
        allow: Sequence[str] = (),
        **card: Any,
    ) -> str:
        """Save the model and publish it with its card as one commit, and return its URL.

        Everything is searched for what is private, compared after the push and repeated over failures that pass, see
        [`publish_adapter`]. Every process must call this; the main one pushes.

        Args:
            commit_message: message of the commit.
            blocking: not used: a push that fails must be seen, so it is waited for.
            token: a token with the right to write; `None`: `hub_token`, or the one of this machine.
            revision: branch to push to; `None`: `hub_revision`.
            private: whether a new repository is private; `None`: `hub_private_repo`.
            create_pr, tag, dry_run, allow: as in [`publish_adapter`].
            **card: arguments of [`create_model_card`].

        Raises:
            ValueError: what cannot be published as it is.
            PublishError: the push did not arrive whole; the message names the command that goes on.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.init_hf_repo()
        self.create_model_card(**card)  # what it is told goes into the record and the card that are saved next
        self.save_model(_internal_call=True)
        from hf_longalign.hub import on_main_process

        where = {"token": token, "branch": revision, "private": private}
        how = {"message": commit_message, "create_pr": create_pr, "tag": tag, "dry_run": dry_run, "allow": allow}
        return on_main_process(lambda: self._publish(str(self.args.output_dir), **where, **how))

    def _publish(self, folder: str, **given: Any) -> str:
        """Publish a folder; what is `None` or empty is as the arguments have it."""
        from hf_longalign.hub import publish_adapter

        args = self.args
        own = {"token": args.hub_token, "branch": args.hub_revision, "private": args.hub_private_repo}
        given = {name: value for name, value in given.items() if value not in (None, "")}
        return publish_adapter(folder, self.hub_model_id, base_model=args.base_name, **{**own, **given})

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer uploads in the background and drops what fails, with files of the checkpoint that are nobody's.
        if HubStrategy(self.args.hub_strategy) == HubStrategy.END:
            return

        from hf_longalign.hub import PublishError, on_main_process

        def publish() -> None:
            try:
                self._publish(checkpoint_folder, message=f"Training in progress, step {self.state.global_step}")
            except (ValueError, PublishError) as error:  # the training is worth more; the end pushes again
                logger.error("%s was not published, and the training goes on: %s", checkpoint_folder, error)

        on_main_process(publish)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with expected_mark():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with expected_mark():
            super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or str(self.args.output_dir)
            record = self.training_record()
            save_record(folder, record)
            if is_peft_model(self.model):
                mark_scaled(folder, record.rope, self.bare_model.config._name_or_path)
            self._write_card(folder)
