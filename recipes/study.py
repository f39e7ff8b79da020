# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_longalign[eval,synthesis]"]
#
# [tool.uv.sources]
# hf_longalign = { git = "https://github.com/hf-longalign/hf_longalign" }
# ///
"""Train arms that differ in one thing from a real model, ask all the same questions, and compare them in pairs.

    accelerate launch recipes/study.py --config recipes/smollm2-135m/study_cpu.yaml

Everything is kept in `output_dir`: a killed run goes on with the same command, trains no finished arm again and asks
nothing twice. Several processes given the same folder share the work, also on several machines that mount it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from study_arms import ARMS, PILOT, QUESTION_SEEDS, WRITTEN, StudyOptions, settings
from study_data import (
    Pair,
    compose_pilot,
    compose_rows,
    compose_written,
    composed_rows,
    documents,
    questions,
    read_documents,
    read_pairs,
    split_pairs,
)
from study_report import write_study
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import TrlParser

from hf_longalign import (
    LongAlignSFTConfig,
    LongAlignSFTTrainer,
    OpenAIGenerator,
    TransformersGenerator,
    load_adapter,
    scale_rope,
)
from hf_longalign.endpoint.protocol import Generator
from hf_longalign.evaluation.claims import Claims
from hf_longalign.evaluation.generation import LocalGenerator
from hf_longalign.evaluation.needles import score_needle
from hf_longalign.evaluation.perplexity import perplexity_by_position, position_edges
from hf_longalign.evaluation.prompt import Prompt
from hf_longalign.evaluation.runner import Examinee, ResultStore, answers, ask
from hf_longalign.rope import model_range
from hf_longalign.run_record import versions
from hf_longalign.text import normalise, token_f1


logger = logging.getLogger("study")

# What may change from run to run of one study, and what it runs on.
MAY_DIFFER = {"arms", "training_seeds", "cells", "split", "machine", *versions()}
# Tokens of a text that is short to every model: where a regression would be seen.
SHORT = 2048


class Unit(NamedTuple):
    """A piece of work: where its result goes, what must be there before, and how it is done."""

    result: Path
    needs: tuple[Path, ...]
    run: Callable[[], dict[str, Any]]


class StepClock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop when the GPU is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


class Study:
    """The data, the arms and the work still to do."""

    def __init__(self, options: StudyOptions) -> None:
        self.options, self.folder = options, Path(options.output_dir)
        self.models: dict[tuple[str, int], Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        # A writer counts as soon as an arm is added that needs one.
        own = {"writer": Path(options.writer).name, "context_words": options.context_words}
        # Whatever a folder is called in public.
        own |= {"model": Path(options.model).name if Path(options.model).is_dir() else options.model}
        check_same(self.folder / "settings.json", settings(options) | own)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.config = AutoConfig.from_pretrained(options.model)
        self.reach = model_range(self.config)
        pairs = read_pairs(options.seeds, most=options.most_pairs)
        self.pairs = split_pairs(pairs, self.count, rows=options.rows, gold_tokens=options.gold_tokens)
        sizes = ", ".join(f"{len(own)} {name}" for name, own in self.pairs.items())
        logger.info("%d usable pairs: %s.", len(pairs), sizes)
        shortest = min(options.grid)[0]
        for length, text in options.grid:
            if length == shortest:
                self.prompts(length, text)  # one without room is refused before anything is trained

    def count(self, text: str) -> int:
        """Return the tokens a model is given for a text, chat template included."""
        messages = [{"role": "user", "content": text}]
        return len(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    @property
    def asked(self) -> list[Pair]:
        """The pairs that are asked."""
        return self.pairs[self.options.split]

    def units(self) -> Iterator[Unit]:
        """Yield all work in order: seed by seed the training, then text by text all arms."""
        options = self.options
        for name in self.sources:
            yield Unit(self.composed(name), (), lambda n=name: self.compose(n))
        for seed in options.training_seeds:
            arms = [arm for arm in options.arms if ARMS[arm].strategy or seed == options.training_seeds[0]]
            for arm in arms:
                if ARMS[arm].strategy:
                    needs = tuple(map(self.composed, self.sources))
                    needs += (self.trained("ordinary", seed),) if ARMS[arm].timed else ()
                    yield Unit(self.trained(arm, seed), needs, lambda a=arm, s=seed: self.train(a, s))
            for cell in [*options.grid[:1], None, *options.grid[1:]]:
                for arm in arms:
                    if cell and cell[0] > self.range_of(arm):
                        continue  # nobody asks a model past its range
                    name = "perplexity" if cell is None else f"{cell[0]}-{cell[1]}"
                    result = self.arm_folder(arm, seed) / options.split / f"{name}.json"
                    needs = (self.trained(arm, seed),) if ARMS[arm].strategy else ()
                    yield Unit(result, needs, lambda a=arm, s=seed, c=cell: self.examine(a, s, c))

    def range_of(self, arm: str) -> int:
        """The longest text that an arm is given, in tokens."""
        return max(self.reach, self.options.target_length) if ARMS[arm].scaled else self.reach

    def arm_folder(self, arm: str, seed: int) -> Path:
        """Where all of an arm is kept."""
        return self.folder / "arms" / f"{arm}-{seed}"

    def trained(self, arm: str, seed: int) -> Path:
        """The file that says that an arm is trained."""
        return self.arm_folder(arm, seed) / "training.json"

    @property
    def sources(self) -> dict[str, tuple[str, int]]:
        """The rows that are made: their folder, of which pairs, and how long."""
        options = self.options
        trained = [ARMS[arm] for arm in options.arms if ARMS[arm].strategy]
        found = {what.rows: ("train", options.target_length if what.long else options.row_tokens) for what in trained}
        if options.distances:
            found["data_distances"] = ("development", options.row_tokens)
        return found

    def composed(self, name: str) -> Path:
        """The file that says that rows are made."""
        return self.folder / name / "composed.json"

    def compose(self, name: str) -> dict[str, Any]:
        """Make the rows of a folder."""
        split, tokens = self.sources[name]
        pairs, folder, options = self.pairs[split], self.folder / name, self.options
        if name in PILOT:
            compose_pilot(pairs, folder, self.count, kind=name, tokens=tokens, general=options.general)
        elif name in WRITTEN:
            kind, contexts = WRITTEN[name]
            words, general = options.context_words, options.general
            compose_written(pairs, folder, self.writer(), kind=kind, contexts=contexts, words=words, general=general)
        else:
            compose_rows(pairs, folder, tokenizer=self.options.model, tokens=tokens)
        return {"pairs": len(pairs)}

    def writer(self) -> Generator:
        """Return who writes the rows of some arms: a server, or a local model."""
        options = self.options
        if options.writer_endpoints:
            return OpenAIGenerator(options.writer, options.writer_endpoints)
        return TransformersGenerator(options.writer)

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm from the model and save its adapter."""
        more: dict[str, Any] = {}
        if ARMS[arm].timed:
            seconds = json.loads(self.trained("ordinary", seed).read_text())["seconds"]
            probe, clock = self.trainer(arm, seed, max_steps=3)
            probe.train()
            more["max_steps"] = max(1, round(seconds / min(clock.seconds)))
        trainer, clock = self.trainer(arm, seed, **more)
        trainer.train()
        trainer.save_model()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "seconds": round(sum(clock.seconds), 1),
            "steps": trainer.state.global_step,
            "rows": len(trainer.train_dataset),
            "tokens": trainer.state.num_input_tokens_seen,
            "loss_first": round(sum(history[:3]) / len(history[:3]), 4),
            "loss_last": round(sum(history[-3:]) / len(history[-3:]), 4),
        }

    def trainer(self, arm: str, seed: int, **more: Any) -> tuple[LongAlignSFTTrainer, StepClock]:
        """Return the trainer of an arm, and what times its steps."""
        options, what, gpu = self.options, ARMS[arm], torch.cuda.is_available()
        rows = composed_rows(self.folder / what.rows, parts=what.parts)
        micro = 1 if what.long else options.micro_batch_size
        trainer = LongAlignSFTTrainer(
            options.model,
            args=LongAlignSFTConfig(
                output_dir=str(self.arm_folder(arm, seed) / "adapter"),
                num_train_epochs=options.epochs,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=max(1, options.batch_size // micro),
                learning_rate=options.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                max_length=self.sources[what.rows][1],
                assistant_only_loss=True,
                loss_weighting="sequence",
                skip_strategy=what.strategy,
                skip_target_length=options.target_length,
                skip_probability=options.skip_probability if what.share is None else what.share,
                rope_type=options.rope_type,
                eval_distances=options.distances or None,
                model_init_kwargs={"dtype": options.dtype},
                bf16=gpu,
                use_cpu=not gpu,
                gradient_checkpointing=what.long,
                include_num_input_tokens_seen="non_padding",
                seed=seed,
                base_name=options.base_name,
                license="apache-2.0",
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=gpu,
                **more,
            ),
            train_dataset=rows,
            # With their parts for every arm: all are asked at the same distances.
            eval_dataset=composed_rows(self.folder / "data_distances") if options.distances else None,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(
                r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules=options.lora_target_modules
            ),
        )
        trainer.add_callback(clock := StepClock())
        return trainer, clock

    def load(self, arm: str, seed: int) -> Any:
        """Load the model of an arm, or take it from among those that were asked last."""
        if (arm, seed) not in self.models:
            if len(self.models) >= self.options.models_kept:
                self.models.pop(next(iter(self.models)))
            self.models[arm, seed] = self._loaded(arm, seed)
        return self.models[arm, seed]

    def _loaded(self, arm: str, seed: int) -> Any:
        options, what = self.options, ARMS[arm]
        device = {"": 0} if torch.cuda.is_available() else None
        kwargs: dict[str, Any] = {"dtype": options.dtype, "device_map": device}
        if what.strategy:
            return load_adapter(self.arm_folder(arm, seed) / "adapter", base_model=options.model, **kwargs).eval()
        config = self.config
        if what.scaled:
            config = scale_rope(config, options.target_length, options.rope_type)
        return AutoModelForCausalLM.from_pretrained(options.model, config=config, **kwargs).eval()

    def examine(self, arm: str, seed: int, cell: tuple[int, int] | None) -> dict[str, Any]:
        """Ask an arm everything about one text, or read its perplexity below 2,048 tokens (`cell` is None)."""
        model = self.load(arm, seed)
        start = time.perf_counter()
        if cell is None:
            losses, positions = self.losses(model), self.positions(model, self.range_of(arm))
            return {"losses": losses, "positions": positions, "seconds": round(time.perf_counter() - start, 1)}
        options, prompts = self.options, self.prompts(*cell)
        generator = LocalGenerator(model, self.tokenizer, batch_tokens=max(options.batch_tokens, 4 * cell[0]))
        examinee = Examinee(arm, f"{arm}-{seed}", generator)
        with ResultStore(self.arm_folder(arm, seed) / options.split / "answers") as store:
            ask(examinee, prompts, store, progress=False)
            found = answers(examinee, prompts, store)
        scored = [as_json(prompt, scores(prompt, answer.text)) for prompt, answer in zip(prompts, found, strict=True)]
        return {"scores": scored, "seconds": round(time.perf_counter() - start, 1), **asdict(generator.stats)}

    def prompts(self, length: int, text: int) -> list[Prompt]:
        """Return what is asked about a text."""
        options = self.options
        return questions(
            self.asked,
            self.count,
            length=length,
            text=text,
            seed=QUESTION_SEEDS[options.split],
            needles=options.needles,
            keys_at_once=options.keys_at_once,
            most_golds=options.most_golds,
        )

    def losses(self, model: Any) -> list[list[float]]:
        """Return the sum of the losses and the number of tokens of each document, read in windows below 2,048."""
        window = min(SHORT, self.reach)
        found = []
        for ids in self.documents(window)[: self.options.perplexity_documents]:
            loss = perplexity_by_position(model, [ids], window=window, stride=window)
            found.append([float(loss.sums.sum()), int(loss.counts.sum())])
        return found

    def positions(self, model: Any, window: int) -> dict[str, list[float]] | None:
        """Return the losses of long documents by position; of a shorter range the beginning of each."""
        longest = max(self.reach, self.options.target_length)
        given = [ids[:window] for ids in self.documents(longest)[: self.options.position_documents]]
        if not given:
            return None
        loss = perplexity_by_position(model, given, window=window, stride=window)
        return {"edges": position_edges(window), "sums": loss.sums.tolist(), "counts": loss.counts.tolist()}

    def documents(self, tokens: int) -> list[list[int]]:
        """Return the texts whose perplexity is read, cut to so many tokens each."""
        folder = self.options.perplexity_texts
        texts = read_documents(folder) if folder else documents(self.asked)
        ids = self.tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]


