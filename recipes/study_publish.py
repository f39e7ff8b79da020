# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_longalign[eval,synthesis]"]
#
# [tool.uv.sources]
# hf_longalign = { git = "https://github.com/hf-longalign/hf_longalign" }
# ///
"""Publish a trained arm of a study: its rows as a data set, its adapter with its answers, and the study's report.

    python recipes/study_publish.py --config recipes/smollm2-135m/study_cpu.yaml --hub_model_id user/smollm2-135m-16k

The options are those of the study. Nothing is asked again, and the study's own folders stay as they are.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from study import Study, scores
from study_arms import ARMS, StudyOptions, settings
from study_report import PICTURES, write_study
from trl import TrlParser

from hf_longalign import Report, __version__
from hf_longalign.cards.adapter import STUDY
from hf_longalign.commands.publishing import PublishOptions, RepositoryOptions, destination
from hf_longalign.evaluation.prompt import Completion, Prompt, fingerprint
from hf_longalign.evaluation.report import write_report
from hf_longalign.evaluation.results import suite_result
from hf_longalign.evaluation.runner import Examinee, ResultStore, answers, spent
from hf_longalign.hub import publish_adapter, publish_dataset
from hf_longalign.options import option
from hf_longalign.records.report import EvaluatedModel, Speed
from hf_longalign.records.training import HubSource
from hf_longalign.run_record import load_record, save_record


ADAPTER = "adapter"
DATA = "data"  # where the study keeps the rows that its arms are trained on
HEADING = "## The study it comes from"


@dataclass
class ArmOptions:
    """What is published, and beside what."""

    arm: str | None = option(None, "The arm whose adapter it is; unset: the last of `arms` that is trained.")
    against: list[str] = option(["scaled", "ordinary"], "Arms that its scores stand beside; the first is compared.")
    license: str | None = option(None, "Licence of the adapter, as the Hub names it.")
    hub_dataset_id: str | None = option(None, "Repository of the rows; unset: that of the adapter with -rows behind.")


def card_report(study: Study, arm: str, against: Sequence[str]) -> Report:
    """Return what an arm and others were asked, as the card of its adapter tells it: by the first seed.

    Raises:
        ValueError: not all of them were asked everything.
    """
    options, seed = study.options, study.options.training_seeds[0]
    asked: list[tuple[Prompt, Prompt]] = []
    counted: dict[tuple[bool, tuple[str, ...]], int] = {}
    for cell in options.grid:
        for prompt in study.prompts(*cell):
            # What is asked together is a sample, and of depths a card shows the quarters.
            sample = counted.setdefault((prompt.task == "passages", prompt.parts), len(counted))
            depth = None if prompt.depth is None else (int(4 * prompt.depth) + 0.5) / 4
            asked.append((prompt, replace(prompt, index=sample, depth=depth, parts=())))
    # Pictures are of the first task, and of those at the same depths: one key, which has some.
    asked.sort(key=lambda pair: pair[1].depth is None)
    nobody: Any = None  # stored answers are read, and no model is asked
    found: dict[str, list[Completion]] = {}
    speed: dict[str, Speed] = {}
    models, seconds = [], []
    for name in (*against, arm):
        what, label = ARMS[name], ADAPTER if name == arm else name
        folder = study.arm_folder(name, seed) / options.split / "answers"
        given = [prompt for prompt, _ in asked]
        examinee = Examinee(name, f"{name}-{seed}", nobody)
        seconds += [file.stat().st_mtime for file in folder.parent.glob("*.json")]  # when a text was asked about
        with ResultStore(folder) as store:
            left = store.missing(examinee.key(prompt.key) for prompt in given)
            if left:
                raise ValueError(
                    f"`arms` must hold {name}, asked everything, got {len(left)} of {len(given)} questions without an "
                    "answer. Run the study to its end first, with the same options."
                )
            found[label], speed[label] = answers(examinee, given, store), spent(examinee, given, store)
        title = f"{what.title}, seed {seed}" if what.strategy else what.title
        models.append(EvaluatedModel(label, options.base_name or options.model, what=title))
    suites = []
    for suite, passages in (("needle", False), ("passages", True)):
        chosen = [number for number, (_, prompt) in enumerate(asked) if (prompt.task == "passages") == passages]
        own = {label: [texts[number] for number in chosen] for label, texts in found.items()}
        prompts = [asked[number][1] for number in chosen]
        suites.append(suite_result(suite, prompts, own, scores, haystack="passages of other questions"))
    return Report(
        models=models,
        suites=suites,
        prompts=fingerprint(prompt.key for prompt, _ in asked),
        settings=settings(options),
        date=date.fromtimestamp(max(seconds)).isoformat(),
        speed=speed,
        hf_longalign=__version__,
    )


def write_adapter(study: Study, arm: str, against: Sequence[str], dataset_id: str) -> Path:
    """Write what is published of an arm into a folder of its own, and return it."""
    options = study.options
    report = card_report(study, arm, against)
    own = study.arm_folder(arm, options.training_seeds[0])
    folder = study.folder / "publish" / own.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(own / ADAPTER, folder)
    record = replace(load_record(folder), data=HubSource(dataset_id, split="train"))
    save_record(folder, record)
    write_report(folder, report, coverage=record.coverage)
    titles = {name: what.title for name, what in ARMS.items() if name in options.arms}
    told = write_study(study.folder, titles, options.split, settings(options))
    (folder / "assets").mkdir(exist_ok=True)
    for name in PICTURES:
        shutil.copy(study.folder / name, folder / "assets" / f"study_{name}")
    (folder / STUDY).write_text(as_section(told.read_text(encoding="utf-8")), encoding="utf-8")
    return folder


def as_section(report: str) -> str:
    """Return the report of a study as a part of a card: its verdict and pictures, and the rest folded.

    >>> print(as_section("# Arms\\n\\n- A leads.\\n\\n![Curve](curve.png)\\n\\n## Needles\\n\\nMany.\\n"), end="")
    ## The study it comes from
    <BLANKLINE>
    - A leads.
    <BLANKLINE>
    ![Curve](assets/study_curve.png)
    <BLANKLINE>
    <details><summary>All of its report</summary>
    <BLANKLINE>
    ### Needles
    <BLANKLINE>
    Many.
    <BLANKLINE>
    </details>
    """
    _, _, body = report.partition("\n\n")
    body = re.sub(r"\]\((\w+\.png)\)", r"](assets/study_\1)", body)
    first, _, rest = body.partition("\n## ")
    rest = re.sub(r"^## ", "### ", "## " + rest, flags=re.MULTILINE)
    parts = [HEADING, first.strip(), "<details><summary>All of its report</summary>", rest.strip(), "</details>"]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Publish the rows, then the adapter, which names them."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = TrlParser([StudyOptions, ArmOptions, RepositoryOptions, PublishOptions], description=__doc__)
    options, chosen, hub, publish = parser.parse_args_and_config()
    trained = [name for name in options.arms if ARMS[name].strategy and ARMS[name].rows == DATA]
    arm = chosen.arm or (trained[-1] if trained else None)
    if arm is None or arm not in trained or not hub.hub_model_id:
        raise ValueError(
            f"`arm` must be one of {', '.join(trained)}, and `hub_model_id` a repository, got {arm!r} and "
            f"{hub.hub_model_id!r}. Set both."
        )
    name = options.base_name or options.model
    if Path(name).is_dir():
        raise ValueError(f"`base_name` must be the Hub id of the model, got none for the folder {name!r}. Set it.")
    publish.check_push(hub, options.output_dir)
    study = Study(options)
    adapter, rows = destination(hub, options.output_dir), destination(hub, options.output_dir)
    rows["repo_id"] = chosen.hub_dataset_id or f"{hub.hub_model_id}-rows"
    folder = write_adapter(study, arm, [name for name in chosen.against if name != arm], rows["repo_id"])
    given = publish.options()
    facts = {"base_model": name, "license": chosen.license}
    looks = [None if given["dry_run"] is None else str(Path(given["dry_run"]) / kind) for kind in ("rows", ADAPTER)]
    print(publish_dataset(study.folder / DATA / "dataset", **rows, **{**given, "dry_run": looks[0]}))
    print(publish_adapter(folder, **adapter, **facts, **{**given, "dry_run": looks[1]}))


if __name__ == "__main__":
    main()
