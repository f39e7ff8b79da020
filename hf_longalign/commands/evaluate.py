"""Ask a model, and the adapter trained on it, the same questions: what `hf-longalign evaluate` runs."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hf_longalign.cards import write_adapter_card
from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import HubOptions, PublishOptions, destination, same_command
from hf_longalign.evaluation.options import ModelOptions, SuiteOptions
from hf_longalign.hub import check_base_name, publish_adapter
from hf_longalign.records import Report
from hf_longalign.training_options import CardOptions


DESCRIPTION = """Ask a model, and the adapter trained on it, the same questions, and write a report of what changed.

    hf-longalign evaluate Qwen/Qwen2.5-0.5B-Instruct
    hf-longalign evaluate Qwen/Qwen2.5-0.5B-Instruct --adapter outputs/qwen2.5-0.5b \\
        --suites needle puzzles ruler --output_dir outputs/report

Every answer is on disk as soon as it is there: the same command goes on where a killed one stopped. Several processes
with one output_dir share the questions: accelerate launch -m hf_longalign evaluate …, or one on each machine."""


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return the options of the models, the suites, the Hub, publishing and the card."""
    classes = (ModelOptions, SuiteOptions, HubOptions, PublishOptions, CardOptions)
    # A model may stand first without its option.
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    return OptionParser("evaluate", classes, DESCRIPTION).read(arguments, check)


def check(
    model: ModelOptions, suites: SuiteOptions, hub: HubOptions, publish: PublishOptions, card: CardOptions
) -> None:
    """Refuse what is wrong with several of the options together."""
    model.check_suites(suites.suites)
    publish.check_idle(push_to_hub=hub.push_to_hub)
    if hub.push_to_hub:
        if model.adapter is None:
            raise ValueError("`push_to_hub` adds the report to the card of an adapter, got none. Set `adapter`.")
        if Path(model.adapter).is_dir():
            check_base_name(card.base_name, model.model)
        else:
            hub.hub_model_id = hub.hub_model_id or model.adapter  # where it came from
        publish.check_push(hub, model.adapter)


def run(model: ModelOptions, suites: SuiteOptions, hub: HubOptions, publish: PublishOptions, card: CardOptions) -> int:
    """Ask, score, report, publish; the exit status is 1 where nothing was measured."""
    from hf_longalign.evaluation.evaluator import run as run_evaluation

    report, is_written = run_evaluation(model, suites)
    if not is_written:  # by another process
        return 0
    print((Path(suites.output_dir) / "report.md").read_text(encoding="utf-8"))
    print(f"Wrote {suites.output_dir}")
    if report.perplexity is None and not any(task.scores for suite in report.suites for task in suite.tasks):
        print("Nothing was measured; the report says why. The same command tries again.", file=sys.stderr)
        return 1
    if hub.push_to_hub:
        print(publish_report(model, suites.output_dir, hub, publish, card, report))
    return 0


def publish_report(
    model: ModelOptions,
    output_dir: str,
    hub: HubOptions,
    publish: PublishOptions,
    card: CardOptions,
    report: Report,
) -> str:
    """Publish the adapter with its report and a card that shows it, and return what to tell the user."""
    from hf_longalign.run_record import loaded_commit

    source = str(model.adapter)
    to = destination(hub, source)
    if not Path(source).is_dir():
        # What was evaluated, and not what somebody may have pushed since.
        commit = loaded_commit(source, "adapter_config.json", model.adapter_revision)
        source = snapshot_download(source, revision=commit or model.adapter_revision)
    with tempfile.TemporaryDirectory() as folder:
        # A copy, so that a push leaves no report in the folder of a training; optimiser state stays behind.
        staged = Path(folder) / "adapter"
        shutil.copytree(source, staged, ignore=shutil.ignore_patterns("checkpoint-*", "*.pt", "*.bin"))
        for name in ("report.json", "report.md", *report.images):
            shutil.copy(Path(output_dir) / name, staged)
        if "coverage.png" in report.images:  # the same, with the lengths that were evaluated
            (staged / "assets" / "coverage.png").unlink(missing_ok=True)
        write_adapter_card(staged, repo_id=to["repo_id"], **card.card())
        settings = {**to, "base_model": card.base_name, "resume_command": same_command()}
        return publish.push(partial(publish_adapter, staged, **settings), same_command())
