"""`evaluate`: ask a model, and the adapter trained on it, the same questions, and report what changed."""

import logging
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_longalign import __version__
from hf_longalign.evaluation import longbench
from hf_longalign.evaluation.endpoint import ServerFacts
from hf_longalign.evaluation.models import (
    ADAPTER,
    PROCESSES,
    Examined,
    load_model,
    public_name,
    published_config,
    record_of,
)
from hf_longalign.evaluation.options import ModelOptions, SuiteOptions
from hf_longalign.evaluation.perplexity import PerplexitySuite
from hf_longalign.evaluation.plan import GRIDS, announce, cells_to_refine, seconds_per_prompt
from hf_longalign.evaluation.prompt import Prompt, fingerprint, token_counter
from hf_longalign.evaluation.report import write_report
from hf_longalign.evaluation.runner import PAUSE, Examinee, PromptSuite, ResultStore, spent
from hf_longalign.evaluation.suites import Suite, make_suites, public_documents, uses_chat
from hf_longalign.known_answers import known_answers, not_past_range
from hf_longalign.records.report import Report
from hf_longalign.rope import rope_record


logger = logging.getLogger(__name__)

SERVED = "served answers"


def evaluate(model: str, adapter: str | None = None, **options: Any) -> Report:
    """Ask a model, and an adapter trained on it, the same questions, write the report's folder and return the report.

    Every answer is on disk as soon as it is there: the same call goes on where a killed one stopped.

    Args:
        model: directory or Hub id of the model; of an adapter, its base.
        adapter: directory or Hub id of the adapter.
        **options: fields of [`~hf_longalign.evaluation.options.ModelOptions`] and
            [`~hf_longalign.evaluation.options.SuiteOptions`].

    Raises:
        TypeError: an option that is none.
        ValueError: an option's value, an adapter of another base, or lengths beyond the model's range.

    Example:

    ```python
    report = evaluate("Qwen/Qwen2.5-0.5B-Instruct", "outputs/qwen2.5-0.5b", suites=["needle"], lengths=[4096, 16384])
    print(report.suites[0].reaches)
    ```
    """
    of_model, of_suites = ({field.name for field in fields(kind)} for kind in (ModelOptions, SuiteOptions))
    unknown = sorted(set(options) - of_model - of_suites)
    if unknown:
        known = ", ".join(sorted(of_model | of_suites))
        raise TypeError(f"`evaluate` has no option {unknown[0]!r}. It has {known}.")
    return run(
        ModelOptions(model, adapter, **{name: value for name, value in options.items() if name in of_model}),
        SuiteOptions(**{name: value for name, value in options.items() if name in of_suites}),
    )[0]


def run(model_options: ModelOptions, options: SuiteOptions) -> tuple[Report, bool]:
    """Do what [`evaluate`] does; also returns whether this process has written the report: of several one does."""
    model_options.check()
    options.check()
    model_options.check_suites(options.suites)
    examined = Examined.load(model_options)
    # No process group: whoever is lost, or never comes, must not hold up the others.
    with ResultStore(Path(options.output_dir) / "answers", PROCESSES) as store:
        for examinee in examined.who if model_options.endpoint is not None else ():
            refuse_unproven(examined, examinee, store)
        suites = make_suites(examined, options, store)
        facts = look_at_server(examined, suites, store)
        # What `refine` adds is part of the time that is told.
        minutes = options.minutes if options.samples is None else None
        announce(examined, suites, store, minutes)
        work(suites, examined, store)
        refine(examined, suites, options, store)
        store.tell_who_is_missing()
        report = make_report(examined, options, suites, store)
        report.settings.update(facts)
        # Every process returns the report, one alone writes it. Who comes last finds the place of the main process
        # free, and the report of this run written.
        written = Path(options.output_dir) / "report.json"
        if (written.exists() and written.stat().st_mtime_ns > store.claims.began) or not store.is_main:
            return report, False
        record = record_of(model_options.adapter, model_options.adapter_revision)
        return write_report(options.output_dir, report, coverage=record.coverage if record else None), True


