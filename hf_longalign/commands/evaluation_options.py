"""The options of `evaluate`, and what is wrong with them before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_longalign.commands.options import OptionParser
from hf_longalign.commands.publishing import AdapterCardOptions, HubOptions, PublishOptions
from hf_longalign.evaluation.options import ModelOptions, SuiteOptions
from hf_longalign.hub import check_base_name


DESCRIPTION = """Ask a model, and the adapter trained on it, the same questions, and write a report of what changed.

    hf-longalign evaluate Qwen/Qwen2.5-0.5B-Instruct
    hf-longalign evaluate Qwen/Qwen2.5-0.5B-Instruct --adapter outputs/qwen2.5-0.5b \\
        --suites needle puzzles ruler --output_dir outputs/report

Every answer is on disk as soon as it is there: the same command goes on where a killed one stopped. Several processes
(accelerate launch -m hf_longalign evaluate …) share the questions."""


def read(arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return the options of the models, the suites, the Hub, publishing and the card."""
    classes = (ModelOptions, SuiteOptions, HubOptions, PublishOptions, AdapterCardOptions)
    parser = OptionParser("evaluate", classes, DESCRIPTION)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    model, suites, hub, publish, card = parser.read(arguments)
    try:
        suites.check(model.endpoint)
        publish.check_idle(push_to_hub=hub.push_to_hub)
        if hub.push_to_hub:
            _check_push(model, hub, publish, card)
    except ValueError as error:
        parser.error(str(error))
    return model, suites, hub, publish, card


def _check_push(model: ModelOptions, hub: HubOptions, publish: PublishOptions, card: AdapterCardOptions) -> None:
    if model.adapter is None:
        raise ValueError("`push_to_hub` adds the report to the card of an adapter, got none. Set `adapter`.")
    if Path(model.adapter).is_dir():
        check_base_name(card.base_name, model.model)
    else:
        hub.hub_model_id = hub.hub_model_id or model.adapter  # where it came from
    publish.check_push(hub, model.adapter)
