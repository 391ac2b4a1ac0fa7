"""Whatever a flag is set to: the programs with flags accept it, or refuse it in one line."""

import argparse
import contextlib
import importlib
import io

import pytest

import runtime.program
from runtime.arguments import Parser
from tests.refusals import refusal

NAN, HUGE = "nan", "1" + "0" * 30
TEXTS = [
    "x",
    "",
    " ",
    "-1",
    "0",
    "1.5",
    NAN,
    "inf",
    HUGE,
    "9" * 5000,
    "a\nb",
    "\0",
    "é\udc80",
    "%s",
]
# Per program: arguments without which it does nothing.
NEEDED = {
    "evaluate": ["--samples", "no.npz", "--reference", "no.npz"],
    "pretokenization": ["--data_path", "no"],
    "data.tokens": ["info", "no"],
    "training.plot": ["no"],
    "quickstart.reference": ["no"],
    "evaluation.sweep": ["--reference", "no", "--scales", "1", "--powers", "1"],
    "evaluation.report": ["no.json"],
    "evaluation.look": ["no.png"],
    "evaluation.probe": ["--data_path", "no"],
    "train_tokenizer.export": ["no", "no.pth"],
}


def flags(program):
    """The options of a program's parser, and its positional arguments as None."""
    found = []

    class Stop(Exception):
        pass

    def look(parser, *args, **kwargs):
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                found.append(action.option_strings[0] if action.option_strings else None)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(Parser, "parse_known_args", look)
        importlib.import_module(program).main([])
    return found


CASES = [(program, flag) for program in NEEDED for flag in flags(program)]


class Ended(BaseException):
    """The status that a program ends with."""


def ends(program, argv):
    """(status, stderr) of a program in this process."""

    def leave(status):
        raise Ended(status)

    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(runtime.program, "leave", leave)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                runtime.program.run(importlib.import_module(program).main, argv)
            except Ended as e:
                return e.args[0], error.getvalue()
    return 0, error.getvalue()


def test_the_programs_have_flags():
    assert len(CASES) > 40 and ("evaluate", "--crop") in CASES and ("training.plot", None) in CASES


@pytest.mark.parametrize("program, flag", CASES)
def test_odd_values(program, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in TEXTS:
        needed = NEEDED[program]
        argv = [*needed, f"{flag}={text}"] if flag else [text, *needed[1:]]
        status, error = ends(program, argv)
        assert status == 2, (text, error)  # nothing that is needed is there
        lines = error.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(error) < 1000, (
            text,
            error,
        )
        assert list(tmp_path.iterdir()) == [], text


@pytest.mark.parametrize(
    "program, argv, named",
    [
        ("evaluate", ["--crop", "0"], "--crop"),
        ("evaluate", ["--crop", HUGE], "--crop"),
        ("evaluate", ["--num_workers", "-1"], "--num_workers"),
        ("evaluate", ["--picture", "x.xyz"], "--picture"),
        ("data.tokens", ["show", "no"], "--tokenizer"),
        ("data.tokens", ["info", "no", "--tokenizer", "x.pth"], "--tokenizer"),
        ("data.tokens", ["show", "no", "--tokenizer", "x.pth", "--images", "0"], "--images"),
        ("evaluation.look", [], "images"),
        ("evaluation.probe", ["--tokenizer", "x.pth"], "--data_path"),
        ("evaluation.probe", ["--data_path", "no", "--layer", "0"], "--layer"),
        ("evaluate", ["--answers", "x.txt"], "--answers"),
        ("training.plot", ["--output", "c.xyz", "no"], "--output"),
        ("training.plot", ["--output", ".", "no"], "--output"),
        ("train_tokenizer.export", ["no", "weights.txt"], "weights.txt"),
        ("evaluation.sweep", ["--num_samples", "0"], "--num_samples"),
        ("evaluation.report", [], "files"),
    ],
)
def test_the_flag_is_named(program, argv, named):
    status, error = ends(program, argv)
    assert status == 2 and named in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "x", "1,,2"])
@pytest.mark.parametrize("flag", ["--scales", "--powers"])
def test_a_sweep_refuses_what_is_no_list_of_numbers(flag, text):
    from evaluation.sweep import parse

    refusal(lambda: parse([*NEEDED["evaluation.sweep"], f"{flag}={text}"]), flag)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1,-1", HUGE])
@pytest.mark.parametrize(
    "flag, named", [("--scales", "guidance_scale="), ("--powers", "guidance_scale_pow=")]
)
def test_a_sweep_refuses_guidance_out_of_range_before_it_opens_anything(flag, text, named):
    from evaluation.sweep import main

    given = [*NEEDED["evaluation.sweep"], f"{flag}={text}", "config=configs/alitok_b.yaml"]
    refusal(lambda: main(given), named)
