"""Reading the options of a command: from the command line, and below it in rank from a YAML (`--config`).

Nothing here imports torch: a wrong option is refused before the seconds that torch and transformers take to load.
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from hf_longalign.options import check_rules, own_fields
from hf_longalign.records.base import typed


class OptionParser(TrlParser):
    """A parser for dataclasses; what is wrong ends the process with one line and status 2, as argparse does.

    Args:
        command: the command's name, such as "sft".
        classes: dataclasses; each field is an option. One with a method `check` is asked to raise a ValueError for
            what the rules of its options do not tell.
        description: for `--help`.
        foreign: names of options that are read later, by a parser that takes longer to make.
    """

    def __init__(
        self, command: str, classes: Sequence[Any], description: str | None = None, foreign: Collection[str] = ()
    ) -> None:
        super().__init__(
            classes,
            prog=f"hf-longalign {command}",
            description=description,
            epilog="Options may also stand in a YAML: --config FILE. Those of the command line win.",
            formatter_class=RawDescriptionHelpFormatter,
            # An abbreviation could mean an option that the second parser has.
            allow_abbrev=not foreign,
            add_help=not foreign,
        )
        self.foreign = foreign

    def add_argument(self, *names: Any, **shown: Any) -> Any:
        """Add one as argparse does, without what only [`check_rules`] knows."""
        # Of a list, argparse would print the choices twice; the help has them.
        ours = {"least", "most", *(["choices"] if shown.get("nargs") == "+" else [])}
        return super().add_argument(*names, **{key: value for key, value in shown.items() if key not in ours})

    def read(self, arguments: Sequence[str], check: Callable[..., None] | None = None) -> tuple[Any, ...]:
        """Return an instance of every class, checked, and last the namespace of arguments added by hand, if any.

        `check` takes them all and raises a ValueError for what is wrong with them together.
        """
        try:
            # TrlParser knows `--config FILE` alone.
            if arguments and arguments[-1] == "--config":
                raise ValueError("`--config` must be followed by a YAML file, got nothing. Name one.")
            words = [
                part for word in arguments for part in (word.split("=", 1) if word[:9] == "--config=" else [word])
            ]
            *found, rest = self.parse_args_and_config(words, return_remaining_strings=True)
            self._refuse_unknown(rest)
            for options in found[: len(list(self.dataclass_types))]:
                _check_types(options)
                check_rules(options)
                if hasattr(options, "check"):
                    options.check()
            if check is not None:
                check(*found)
        except (ValueError, OSError, yaml.YAMLError) as error:
            self.error(str(error))
        return tuple(found)

    def error(self, message: str) -> NoReturn:
        """End the process: one line, and how to see all options."""
        self.exit(2, f"{self.prog}: error: {message}\nSee {self.prog} --help\n")

    def _refuse_unknown(self, rest: Sequence[str]) -> None:
        known = {*self._option_string_actions, *(f"--{name}" for name in self.foreign)}
        for word in rest:
            # argparse takes `--skip-strategy` for `--skip_strategy` of dataclasses.
            name = word.split("=")[0].replace("-", "_").replace("__", "--", 1)
            may_be_read_later = self.foreign and any(
                option.startswith((name, name.replace("--no_", "--"))) for option in known
            )
            if word.startswith("--") and not may_be_read_later:
                near = get_close_matches(name, known, n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"unknown option {word.split('=')[0]}{meant}")
        if rest and not self.foreign:
            raise ValueError(f"{rest[0]!r} belongs to no option. Take it away, or quote what holds spaces.")


def _check_types(options: Any) -> None:
    """Refuse values of a YAML that the command line would have refused: argparse does not look at defaults."""
    hints = get_type_hints(type(options))
    for field in own_fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if isinstance(value, str) and any(get_origin(part) is list for part in parts):
            value = [value]  # a list of one may stand in a YAML without brackets
            setattr(options, field.name, value)
        try:
            typed(hint, value, field.name)
        except ValueError:
            kinds = " or ".join(getattr(part, "__name__", str(part)) for part in parts)
            raise ValueError(
                f"`{field.name}` must be {kinds}, got {value!r}. Quote text that looks like a number."
            ) from None