def work(suites: Sequence[Suite], examined: Examined, store: ResultStore) -> None:
    """Ask until every answer is there; what other processes are at is waited for, and asked where they are lost."""
    told, pause = time.monotonic(), PAUSE
    while True:
        for suite in suites:
            suite.work(examined.who, store)
        missing = store.missing(key for suite in suites for key in suite.keys(examined.who))
        if not missing:
            return
        if time.monotonic() - told > 60:
            told = time.monotonic()
            logger.info("Waiting for %d results of other processes in %s.", len(missing), store.folder)
        time.sleep(pause)
        pause = min(2 * pause, 10.0)  # many looks would keep a network disk busy


def refine(examined: Examined, suites: Sequence[Suite], options: SuiteOptions, store: ResultStore) -> None:
    """Ask more samples where intervals are wide, until none is wider than ± 3 points or the minutes are over.

    Every process decides by the same results, and so decides the same.
    """
    # Numbers of samples that were asked for are kept; and a server's answers may cost money, which time does not
    # bound.
    if options.samples is not None or examined.model is None:
        return
    grids = [suite for suite in suites if isinstance(suite, PromptSuite) and suite.make is not None]
    while True:
        prompts = [prompt for suite in grids for prompt in suite.prompts]
        left = 60 * options.minutes - sum(spent(one, prompts, store).seconds for one in examined.who)
        costs = seconds_per_prompt(examined.who, prompts, store)
        more = []
        for suite in grids:
            cells = cells_to_refine(suite.results(examined.who, store), suite.prompts, costs, left)
            left -= sum(cell.seconds for cell in cells)
            more += [(suite, cell) for cell in cells]
        if not more:
            return
        if store.is_main:
            logger.info("Intervals are wide at %d tasks and lengths: more samples are asked there.", len(more))
        for suite, cell in more:
            suite.extend(cell.task, cell.length, cell.samples)
        work(grids, examined, store)


def look_at_server(examined: Examined, suites: Sequence[Suite], store: ResultStore) -> dict[str, Any]:
    """Ask a server about the range of each model, unless an earlier run did; nothing where the model is local."""
    prompts = [prompt for suite in suites if isinstance(suite, PromptSuite) for prompt in suite.prompts]
    if examined.options.endpoint is None:
        return {}
    longest = max(prompts, key=lambda prompt: len(prompt.text) + prompt.max_new_tokens, default=None)
    told: dict[str, Any] = {}
    for examinee in examined.who:
        server: Any = examinee.generator
        settings: dict[str, Any] = {}
        if longest is not None:  # lm-eval makes the prompts of the short suite itself
            count = token_counter(examined.tokenizer, chat=longest.chat)
            found = store.once(examinee.key(f"server/{longest.key}"), partial(server.look, longest, count))
            settings = ServerFacts(**found).settings()
        settings |= check_served(examined, examinee, store)
        told |= {f"{examinee.label}: {name}": value for name, value in settings.items()}
    return told


def source_of(options: ModelOptions, examinee: Examinee) -> tuple[str, str | None]:
    """Return name and revision of what an examinee of a server is: the adapter, or the model."""
    if examinee.label == ADAPTER and options.adapter is not None:
        return options.adapter, options.adapter_revision
    return options.model, options.model_revision


def refuse_unproven(examined: Examined, examinee: Examinee, store: ResultStore) -> None:
    """Refuse, before anything is asked, a server that cannot be told to scale RoPE as the training did.

    Raises:
        ValueError: RoPE was scaled, no answers are stored, and `check_served` does not say what to do without.
    """
    options, (name, revision) = examined.options, source_of(examined.options, examinee)
    # A whole model's own config holds the scaling, which servers read.
    if options.check_served != "stored" or name != options.adapter or examinee.key(SERVED) in store:
        return
    record = record_of(name, revision)
    if record is None or (record.answers is not None and record.answers.answers):
        return
    kinds = sorted({str(part.get("rope_type", "default")) for part in record.rope.parts} - {"default"})
    if kinds and record.rope != rope_record(published_config(options)):
        reach = record.rope.max_position_embeddings or 0
        raise ValueError(
            f"`check_served` must be 'local' or 'off' for {name!r}, got 'stored': it was trained with "
            f"{' and '.join(kinds)} RoPE for a range of {reach:,}, which servers leave out unless told, and no "
            "answers are stored to know it by. Set 'local' to load the model here and compare, 'off' to go without; "
            "or serve what `hf-longalign merge` writes, which stores answers."
        )


