import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from runtime.signals import ANSWER_WITHIN, StopSignal

ROOT = Path(__file__).parents[3]
# Signal, whether it was ignored, whether a launcher started the program; what it prints, its status.
CASES = [
    ("SIGTERM", False, True, "still here\n", 143),
    ("SIGUSR1", False, True, "still here\n", 138),
    ("SIGINT", False, True, "still here\n", 130),
    ("SIGHUP", False, True, "still here\n", 129),
    ("SIGINT", False, False, "", 130),  # the second Ctrl-C ends at once
    ("SIGHUP", True, True, "still here\nnever\n", 0),
]
# A process per case, so that torch is imported once and all wait at once.
PROGRAM = f"""
import os, signal, sys, time
from datetime import timedelta
from runtime.signals import PATIENCE, StopSignal

def case(name, ignored, launched):
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if launched:
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
    number = getattr(signal, name)
    if ignored:
        signal.signal(number, signal.SIG_IGN)
    stop = StopSignal(timedelta(minutes=1))
    assert not stop.agreed()
    os.kill(os.getpid(), number)
    assert stop.agreed() != ignored
    os.kill(os.getpid(), number)
    print("still here", flush=True)  # the same request, passed on by someone else
    time.sleep(PATIENCE + 0.1)
    os.kill(os.getpid(), number)
    print("never", flush=True)

children = []
for i, (*given, _, _) in enumerate({CASES}):
    if not (child := os.fork()):
        os.dup2(os.open(f"{{sys.argv[1]}}/{{i}}", os.O_CREAT | os.O_WRONLY), 1)
        case(*given)
        os._exit(0)
    children.append(child)
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_first_signal_asks_and_the_second_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    found = [
        (*case[:3], (tmp_path / str(i)).read_text(), int(status))
        for i, (case, status) in enumerate(zip(CASES, done.stdout.split()))
    ]
    assert found == CASES, done.stderr


def test_a_signal_from_before_the_round_leaves_the_ranks_their_time(monkeypatch):
    """As during a validation, which is finished first: the ranks meet seconds apart after it."""
    monkeypatch.setattr("runtime.signals.listen", lambda request: None)
    stop, calls = StopSignal(timedelta(minutes=30)), []
    stop.request.at = time.monotonic() - 10 * ANSWER_WITHIN

    class Store:
        def wait(self, keys, timeout):
            calls.append(keys)
            if len(calls) < 3:
                raise dist.DistStoreError("not yet")

    stop._wait_for(Store(), "answer 1")
    assert len(calls) == 3


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