def scores(prompt: Prompt, answer: str) -> dict[str, float]:
    """Return the score of an answer by its metric: of one key exact match, of several the share of values found."""
    if prompt.task == "passages":
        return {"qa_f1": max(token_f1(normalise(answer).split(), normalise(one).split()) for one in prompt.answers)}
    metric = "exact_match" if prompt.task == "multi_key" else "recall"
    return {metric: score_needle(prompt, answer)[metric]}


def as_json(prompt: Prompt, scored: dict[str, float]) -> dict[str, Any]:
    """Return a scored answer as it is kept."""
    (score,) = scored.values()
    return {
        "task": prompt.task,
        "length": prompt.length,
        "sample": prompt.parts[0],
        "depth": prompt.depth,
        "score": score,
    }


def check_same(file: Path, told: dict[str, Any]) -> None:
    """Refuse a folder whose results were made otherwise; more arms, seeds and texts may be added.

    Raises:
        ValueError: what differs, by name.
    """
    told = json.loads(json.dumps({name: value for name, value in told.items() if name not in MAY_DIFFER}))
    if not file.exists():
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(told, indent=2), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(part, file)  # of several that begin at once, one
        part.unlink()
    before = json.loads(file.read_text("utf-8"))
    for name in before.keys() | told.keys():
        if before.get(name) != told.get(name):
            raise ValueError(
                f"`{name}` must be {before.get(name)!r}, as in the results in {file.parent}, got {told.get(name)!r}. "
                "Set it so, or another `output_dir`."
            )


