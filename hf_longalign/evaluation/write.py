"""Writing a report folder: `report.json`, `report.md` and the pictures."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_longalign.coverage_plot import plot_coverage
from hf_longalign.evaluation.pictures import draw_pictures
from hf_longalign.evaluation.report import render_report
from hf_longalign.records.base import dumps
from hf_longalign.records.report import Report
from hf_longalign.records.training import CoverageRecord


logger = logging.getLogger(__name__)


def write_report(
    folder: str | Path, report: dict[str, Any], *, coverage: CoverageRecord | None = None
) -> dict[str, Any]:
    """Write a report and return it with the names of its `images`; without matplotlib, without them.

    Args:
        folder: where it goes; files of an earlier report are replaced.
        report: see [`render_report`].
        coverage: what the adapter's training covered, from its record: drawn against the lengths evaluated.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        images = draw_pictures(report, folder)
        if coverage is not None and coverage.histogram.pairs:
            images.append(_draw_coverage(report, coverage, folder).name)
    except ImportError as error:
        logger.warning("The report has no pictures: %s", error)
        images = []
    report = {**report, "images": images}
    _replace(folder / "report.json", dumps(typed_report(report)))
    _replace(folder / "report.md", render_report(report))
    return report


def typed_report(report: Mapping[str, Any]) -> Report:
    """Return the results as the record that is stored, and that a card is made from."""
    labels = [model["label"] for model in report["models"]]
    suites = [_typed_suite(suite, labels, report.get("settings") or {}) for suite in report["suites"]]
    found = {**report, "suites": suites}
    if report.get("perplexity"):
        found["perplexity"] = {**report["perplexity"], "values": report["perplexity"]["perplexity"]}
    return Report.from_json(found)


def _typed_suite(suite: Mapping[str, Any], labels: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    tasks = []
    for task in suite["tasks"]:
        known = {name: value for name, value in task.items() if value is not None}
        if "difference" in known:
            known["differences"] = [{"label": labels[-1], "reference": labels[0], **known["difference"]}]
        if "grid" in known:
            known["grid"] = {**known["grid"], "cells": {label: known["grid"][label] for label in labels}}
        if suite["suite"] == "needle" and "haystack" in settings:
            known["haystack"] = settings["haystack"]
        tasks.append(known)
    return {"suite": suite["suite"], "tasks": tasks, "groups": suite.get("groups") or []}


def _draw_coverage(report: Mapping[str, Any], coverage: CoverageRecord, folder: Path) -> Path:
    tasks = [task for suite in report["suites"] for task in suite["tasks"]]
    lengths = {length for task in tasks for length in (task.get("grid") or {}).get("lengths", [])}
    lengths |= {task["length"] for task in tasks if task.get("length")}
    lengths |= {report["perplexity"]["window"]} if report.get("perplexity") else set()
    title = "Relative distances covered in training"
    return plot_coverage(coverage, folder / "coverage.png", evaluated_lengths=sorted(lengths), title=title)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
