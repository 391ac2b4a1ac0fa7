"""Runs of the programs that start in milliseconds, to be killed, starved and signalled.

A server imports the programs once and forks for every run, so a run costs its work alone and is
otherwise as good as a fresh one: it executes its program's file anew. `python -m
tests.integration.warm` is the server; `Warm` the client.
"""

import ctypes
import importlib
import inspect
import itertools
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

# Of these, all further programs import little that is not here.
IMPORTED = (
    "train_ar", "train_tokenizer.__main__", "pretokenization", "sample_imagenet", "evaluate",
    "data.tokens", "train_tokenizer.export", "experiments.alignment.ablation",
    # What programs import on use.
    "torch._dynamo", "torch_fidelity", "torchvision",
)  # fmt: skip


# ---------------------------------------------------------------------- the server
def die_before(call):
    """Make this process kill itself before its call-th sync, rename or removal of files."""
    calls = itertools.count(1)

    def wrap(module, name):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(module, name, wrapped)

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        wrap(module, name)


def obey_permissions():
    """Give up root's right to write where the mode forbids it."""
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(version_3, nothing) == 0


def execute(program, argv):
    """Run a module or a file as Python's command line does, to the end of this process."""
    status = 0
    try:
        sys.argv = [program, *argv]
        if "/" in program:
            runpy.run_path(program, run_name="__main__")
        else:
            module = program.removesuffix(".py")
            for name in (module, f"{module}.__main__"):
                if not hasattr(sys.modules.get(name), "__path__"):
                    sys.modules.pop(name, None)  # it would be executed twice
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        status = e.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def fork_programs():
    """Let this process fork where it would start an interpreter for a file or a module."""
    start = subprocess.Popen._execute_child
    streams = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")

    def fork(self, *given):
        options = inspect.signature(start).bind(self, *given).arguments
        command = options["args"]
        words = [] if isinstance(command, str) else [str(w) for w in command if w != "-u"]
        if words[:1] != [sys.executable] or not (words[1] == "-m" or words[1].endswith(".py")):
            return start(self, *given)
        program, *argv = words[2:] if words[1] == "-m" else words[1:]
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*(options[name] for name in streams))
            return None
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if options[name] != -1:
                os.dup2(options[name], number)
        os.closerange(3, 4096)
        # Another thread may have held the locks of these, which their end would close.
        old = sys.stdout, sys.stderr  # noqa: F841
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        if options["env"] is not None:
            os.environ.clear()
            os.environ.update(options["env"])
        return execute(program, argv)

    subprocess.Popen._execute_child = fork


