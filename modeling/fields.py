"""Options of the config dataclasses: one declaration for each, and one check for all of them.

    @dataclass
    class Optimizer:
        beta1: float = option(0.9, "Decay of the first moment.", at_least=0, below=1)

        def __post_init__(self):
            check_options(self)

The declaration is all that there is to say about an option: the check, the command line's help and
`docs/options.md` read it. Errors name the class's own field (`beta1=2: …`); whoever knows where the
object lives in a config adds the path.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints

from .errors import InputError

LARGEST = 2**63 - 1  # of every integer option: what a tensor of int64 holds
LONGEST = 4096  # characters of a text: what a path may have
TYPED = object()  # as `null`: the type alone decides whether null is allowed


@dataclass(frozen=True)
class Rule:
    """What is declared about one option; `notes` belong to other rooms (`configs.schema`)."""

    sentence: str
    at_least: Optional[float] = None
    at_most: Optional[float] = None
    above: Optional[float] = None
    below: Optional[float] = None
    choices: tuple = ()
    null: Any = TYPED  # what a null stands for
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def limits(self) -> str:
        """The allowed values in words; empty where the type says it all."""
        if self.choices:
            return words(self.choices)
        parts = [
            f"{text} {number(limit)}"
            for text, limit in (
                ("at least", self.at_least),
                ("more than", self.above),
                ("at most", self.at_most),
                ("less than", self.below),
            )
            if limit is not None
        ]
        return ", ".join(parts)

    def complaint(self, value: Any) -> str:
        """What to set instead of `value`; empty where it is allowed."""
        if self.choices:
            # True == 1 in Python, but not in a config.
            same = any(value == c and type(value) is type(c) for c in self.choices)
            return "" if same else f"choose {words(self.choices)}"
        if isinstance(value, str):
            return text_complaint(value)
        if not isinstance(value, Real) or isinstance(value, bool):
            return ""
        tests = (
            (self.above, lambda limit: value > limit, "set more than {}"),
            (self.at_least, lambda limit: value >= limit, "set {} or more"),
            (self.below, lambda limit: value < limit, "set less than {}"),
            (self.at_most, lambda limit: value <= limit, "set {} or less"),
            (None if math.isfinite(value) else 0, lambda limit: False, "set a finite number"),
            (
                LARGEST if isinstance(value, Integral) else None,
                lambda limit: abs(value) <= limit,
                "set {} or less",
            ),
        )
        for limit, holds, remedy in tests:
            if limit is not None and not holds(limit):  # nan holds nowhere
                return remedy.format(number(limit))
        return ""


def number(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def words(choices: tuple) -> str:
    """a or b; a, b or c; one of a, b, c, d."""
    texts = [str(choice) for choice in choices]
    if len(texts) > 3:
        return f"one of {', '.join(texts)}"
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def text_complaint(value: str) -> str:
    """What is wrong with a text as the name of a thing or file; empty where nothing is."""
    if not value.strip():
        return "the text is empty"
    if len(value) > LONGEST:
        return f"the text has more than {LONGEST} characters"
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        return "the text holds a control character: leave it out"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "the text is not UTF-8"
    return ""


def option(
    default: Any,
    sentence: str,
    *,
    at_least: Optional[float] = None,
    at_most: Optional[float] = None,
    above: Optional[float] = None,
    below: Optional[float] = None,
    choices: tuple = (),
    null: Any = TYPED,
    **notes: Any,
) -> Any:
    """A dataclass field with its meaning and its allowed values.

    `at_least` and `at_most` are allowed themselves, `above` and `below` are not. A callable
    `default` makes the default (a section's class, or `list`).
    """
    rule = Rule(sentence, at_least, at_most, above, below, choices, null, notes)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"rule": rule})
    return dataclasses.field(default=default, metadata={"rule": rule})


def rule_of(field: dataclasses.Field) -> Rule:
    return field.metadata["rule"]


@functools.cache
def types_of(schema: type) -> dict[str, tuple[Any, bool]]:
    """{field: (type without Optional, whether None is allowed)} of a config dataclass."""
    found = {}
    for name, hint in get_type_hints(schema).items():
        optional = get_origin(hint) is Union and type(None) in get_args(hint)
        if optional:
            (hint,) = (part for part in get_args(hint) if part is not type(None))
        found[name] = hint, optional
    return found


def section_of(kind: Any) -> Optional[type]:
    """The config dataclass that a type is, or None."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def item_section_of(kind: Any) -> Optional[type]:
    """The config dataclass that a list's type is made of, or None."""
    return section_of(get_args(kind)[0]) if get_origin(kind) is list else None


def default_of(field: dataclasses.Field) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a config's type; an integer is a number, a flag is not."""
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return isinstance(value, (list, tuple)) and all(is_a(v, item) for v in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind == NUMBER_OR_NAME:
        return is_a(value, int) or isinstance(value, str)
    return kind is Any or isinstance(value, kind)


TYPE_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Any: ""}
NUMBER_OR_NAME = int | str


def type_name(kind: Any) -> str:
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return f"list of {'integers or texts' if item == NUMBER_OR_NAME else type_name(item) + 's'}"
    return TYPE_NAMES.get(kind, "section")


def expectation(kind: Any) -> str:
    """What to set for an option of this type, in words."""
    return {
        int: "set an integer", float: "set a number", bool: "set true or false", str: "set a text"
    }.get(kind, f"set a {type_name(kind)}")  # fmt: skip


def check_options(config: Any) -> None:
    """Refuse values of another type or outside what the config's class declares.

    Called by `__post_init__`. Raises InputError that names the field; a null that stands for
    something is replaced by it.
    """
    types = types_of(type(config))
    for field in dataclasses.fields(config):
        rule, value, (kind, optional) = (
            rule_of(field),
            getattr(config, field.name),
            types[field.name],
        )
        if value is None and rule.null is not TYPED:
            setattr(config, field.name, rule.null)
            continue
        if (value is None and optional) or unresolved(field, value):
            continue
        if not is_a(value, kind):
            raise InputError(f"{field.name}={short(value)}: {expectation(kind)}")
        for part in value if isinstance(value, (list, tuple)) else [value]:
            complaint = "" if dataclasses.is_dataclass(part) else rule.complaint(part)
            if complaint:
                raise InputError(f"{field.name}={short(part)}: {complaint}")


def unresolved(field: dataclasses.Field, value: Any) -> bool:
    """Whether a value is a default that refers to another option (`${…}`) and is not known yet."""
    return isinstance(value, str) and value == field.default and value.startswith("${")


def short(value: Any) -> str:
    """A value in at most one short line, as a message shows it."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
