"""Chains of commands: what is done is not done again, and the first failure stops all."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from experiments.alignment.ablation import stop_on_signals
from experiments.alignment.commands import Chain, Commands, Step
from tests.integration.conftest import ROOT
from tests.refusals import refusal


def writes(file, text="x", config=None):
    """A step that appends to a file, so that its runs can be counted."""
    code = f"open({str(file)!r}, 'a').write({text!r})"
    return Step(file.name, ["-c", code, *([f"config={config}"] if config else [])], [file])


def run(folder, *steps, jobs=1):
    commands = Commands(jobs)
    commands.run([Chain("chain", folder, list(steps))])
    return commands


def test_what_is_done_is_not_done_again(tmp_path):
    steps = [writes(tmp_path / name) for name in ("a", "b")]
    first, second = run(tmp_path, *steps), run(tmp_path, *steps)
    assert (first.ran, first.skipped, second.ran, second.skipped) == (2, 0, 0, 2)
    assert first.processor > 0 == second.processor
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "x"


def test_what_follows_a_missing_output_is_made_again(tmp_path):
    steps = [writes(tmp_path / name) for name in ("a", "b", "c")]
    run(tmp_path, *steps)
    (tmp_path / "b").unlink()
    assert run(tmp_path, *steps).ran == 2
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "x", "xx"]


def test_outputs_of_other_options_or_another_config_are_refused(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 1")
    run(tmp_path, writes(tmp_path / "a", config=config))
    refusal(lambda: run(tmp_path, writes(tmp_path / "a", "y", config)), tmp_path, "options of a")
    config.write_text("steps: 2")
    refusal(lambda: run(tmp_path, writes(tmp_path / "a", config=config)), tmp_path, "options of a")
    assert (tmp_path / "a").read_text() == "x"


def test_what_is_cheap_is_made_again_with_other_options(tmp_path):
    run(tmp_path, writes(tmp_path / "a"))
    changed = replace(writes(tmp_path / "a", "y"), again=True)
    assert run(tmp_path, changed).ran == 1
    assert run(tmp_path, changed).skipped == 1
    assert (tmp_path / "a").read_text() == "xy"


def test_the_answer_is_the_last_line(tmp_path):
    step = Step("a", ["-c", "print('words'); print('{\"loss\": 1}')"], [], tmp_path / "a.json")
    run(tmp_path, step)
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1}
    assert run(tmp_path, step).ran == 0


def test_a_failure_ends_all_in_its_own_line(tmp_path):
    """Another command is running, a third one waits: the first is stopped, the second never starts."""
    ready = tmp_path / "ready"
    slow = f"import time; open({str(ready)!r}, 'w'); time.sleep(60)"
    bad = (
        "import os, sys, time\n"
        f"while not os.path.exists({str(ready)!r}): time.sleep(0.01)\n"
        "print('warning: x', file=sys.stderr); print('error: no such thing', file=sys.stderr)\n"
        "sys.exit(2)"
    )
    # The longest chain starts first.
    chains = [
        Chain(
            "bad", tmp_path / "bad", [Step("train", ["-c", bad], []), writes(tmp_path / "after")]
        ),
        Chain("slow", tmp_path / "slow", [Step("train", ["-c", slow], []), writes(tmp_path / "b")]),
        Chain("late", tmp_path / "late", [writes(tmp_path / "late.txt")]),
    ]
    began = time.monotonic()
    refusal(lambda: Commands(2).run(chains), "bad", "train", "no such thing", "train.err")
    assert time.monotonic() - began < 30
    assert not any((tmp_path / name).exists() for name in ("after", "b", "late.txt"))


@pytest.mark.parametrize("code, word", [("1 / 0", "ZeroDivisionError"), ("pass", "did not write")])
def test_a_bug_or_a_missing_output_is_a_failure(tmp_path, code, word):
    refusal(lambda: run(tmp_path, Step("a", ["-c", code], [tmp_path / "b"])), "a", word)


def test_chains_run_at_once_with_their_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)

    def meets(own, other):
        code = (
            f"import os, time; open({str(tmp_path / own)!r}, 'w').write(os.environ['OMP_NUM_THREADS'])\n"
            f"while not os.path.exists({str(tmp_path / other)!r}): time.sleep(0.01)"
        )
        return Chain(own, tmp_path / f"{own}_run", [Step("meet", ["-c", code], [tmp_path / own])])

    Commands(2).run([meets("a", "b"), meets("b", "a")])
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "2"


def test_a_signal_stops_the_running_command_too(tmp_path, monkeypatch):
    """The command runs in a session of its own, which the signal does not reach by itself."""
    file = tmp_path / "pid"
    sleeps = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    script = f"""
from experiments.alignment.ablation import Chain, Commands, Path, Step, stop_on_signals
from runtime.program import run
def main(argv):
    stop_on_signals()
    Commands(1).run([Chain("a", Path({str(tmp_path)!r}), [Step("b", ["-c", {sleeps!r}], [])])])
run(main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE
    ) as study:
        while not file.exists() or not file.read_text():
            assert study.poll() is None
            time.sleep(0.05)
        study.send_signal(signal.SIGTERM)
        _, said = study.communicate(timeout=30)
    assert study.returncode == 130 and b"finished work is kept" in said
    with pytest.raises(ProcessLookupError):  # it may take a moment to end
        for _ in range(200):
            os.kill(int(file.read_text()), 0)
            time.sleep(0.05)
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    stop_on_signals()
    assert handlers[signal.SIGINT] is handlers[signal.SIGTERM]