def child(request, rank, port):
    os.setsid()  # a process group of its own, as torchrun makes it
    for stream, log in ((1, request["log"]), (2, request["errors"])):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ |= request["env"]
    if request["ranks"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"]),
            "LOCAL_WORLD_SIZE": str(request["ranks"]), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if request["obedient"]:
        obey_permissions()
    if request["die_before"] and rank == 0:
        die_before(request["die_before"])
    if request["narrow"]:
        # The published discriminator takes most of a miniature's adversarial step and of its checkpoints.
        from train_tokenizer.discriminator import Discriminator

        Discriminator.__init__.__defaults__ = (32, True)
    if request["forks"]:
        fork_programs()
    execute(request["program"], request["argv"])


def serve():
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [wait(pid, request["within"]) for pid in request["wait"]]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            answer = []
            for rank in range(request["ranks"]):
                answer.append(os.fork())
                if answer[-1] == 0:
                    child(request, rank, port)
        print(json.dumps(answer), flush=True)


def wait(pid, within):
    """Exit status, negative for a signal; None where it has not ended in so many seconds."""
    patience = time.monotonic() + within
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > patience:
            return None
        time.sleep(0.001)


# ---------------------------------------------------------------------- the client
class Warm:
    def __init__(self, root, folder):
        self.folder = folder
        self.logs = itertools.count()
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.warm"], cwd=root, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, program, *argv, ranks=1, largest_file=0, die_before=0, obedient=False,
              env=None, errors=None, narrow=True, forks=True):  # fmt: skip
        """A run in the background. It dies before its `die_before`-th sync, rename or removal of
        files; it may write files of up to `largest_file` bytes; `obedient`, even root's rights end
        where those of a folder do; the file `errors` takes its standard error, by default the log. The
        discriminator of a `narrow` one has a quarter of the published width. With `forks`, the
        programs that it starts are forks too."""
        log = self.folder / f"log-{next(self.logs)}"
        pids = self.ask(
            program=str(program), argv=[str(a) for a in argv], log=str(log), ranks=ranks,
            largest_file=largest_file, die_before=die_before, obedient=obedient, env=env or {},
            errors=str(errors or log), narrow=narrow, forks=forks,
        )  # fmt: skip
        return Run(self, pids, log)

    def completed(self, program, *argv, timeout, **limits):
        """A run to its end, as `subprocess.run` returns it. If rank 0 fails, the others are ended, as
        a launcher does: with a mistake of their own they would wait for that before they say it. So a rank
        that is left waiting after a failure of rank 0 does not show here."""
        errors = self.folder / f"errors-{next(self.logs)}"
        run = self.start(program, *argv, errors=errors, narrow=False, **limits)
        run.statuses[run.pids[0]] = self.ask(wait=run.pids[:1], within=timeout)[0]
        if run.statuses[run.pids[0]]:
            for rank in range(1, len(run.pids)):
                run.signal(signal.SIGTERM, rank)
        status = run.end(within=timeout) or run.failed()
        return subprocess.CompletedProcess(argv, status, run.output(), errors.read_text())

    def __call__(self, program, *argv, **limits):
        """(exit status, output) of a run to its end."""
        run = self.start(program, *argv, **limits)
        return run.end() or run.failed(), run.output()

    def ok(self, program, *argv, **limits):
        status, output = self(program, *argv, **limits)
        assert status == 0, output[-3000:]
        return output

    def refused(self, program, *argv, **limits):
        """The one line that a run says no with."""
        status, output = self(program, *argv, **limits)
        lines = [line for line in output.splitlines() if "error:" in line]
        assert status == 2 and len(lines) == 1 and "Traceback" not in output, output[-3000:]
        return lines[0]

    def close(self):
        self.server.stdin.close()
        self.server.kill()  # others may hold the pipe open
        self.server.wait()


class Run:
    """A run under way: `pids` of its ranks, and what has become of them."""

    def __init__(self, warm, pids, log):
        self.warm, self.pids, self.log = warm, pids, log
        self.statuses = {}

    def output(self):
        return self.log.read_text()

    def alive(self):
        left = [pid for pid in self.pids if pid not in self.statuses]
        found = zip(left, self.warm.ask(wait=left, within=0))
        self.statuses |= {pid: status for pid, status in found if status is not None}
        return len(self.statuses) < len(self.pids)

    def signal(self, number, rank=0, group=False):
        (os.killpg if group else os.kill)(self.pids[rank], number)

    def end(self, within=600):
        """The exit status of rank 0, once all have ended; what has not ended by then fails."""
        left = [pid for pid in self.pids if pid not in self.statuses]
        self.statuses |= dict(zip(left, self.warm.ask(wait=left, within=within)))
        late = [pid for pid, status in self.statuses.items() if status is None]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        assert not late, f"not ended in {within} s: {self.output()[-3000:]}"
        return self.statuses[self.pids[0]]

    def failed(self):
        """The first exit status of an ended rank that is not 0; 0 without one."""
        return next((status for status in self.statuses.values() if status), 0)

    def kill(self):
        """SIGKILL to all ranks; True where it came before the end of any."""
        killed = self.alive() and not self.statuses
        for pid in self.pids:
            if pid not in self.statuses:
                os.kill(pid, signal.SIGKILL)
        self.end()
        return killed


if __name__ == "__main__":
    serve()
