"""What a program prints to: closed, full, of any encoding; and what fills up under its data workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.processes import refuse_leftovers
from tests.refusals import refusal

ROOT = Path(__file__).parents[3]


@pytest.fixture
def program(tmp_path):
    """Runs the body of a `main` with redirections: the status, and what came out."""

    def start(body, redirections="", **environment):
        lines = [
            "import os, sys",
            "def main(argv):",
            *(f"    {line}" for line in body.splitlines()),
        ]
        (tmp_path / "program.py").write_text(
            "\n".join([*lines, "from runtime.program import run", "run(main)"]), "utf-8"
        )
        done = subprocess.run(
            f"{sys.executable} {tmp_path}/program.py {redirections}", shell=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return start


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_ends_nothing(program, tmp_path, closed):
    body = (
        "print('started'); print('started', file=sys.stderr)\n"
        f"open({str(tmp_path / 'work')!r}, 'w').write('work')\nprint('done')"
    )
    status, _, error = program(body, closed)
    assert status == 0 and "Traceback" not in error
    assert (tmp_path / "work").read_text() == "work"


def test_a_full_output_is_called_by_its_name(program):
    status, _, error = program("print('x')", "> /dev/full")
    full = "No space left on device; free some space, then try again\n"
    assert (status, error) == (2, f"error: standard output: {full}")
    assert program("print('x', file=sys.stderr, flush=True)", "2> /dev/full")[0] == 2


def test_a_status_of_its_own_counts_more_than_a_reader_that_is_gone(program, tmp_path):
    program("import time; time.sleep(1); raise SystemExit(75)", "--dry")  # writes the program
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    process.stdout.close()
    assert process.wait(60) == 75


def test_a_file_shows_every_line_at_once_also_of_a_killed_program(program, tmp_path):
    program("print('a line'); os.kill(os.getpid(), 9)", f"> {tmp_path}/log")
    assert (tmp_path / "log").read_text() == "a line\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they cannot be")
def test_data_workers_are_forked_whatever_the_default(program, tmp_path):
    spawn = "import multiprocessing; multiprocessing.set_start_method('spawn')"
    (tmp_path / "sitecustomize.py").write_text(spawn)  # runs before the program
    body = "import multiprocessing; print(multiprocessing.get_start_method())"
    assert program(body, PYTHONPATH=f"{tmp_path}:{ROOT}")[1] == "fork\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_without_a_letter_shows_its_number(program, encoding):
    status, out, error = program("print('17 … done')", PYTHONIOENCODING=encoding)
    assert (status, out, error) == (0, "17 \\u2026 done\n", "")


@pytest.mark.parametrize(
    "failure",
    [
        "raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>')",
        "raise RuntimeError('It is possible that dataloaders are out of shared memory. Please')",
        "os.statvfs = lambda path: type('full', (), {'f_bavail': 2})\nraise OSError(28, 'No space')",
    ],
)
def test_a_small_shared_memory_is_named_with_the_option(program, failure):
    status, _, error = program(failure)
    assert status == 2 and error.startswith("error: /dev/shm is full") and error.count("\n") == 1
    assert "--num_workers, dataset.params.num_workers_per_gpu" in error


@pytest.mark.parametrize("left", [["RANK"], ["LOCAL_RANK"], ["RANK", "WORLD_SIZE"]])
def test_a_launchers_variables_without_a_launcher_are_refused(monkeypatch, left):
    for name in left:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    refuse_leftovers()
    monkeypatch.delenv("MASTER_ADDR")
    refusal(refuse_leftovers, ", ".join(left), "unset")
