import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import processes
from runtime.processes import check_same, start_processes
from tests.refusals import refusal

ROOT = Path(__file__).parents[3]


def test_a_process_that_differs_from_the_main_one_is_refused(monkeypatch):
    facts = {"rate": 1e-4, "images": 7}
    check_same(facts, "other options")
    monkeypatch.setattr(processes, "on_main", lambda work: {**work(), "rate": 2e-4})
    refusal(lambda: check_same(facts, "other options"), "rate (0.0002 on the main process, 0.0001")


@pytest.fixture
def program(tmp_path):
    """Run the body of a program's `main(argv)`; returns its exit status and stderr's lines."""

    def start(body, *argv):
        lines = ["def main(argv):", *(f"    {line}" for line in body.splitlines())]
        lines += [
            "if __name__ == '__main__':",
            "    from runtime.program import run",
            "    run(main)",
        ]
        script = tmp_path / "program.py"
        script.write_text("\n".join(lines))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("RANK", None)
        # Into a file: a worker that outlives its parent for a moment would hold a pipe open.
        with open(tmp_path / "stderr", "w") as stderr:
            command = [sys.executable, str(script), *argv]
            status = subprocess.run(command, env=environment, stderr=stderr, timeout=60).returncode
        return status, (tmp_path / "stderr").read_text().splitlines()

    return start


def test_a_users_mistake_is_one_line_and_status_2(program):
    body = (
        "from runtime.errors import InputError\nraise InputError(f'no folder {argv[0]}; make it')"
    )
    assert program(body, "photos") == (2, ["error: no folder photos; make it"])


def test_a_closed_or_full_place_is_one_line_wherever_it_is_met(program):
    status, lines = program("open('/dev/full', 'wb', buffering=0).write(b'x')")
    assert status == 2 and lines == [
        "error: a file: No space left on device; free some space, then try again"
    ]


def test_a_bug_keeps_its_traceback_and_exits_with_1(program):
    status, lines = program("raise ValueError('a bug')")
    assert status == 1 and lines[0].startswith("Traceback") and lines[-1] == "ValueError: a bug"


@pytest.mark.parametrize(
    "error, status", [("RuntimeError('out of memory')", 1), ("InputError('x')", 2)]
)
def test_a_failure_is_not_held_up_by_data_workers(program, error, status):
    body = (
        "from torch.utils.data import DataLoader\n"
        "from runtime.errors import InputError\n"
        "from runtime.signals import outlive_first_signal\n"
        "loader = DataLoader(range(10**6), num_workers=2, worker_init_fn=outlive_first_signal)\n"
        "batches = iter(loader)  # as trainers hold them: the error's frame keeps them alive\n"
        f"next(batches)\nraise {error}"
    )
    assert program(body)[0] == status


def test_a_mistake_found_by_a_dataloaders_worker_is_one_line_too(program, tmp_path):
    # Weights as the items, to save the time of importing torchvision.
    body = (
        "from torch.utils.data import DataLoader\n"
        "from modeling.weights.tensors import read_state_dict\n"
        "list(DataLoader(argv, batch_size=None, collate_fn=read_state_dict, num_workers=1))"
    )
    status, lines = program(body, str(tmp_path / "none.bin"))
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(f"error: no weights at {tmp_path / 'none.bin'}: put the ")


def test_a_place_without_permission_is_not_said_to_be_full(program):
    body = "raise PermissionError(13, 'Permission denied', 'output/run')"
    assert program(body) == (
        2,
        ["error: output/run: Permission denied; change its permissions or choose another place, "
         "then try again"],
    )  # fmt: skip


PRINTS = {
    "while printing": "for i in range(100_000): print(i)",
    "at the end": "print('\\n'.join(map(str, range(1000))))",
    "before it exits": "print('\\n'.join(map(str, range(1000))))\nraise SystemExit",
    "with a mistake": (
        "from runtime.errors import InputError\n"
        "import time; print(1, flush=True); time.sleep(0.5)\nraise InputError('x')"
    ),
}


@pytest.mark.parametrize("when", PRINTS)
def test_a_reader_that_closes_the_pipe_ends_it_without_a_word(tmp_path, when):
    body = PRINTS[when].replace("\n", "\n    ")
    script = tmp_path / "program.py"
    script.write_text(f"def main(argv):\n    {body}\nfrom runtime.program import run\nrun(main)\n")
    command = f"{sys.executable} {script} 2> {tmp_path}/stderr | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    status = int(done.stdout.splitlines()[-1])
    error = (tmp_path / "stderr").read_text()
    if when == "with a mistake":  # which is reported all the same
        assert (status, error) == (2, "error: x\n")
    else:
        assert error == "" and status in (0, 141)  # 0: all was written before the reader left


def test_a_broken_pipe_of_another_kind_is_a_bug(program):
    status, lines = program("raise BrokenPipeError('a socket')")
    assert status == 1 and lines[-1] == "BrokenPipeError: a socket"


def test_success_is_status_0_and_says_nothing(program):
    assert program("pass") == (0, [])


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set up a machine: whether it has CUDA, and which compilers and headers."""

    def set_up(cuda=False, compilers=(), header=True):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(processes, "uses_cuda", lambda: cuda)
        monkeypatch.setattr(processes.shutil, "which", lambda name: name in compilers or None)
        monkeypatch.setattr(processes.sysconfig, "get_path", lambda name: str(tmp_path))
        if header:
            (tmp_path / "Python.h").touch()

    return set_up


@pytest.mark.parametrize(
    "asked, cuda, expected",
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_compiling_is_automatic_on_cuda_only(machine, asked, cuda, expected):
    machine(cuda, ["gcc", "g++"])
    assert processes.compiles(asked, "training.compile") is expected


@pytest.mark.parametrize(
    "cuda, compilers, header, lacks",
    [
        (True, ["g++"], True, "a C compiler"),
        (False, ["gcc"], True, "a C++ compiler"),
        (True, ["gcc"], False, "python3-dev"),
    ],
)
def test_compiling_needs_a_compiler_and_headers(machine, cuda, compilers, header, lacks):
    machine(cuda, compilers, header)
    refusal(lambda: processes.compiles(True, "training.compile"), "training.compile=True", lacks)
    if cuda:
        with pytest.warns(UserWarning, match=rf"training\.compile: not compiled, .*{lacks}"):
            assert processes.compiles("auto", "training.compile") is False


def test_compiling_needs_a_python_that_torch_can_compile(machine, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    machine(True, ["gcc"])
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="another Python or torch .*3.99"):
        assert processes.compiles("auto", "training.compile") is False


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(lambda: start_processes("cuda"), "CUDA")
