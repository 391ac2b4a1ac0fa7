import re
from pathlib import Path

import pytest

from configs.help import PROGRAMS, default_of, describe, markdown, options_of, values_of
from configs.load import load
from configs.schema import GeneratorRun, TokenizerRun
from modeling.fields import declared

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_every_option_of_the_program_with_default_values_and_a_sentence(program):
    text, used = describe(program), options_of(program)
    for option in declared(PROGRAMS[program][0]).values():
        line = f"\n  {option.name}: {default_of(option)}  ({values_of(option)})"
        assert (line in text) == (option in used and not option.section), option.name
        assert option.rule.sentence.endswith(".") and len(option.rule.sentence) > 6, option.name


def test_help_has_the_phases_and_the_ranges():
    text = describe("train_tokenizer")
    assert "phases[i].gan_weight: 0.0  (number: at least 0" in text
    assert "phases[i].steps: required  (integer: at least 1" in text
    assert "phases[i].end_lr: null  (number or null: at least 0" in text
    assert "(choice: auto, no, bf16 or fp16)" in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_examples_of_the_help_are_commands_that_load(program):
    schema, _, examples = PROGRAMS[program]
    for example in examples:
        words = [word.strip("'") for word in example.split()]
        arguments = words[next(i for i, w in enumerate(words) if w.startswith("config=")) :]
        assert isinstance(load(schema, arguments, program), schema)
        assert any(word in (f"{program}.py", program) for word in words)


def test_the_document_of_the_options_is_up_to_date():
    assert (ROOT / "docs/options.md").read_text() == markdown(), (
        "run: python -m configs.help > docs/options.md"
    )


def test_the_document_has_every_option_of_both_schemas():
    rows = set(re.findall(r"^\| `([^`]+)` \|", markdown(), re.MULTILINE))
    schemas = declared(GeneratorRun) | declared(TokenizerRun)
    wanted = {name for name, option in schemas.items() if not option.section}
    assert rows == wanted


@pytest.mark.parametrize(
    "program, names_it",
    [("train_ar", True), ("train_tokenizer", True), ("sample_imagenet", False)],
)
def test_the_help_of_trainers_names_the_dry_run(program, names_it):
    assert ("--dry-run" in describe(program)) is names_it
