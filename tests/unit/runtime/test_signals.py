import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, signal, time
from datetime import timedelta
if {ignored}:
    signal.signal(signal.{name}, signal.SIG_IGN)
from runtime.signals import PATIENCE, StopSignal
stop = StopSignal(timedelta(minutes=1))
assert not stop.agreed()
os.kill(os.getpid(), signal.{name})
assert stop.agreed() != {ignored}
os.kill(os.getpid(), signal.{name})
print("still here", flush=True)  # the same request, passed on by someone else
time.sleep(PATIENCE + 0.1)
os.kill(os.getpid(), signal.{name})
print("never", flush=True)
"""


def run(name, ignored=False, launcher="torchrun"):
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    if launcher is None:
        del environment["TORCHELASTIC_RUN_ID"]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name, ignored=ignored)],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, status", [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130), ("SIGHUP", 129)]
)
def test_first_signal_asks_and_the_second_ends(name, status):
    done = run(name)
    assert done.stdout == "still here\n" and done.returncode == status, done.stderr


def test_second_ctrl_c_ends_at_once_without_a_launcher():
    done = run("SIGINT", launcher=None)
    assert done.stdout == "" and done.returncode == 130, done.stderr


def test_hang_up_that_is_ignored_stays_ignored():
    done = run("SIGHUP", ignored=True)
    assert done.stdout == "still here\nnever\n" and done.returncode == 0, done.stderr


RANK = """
import os, signal, sys
from datetime import timedelta
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend
from runtime.signals import StopSignal
rank = int(sys.argv[1])
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, rank == 0)
dist.init_process_group("fake", store=store, rank=rank, world_size=2)
stop = StopSignal(timedelta(seconds=30))
answers = []
for step in range(5):
    if step == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    answers.append(stop.agreed())
print(answers, flush=True)
store.add("done", 1)
while rank == 0 and store.add("done", 0) < 2:  # it serves the store
    pass
os._exit(0)
"""


def test_ranks_agree_without_a_network_of_their_own():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    # gloo would listen there, and fail.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "nowhere0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, _ = rank.communicate(timeout=100)
        assert out == "[False, False, False, True, True]\n"
