"""Whatever is written for an option: the program starts with it, or refuses it in one line."""

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.help import PROGRAMS, options_of
from configs.load import load, save
from modeling.fields import declared
from modeling.generator import GeneratorConfig
from modeling.sampling import Sampling
from modeling.tokenizer import TokenizerConfig
from runtime.errors import InputError
from tests.unit.configs.test_schema import CONFIGS

CONFIG_OF = {
    "train_ar": f"config={CONFIGS}/digits_generator.yaml",
    "sample_imagenet": f"config={CONFIGS}/digits_generator.yaml",
    "train_tokenizer": f"config={CONFIGS}/digits_stage1.yaml",
}
# One option of every kind: of a type, its limits and whether it is a path; with a program that uses it.
NAMES = list(
    {
        (str(option.kind), option.optional, option.rule.limits(), option.rule.path): (
            program,
            option.name,
        )
        for program in PROGRAMS
        for option in options_of(program)
        if not option.section
    }.values()
)
# A wrong type, a negative, zero, NaN, infinity, an empty text, huge numbers, YAML's odd words.
TEXTS = [
    "x", "", "-1", "-0.5", "0", "nan", ".inf", "1" + "0" * 30, "1" + "0" * 400, "1e400", "9" * 5000, "#5", "null", "no",
    "[1, x]", "{a: 1}", "1.5", "${x}", "???", "&a [*a]", "!!python/object:x", "\x00", "\udc80", "1:30",
]  # fmt: skip
ODD = st.one_of(
    st.sampled_from(TEXTS), st.text(max_size=20), st.integers().map(str), st.floats().map(str)
)
# The same examples every time; a slow machine is not a failure.
QUIET = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def accepted(schema, argv, program):
    """The options where they are accepted; None where they are refused in one readable line."""
    try:
        options = load(schema, argv, program)
    except InputError as e:
        message = str(e)
        assert len(message.splitlines()) == 1 and 10 < len(message) < 1000, message
        return None
    return options


def argument(name, text):
    """`phases[i].steps` stands in a list, of which a command line sets all."""
    if name.startswith("phases[i]."):
        others = "" if name.endswith(".steps") else "steps: 2000, "
        return f"phases=[{{{others}{name.removeprefix('phases[i].')}: {text}}}]"
    return f"{name}={text}"


def finite(plain):
    if isinstance(plain, dict):
        return all(map(finite, plain.values()))
    if isinstance(plain, list):
        return all(map(finite, plain))
    return not isinstance(plain, float) or math.isfinite(plain)


@pytest.mark.parametrize("program, name", NAMES, ids=lambda text: text)
def test_odd_values_of_the_command_line(program, name):
    for text in TEXTS:
        options = accepted(
            PROGRAMS[program][0], [CONFIG_OF[program], argument(name, text)], program
        )
        assert options is None or finite(dataclasses.asdict(options)), text


@QUIET
@given(st.sampled_from(NAMES), ODD)
def test_any_text_of_the_command_line(tmp_path_factory, where, text):
    program, name = where
    options = accepted(PROGRAMS[program][0], [CONFIG_OF[program], argument(name, text)], program)
    if options is not None:  # what is accepted can be written down and read again
        # Not beside pytest's .lock: a folder with one is a run, which takes its own place.
        file = tmp_path_factory.getbasetemp() / "config/config.yaml"
        file.parent.mkdir(exist_ok=True)
        save(options, file)
        assert dataclasses.asdict(
            load(PROGRAMS[program][0], [f"config={file}"])
        ) == dataclasses.asdict(options)


@QUIET
@given(st.sampled_from(NAMES), ODD, st.booleans())
def test_any_text_of_a_file(tmp_path_factory, where, text, quoted):
    (program, name), file = where, tmp_path_factory.getbasetemp() / "odd.yaml"
    *sections, last = name.replace("phases[i]", "phases").split(".")
    value = f"{{{last}: {repr(text) if quoted else text}}}"
    if sections and sections[0] == "phases":
        value = f"[{value}]"
    for section in reversed(sections):
        value = f"{{{section}: {value}}}"
    file.write_text(value, encoding="utf-8", errors="surrogatepass")
    accepted(PROGRAMS[program][0], [f"config={file}"], program)


@QUIET
@given(st.binary(max_size=60))
def test_any_file(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "odd.yaml"
    file.write_bytes(content)
    accepted(PROGRAMS["train_ar"][0], [f"config={file}"], "train_ar")


# ---------------------------------------------------------------------- from Python
CLASSES = {GeneratorConfig, TokenizerConfig, Sampling}
for schema, *_ in PROGRAMS.values():
    CLASSES |= {schema, *(found.section for found in declared(schema).values() if found.section)}
FIELDS = [
    (kind, field.name)
    for kind in sorted(CLASSES, key=lambda k: k.__name__)
    for field in dataclasses.fields(kind)
]
ODD_OBJECTS = st.one_of(
    st.sampled_from([None, "", "x", -1, 0, True, 1.5, math.nan, math.inf, 10**30, [], [1], {}, b"x",
                     1j, object(), int, (1,), {"a": 1}, [None], -0.0]),
    st.integers(), st.floats(), st.text(max_size=10), st.lists(st.integers(), max_size=2),
)  # fmt: skip


@QUIET
@given(st.sampled_from(FIELDS), ODD_OBJECTS)
def test_any_object_as_a_field_of_a_config(where, value):
    kind, name = where
    try:
        kind(**{name: value})
    except InputError as e:
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000
