"""Ask a model, and the adapter trained on it, the same questions: what `hf-longalign evaluate` runs."""

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_longalign.cards import write_adapter_card
from hf_longalign.commands.publishing import AdapterCardOptions, HubOptions, PublishOptions, destination, same_command
from hf_longalign.evaluation.evaluator import run as run_evaluation
from hf_longalign.evaluation.options import ModelOptions, SuiteOptions
from hf_longalign.hub import publish_adapter
from hf_longalign.records import Report
from hf_longalign.run_record import loaded_commit


def run(
    model: ModelOptions, suites: SuiteOptions, hub: HubOptions, publish: PublishOptions, card: AdapterCardOptions
) -> int:
    """Ask, score, report, publish; the exit status is 1 where nothing was measured."""
    report = run_evaluation(model, suites)
    if report is None:  # another process writes it
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
    card: AdapterCardOptions,
    report: Report,
) -> str:
    """Publish the adapter with its report and a card that shows it, and return what to tell the user."""
    source = str(model.adapter)
    to = destination(hub, source)
    if not Path(source).is_dir():
        # What was evaluated, and not what somebody may have pushed since.
        commit = loaded_commit(source, "adapter_config.json", model.adapter_revision)
        source = snapshot_download(source, revision=commit or model.adapter_revision)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "adapter"
        shutil.copytree(source, staged, ignore=shutil.ignore_patterns("checkpoint-*", "*.pt", "*.bin"))
        for name in ("report.json", "report.md", *report.images):
            shutil.copy(Path(output_dir) / name, staged)
        if "coverage.png" in report.images:  # the same, with the lengths that were evaluated
            (staged / "assets" / "coverage.png").unlink(missing_ok=True)
        write_adapter_card(staged, repo_id=to["repo_id"], **card.card())
        settings = {**to, "base_model": card.base_name, "resume_command": same_command()}
        return publish.push(partial(publish_adapter, staged, **settings), same_command())