def one_of_several() -> None:
    """Make each of several processes that were launched together one by itself, with a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rank = int(os.environ["LOCAL_RANK"])
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[rank % len(seen)] if seen[0] else str(rank)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def work(units: list[Unit], folder: Path, minutes: float | None = None) -> bool:
    """Do all units that nobody else does, in order; wait for those of others. Return whether all are done."""
    start, claims = time.monotonic(), Claims(folder / "claims")
    while missing := [unit for unit in units if not unit.result.exists()]:
        for unit in missing:
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                claims.close()
                return False
            # By its place in the folder, which another machine may have mounted elsewhere.
            name = str(unit.result.relative_to(folder))
            if not all(needed.exists() for needed in unit.needs) or not claims.take(name):
                continue
            if not unit.result.exists():
                unit.result.parent.mkdir(parents=True, exist_ok=True)
                part = unit.result.with_suffix(".part")
                part.write_text(json.dumps(unit.run()), encoding="utf-8")
                os.replace(part, unit.result)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # what training held, other processes on this GPU ask for
                logger.info("%s", "/".join(unit.result.parts[-3:]))
            claims.release([name])
            break
        else:
            time.sleep(1)
    claims.close()
    return True


def main() -> None:
    """Do what is left of the study, then write the report of what is there."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    one_of_several()
    (options,) = TrlParser([StudyOptions], description=__doc__).parse_args_and_config()
    study = Study(options)
    complete = work(list(study.units()), study.folder, options.minutes)
    titles = {arm: what.title for arm, what in ARMS.items() if arm in options.arms}
    path = write_study(study.folder, titles, options.split, settings(options), complete=complete)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