def check_served(examined: Examined, examinee: Examinee, store: ResultStore) -> dict[str, Any]:
    """Compare fixed answers of a served model with those of the one that was trained, unless an earlier run did."""
    options, key = examined.options, examinee.key(SERVED)
    name, revision = source_of(options, examinee)
    is_adapter, is_off = name == options.adapter, options.check_served == "off"
    try:
        record = record_of(name, revision)
    except ConnectionError:
        if is_adapter and not is_off:
            raise
        return {"answers as trained": "not compared, as the Hub could not be asked how the model was trained"}
    if record is None:
        return {}
    if is_off:
        return {"answers as trained": "not compared, as `check_served` is off"}
    if key not in store:
        expected = record.answers
        if not (expected and expected.answers) and options.check_served == "local":
            model = load_model(replace(options, adapter=options.adapter if is_adapter else None))
            expected = known_answers(model, examined.tokenizer, record.rope)
        if not expected or not expected.answers:
            remedy = "the model is sure of none" if options.check_served == "local" else "none are stored"
            return {"answers as trained": f"not compared, as {remedy}"}
        server: Any = examinee.generator
        missing = not_past_range(expected, record.rope)
        if missing:
            logger.warning("Of the answers of %r that the server is compared with, %s.", name, missing)
        store.once(key, lambda: server.check_answers(expected, name) + (f"; {missing}" if missing else ""))
    return {"answers as trained": store.get(key)}


def make_report(examined: Examined, options: SuiteOptions, suites: Sequence[Suite], store: ResultStore) -> Report:
    """Gather the results of all processes."""
    prompts = [prompt for suite in suites if isinstance(suite, PromptSuite) for prompt in suite.prompts]
    perplexity = next((suite for suite in suites if isinstance(suite, PerplexitySuite)), None)
    return Report(
        models=examined.models(),
        suites=[suite.results(examined.who, store) for suite in suites if not isinstance(suite, PerplexitySuite)],
        prompts=fingerprint(key for suite in suites for key in suite.asked()),
        settings=settings(examined, options, prompts, store),
        date=date.today().isoformat(),
        perplexity=perplexity.results(examined.who, store) if perplexity else None,
        speed={examinee.label: spent(examinee, prompts, store) for examinee in examined.who} if prompts else {},
        hf_longalign=__version__,
    )


def settings(
    examined: Examined, options: SuiteOptions, prompts: Sequence[Prompt], store: ResultStore
) -> dict[str, Any]:
    """Return what a reader must know to ask the same again."""
    local = examined.model is not None
    through = "endpoint" if examined.options.endpoint is not None else examined.options.generator
    chosen: dict[str, Any] = {"seed": options.seed, "through": through}
    chosen["chat template"] = "yes" if uses_chat(examined, options) else "no"
    if GRIDS & set(options.suites):
        chosen["haystack"] = public_documents(options.haystack)
        chosen["lengths"] = sorted({prompt.length for prompt in prompts if prompt.length})
    if "needle" in options.suites:
        chosen.update({"depths of the needle": options.depths, "room for the answer": options.max_new_tokens})
    if "ruler" in options.suites:
        chosen["questions for RULER"] = public_name(options.ruler_questions) if options.ruler_questions else "invented"
    if "perplexity" in options.suites:
        chosen["perplexity documents"] = public_documents(options.perplexity_documents or options.haystack)
    if "short" in options.suites:
        chosen["lm-eval"] = version("lm-eval")
    if "longbench" in options.suites:
        asked = longbench.expand_tasks(options.longbench_tasks)
        own = sorted({longbench.V2_HUB_ID if task == longbench.V2 else longbench.HUB_ID for task in asked})
        source = options.longbench_source
        chosen["LongBench data"] = public_name(source) if source else ", ".join(own)
        chosen["LongBench prompts"] = f"at most {options.longbench_length or examined.reach:,} tokens"
    if options.limit is not None:
        chosen["limit"] = options.limit
    if local:
        chosen.update(dtype=str(examined.model.dtype).removeprefix("torch."), range=examined.reach)
        chosen.update(torch=torch.__version__, transformers=transformers.__version__)
        cpu = f"CPU, {torch.get_num_threads()} threads"
        chosen["hardware"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
        chosen["processes"] = len(list(store.folder.glob("results-*.jsonl")))
    return chosen
