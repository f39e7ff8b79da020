"""Telling the cards that TRL and PEFT write into every output folder from one that a person wrote or changed."""

import re
from collections.abc import Sequence

from hf_longalign.cards.facts import is_hub_id
from hf_longalign.cards.front_matter import Entry, list_items, to_yaml


# Every line of trl/templates/lm_model_card.md and what goes into it (TRL 0.20 to 1.16), code and citations apart.
_TRL = re.compile(
    r"""
    \#\ Model\ Card\ for\ .*
    | This\ model\ is\ a\ fine-tuned\ version\ of\ \[[^\]]*\]\([^)]*\)(\ on\ the\ \[.*\]\(.*\)\ dataset)?\.
    | It\ has\ been\ trained\ using\ \[TRL\]\(https://github\.com/huggingface/trl\)\.
    | \#\#\ (Quick\ start|Training\ procedure|Citations)
    | \#\#\#\ Framework\ versions
    | (\[<img\ src=[^>]*>\]\([^)]*\)\ *)+
    | This\ model\ was\ trained\ with\ \w+(,\ a\ method\ introduced\ in\ \[.*\]\(https://huggingface\.co/papers/.*\))?\.
    | -\ (PEFT|TRL|Transformers|Pytorch|Datasets|Tokenizers):?\ [\w.+]+
    | Cite\ [\w ]+\ as:
    """,
    re.VERBOSE,
)
# Every line of huggingface_hub/templates/modelcard_template.md, which PEFT fills in, and of what PEFT adds.
_HUB = re.compile(
    r"""
    <!--.*-->
    | (-\ \*\*[^*]+:\*\*\ )?\[More\ Information\ Needed\](\ <!--.*-->)?
    | \#{2,4}\ (
        Model\ (Details|Description|Sources|Examination|Card\ Authors|Card\ Contact|Architecture\ and\ Objective)
        | Uses | (Direct|Downstream|Out-of-Scope)\ Use | Bias,\ Risks,\ and\ Limitations | Recommendations
        | How\ to\ Get\ Started\ with\ the\ Model | Training\ (Details|Data|Procedure|Hyperparameters) | Preprocessing
        | Speeds,\ Sizes,\ Times | Evaluation | Testing\ Data(,\ Factors\ &\ Metrics)? | Factors | Metrics | Results
        | Summary | Environmental\ Impact | Technical\ Specifications | Compute\ Infrastructure | Hardware | Software
        | Citation | Glossary | More\ Information
    )(\ \[optional\])?
    | Use\ the\ code\ below\ to\ get\ started\ with\ the\ model\.
    | Users\ \(both\ direct\ and\ downstream\)\ should\ be\ made\ aware\ of\ the\ risks.*
    | Carbon\ emissions\ can\ be\ estimated\ using\ the\ .*
    | \*\*(BibTeX|APA):\*\*
    | The\ following\ `bitsandbytes`\ quantization\ config\ was\ used\ during\ training:
    | -\ (quant_method|_?load_in_\w+|llm_int8_\w+|bnb_4bit_\w+):\ .*
    """,
    re.VERBOSE,
)
# What PEFT adds at the end of any card when it saves.
_PEFT = re.compile(r"\s*### Framework versions\s+- PEFT [\w.+]+\s*")
_QUICK_START = re.compile(
    r"from transformers import pipeline\s+"
    r'question = "If you had a time machine, [^"\n]*"\n'
    r'generator = pipeline\("text-generation", model="[^"\n]*", device(_map)?="[^"\n]*"\)\n'
    r"output = generator\(\[[^\]\n]*\], max_new_tokens=128, return_full_text=False\)\[0\]\n"
    r'print\(output\["generated_text"\]\)\s*'
)
_CITATION = re.compile(r"@\w+\{[\w-]+,\s(?:\s*\w+\s*=\s*\S[^\n]*\n)*\s*\}\s*")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^\s*```[ \t]*$", re.MULTILINE | re.DOTALL)


def is_template(body: str) -> bool:
    """Return whether the body of a card is TRL's or PEFT's own and nothing else: no line in it is a person's.

    Example:

    >>> trl = "# Model Card for x\\nIt has been trained using [TRL](https://github.com/huggingface/trl).\\n"
    >>> is_template(trl), is_template(trl + "My notes.\\n"), is_template("[More Information Needed]")
    (True, False, True)
    """
    if _PEFT.fullmatch(body):
        return True
    if "(https://github.com/huggingface/trl)" not in body and "[More Information Needed]" not in body:
        return False
    known = {"python": _QUICK_START, "bibtex": _CITATION}
    for language, text in _BLOCK.findall(body):
        if language not in known or not known[language].fullmatch(text):
            return False
    lines = (line.strip() for line in _BLOCK.sub("", body).splitlines())
    return all(_TRL.fullmatch(line) or _HUB.fullmatch(line) for line in lines if line)


def public_entries(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries of a front matter without what TRL and PEFT put there that is no reader's.

    That are the path of a local base model, alone and in tags, which the Hub gives by itself, and TRL's placeholder of
    a licence.

    >>> public_entries([Entry("base_model", "base_model: /models/mine\\n"), Entry("license", "license: mit\\n")])
    [Entry(key='license', text='license: mit\\n', lead='')]
    """
    kept = []
    for entry in entries:
        value = entry.text.partition(":")[2].strip().strip("\"'")
        if entry.key == "base_model" and value and "\n" not in value and not is_hub_id(value):
            continue
        if entry.text.strip() == "licence: license":
            continue
        if entry.key == "tags" and "base_model:" in entry.text:
            words = [word for word in list_items(entry) if not word.startswith("base_model:")]
            kept += [Entry("tags", to_yaml({"tags": words}), entry.lead)] if words else []
            continue
        kept.append(entry)
    return kept
