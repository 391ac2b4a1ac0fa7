"""Options of the config dataclasses: one declaration for each, and one check for all.

    @dataclass
    class Optimizer(Options):
        beta1: float = option(0.9, "Decay of the first moment.", at_least=0, below=1)

The check, the reading of configs, the command line's help and `docs/options.md` all use this declaration.
Errors name the class's own field (`beta1=2: …`); `configs.load` adds the path (`InputError.option`).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from operator import attrgetter
from types import UnionType
from typing import Any, NoReturn, Optional, Union, get_args, get_origin, get_type_hints

from .errors import InputError

LARGEST = 2**63 - 1  # of any integer option: the largest int64
LONGEST = 4096  # characters of any text: the longest path
# (option, whether its value contradicts another option, remedy), asked up to the first that does.
Contradictions = Iterator[tuple[str, object, str]]


@dataclass(frozen=True)
class Rule:
    """The declaration of one option, or of a section, whose `resumes` and `only` hold for its options."""

    sentence: str
    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    choices: tuple = ()
    null: Any = None  # the meaning of null in a config, if the type does not allow it
    path: bool = False  # a text in which `~` is the home folder
    resumes: bool = False  # may change when a run resumes: changes weights by rounding at most
    only: str = ""  # the prefix of the programs that use it; others refuse it on the command line
    instead: str = ""  # what another program offers instead

    def limits(self) -> str:
        """The allowed values in words; empty if every value of the type is allowed."""
        if self.choices:
            return words(self.choices)
        limits = {"at least": self.at_least, "more than": self.above,
                  "at most": self.at_most, "less than": self.below}  # fmt: skip
        given = (f"{text} {n:.15g}" for text, n in limits.items() if math.isfinite(n))
        return ", ".join(given)

    def complaint(self, value: Any) -> str:
        """The remedy for a refused `value`; empty if it is allowed."""
        if self.choices:
            # True == 1 in Python, but not in a config.
            same = any(value == c and type(value) is type(c) for c in self.choices)
            return "" if same else f"choose {words(self.choices)}"
        if isinstance(value, str):
            return self.text_complaint(value)
        if not is_a(value, float):
            return ""
        if not -math.inf < value < math.inf:
            return "set a finite number"
        if not (self.at_least <= value <= self.at_most and self.above < value < self.below):
            return f"set {self.limits()}"
        return f"set at most {LARGEST}" if is_a(value, int) and value > LARGEST else ""

    def text_complaint(self, value: str) -> str:
        """The fault of a text as a name or path; empty if there is none."""
        if not value.strip():
            return "the text is empty"
        if len(value) > LONGEST:
            return f"the text has more than {LONGEST} characters"
        if any(ord(c) < 32 or ord(c) == 127 for c in value):
            return "the text holds a control character: leave it out"
        if any(0xD800 <= ord(c) < 0xE000 for c in value):
            return "the text is not UTF-8"
        if self.path and any(len(name.encode()) > 255 for name in value.split("/")):
            return "a name in the path has more than 255 bytes: shorten it"
        if self.path and value.startswith("~"):
            return f"its ~ is not a home folder: write it in full, or ./{short(value)} for a file"
        if self.path and value.lower() in ("true", "false", "none"):
            return f"set a path (./{value} for a file of this name), or null for none"
        return ""


def words(choices: tuple) -> str:
    """a or b; a, b or c."""
    *others, last = (str(choice) for choice in choices)
    return f"{', '.join(others)} or {last}" if others else last


def option(default: Any, sentence: str, **rule: Any) -> Any:
    """A dataclass field with its `Rule`. A callable `default` (a section's class, `list`) makes the default."""
    metadata = {"rule": Rule(sentence, **rule)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


for_training = functools.partial(option, only="train")


def again(schema: type, name: str, default: Any, **changed: Any) -> Any:
    """An option of another class, with this default."""
    rule = dataclasses.replace(fields_of(schema)[name].rule, **changed)
    return dataclasses.field(default=default, metadata={"rule": rule})


# ---------------------------------------------------------------------- what a class declares
@dataclass(frozen=True)
class Declared:
    """One option of a config class, or one section of it."""

    name: str  # of the field or, in `declared`, in full: phases[i].steps in a list's sections
    kind: Any  # the type without Optional
    optional: bool  # whether None is allowed
    default: Any
    rule: Rule
    section: Optional[type]  # the class of a section, or of a list's sections

    def expectation(self) -> str:
        """The remedy for a value of another type."""
        if self.rule.choices:
            return f"choose {words(self.rule.choices)}"
        article = {bool: "", int: "an "}.get(self.kind, "a ")
        return f"set {article}{type_name(self.kind)}"


@functools.cache
def fields_of(schema: type) -> dict[str, Declared]:
    """The options and sections that a class itself declares, by name."""
    found, hints = {}, get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, kind, default = field.name, hints[field.name], field.default
        if optional := type(None) in get_args(kind):
            kind = Union[tuple(part for part in get_args(kind) if part is not type(None))]
        if default is dataclasses.MISSING:
            default = field.default_factory()  # type: ignore[misc]  # it has one of the two
        rule, section = field.metadata["rule"], section_of(kind)
        found[name] = Declared(name, kind, optional, default, rule, section)
    return found


@functools.cache
def declared(schema: type) -> dict[str, Declared]:
    """All options and sections by their full names; the options of a section come before its sections.
    `resumes` and `only` of a section hold for all that is in it."""
    found = {}
    for field in sorted(fields_of(schema).values(), key=lambda field: field.section is not None):
        is_list, outer = get_origin(field.kind) is list, field.rule
        name = f"{field.name}[i]" if field.section and is_list else field.name
        found[name] = dataclasses.replace(field, name=name)
        for inner in declared(field.section).values() if field.section else ():
            resumes, only = inner.rule.resumes or outer.resumes, inner.rule.only or outer.only
            rule = dataclasses.replace(inner.rule, resumes=resumes, only=only)
            full = f"{name}.{inner.name}"
            found[full] = dataclasses.replace(inner, name=full, rule=rule)
    return found


def section_of(kind: Any) -> Optional[type]:
    """The config class of a type, or of a list's items; None for other types."""
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


# ---------------------------------------------------------------------- the check
def is_a(value: Any, kind: Any) -> bool:
    """Whether a value has a type; integers are numbers, flags are not."""
    if is_union(kind):
        return any(is_a(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return isinstance(value, (list, tuple)) and all(is_a(v, item) for v in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def type_name(kind: Any) -> str:
    names = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "mapping"}
    if is_union(kind):
        return ", or ".join(type_name(part) for part in get_args(kind))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        parts = [type_name(part) + "s" for part in get_args(item) or [item]]
        return f"list of {' or '.join(parts)}"
    return names.get(get_origin(kind) or kind, "section")


class Options:
    """Base of the config dataclasses. Their fields cannot be set again (`dataclasses.replace` makes
    other options); `frozen=True` would say the same, but OmegaConf then refuses to merge into them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name} is set once")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        """Raise InputError, naming the field, for a value that the class's declarations do not allow, or that
        contradicts another."""
        for name, field in fields_of(type(self)).items():
            value = getattr(self, name)
            # A default that refers to another option (`${…}`) is still unresolved.
            refers = isinstance(value, str) and value == field.default and value.startswith("${")
            if (value is None and field.optional) or refers:
                continue
            if not is_a(value, field.kind):
                self.refuse(name, field.expectation())
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if complaint := field.rule.complaint(part):
                    raise InputError(f"{name}={short(part)}: {complaint}", name)
        for name, contradicts, remedy in self.contradictions():
            if contradicts:
                self.refuse(name, remedy)

    def contradictions(self) -> Contradictions:
        """Those between the class's options, whose values are known to be allowed one by one."""
        yield from ()

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise InputError for the value of option `name`, which may be in a nested section."""
        raise InputError(f"{name}={short(attrgetter(name)(self))}: {reason}", name)


def short(value: Any) -> str:
    """A value in one short line, for messages."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
