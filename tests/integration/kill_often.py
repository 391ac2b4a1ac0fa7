"""Run a program again and again, killing it at random moments, then once to its end.

    python kill_often.py MODULE SEED KILLS SHORTEST LONGEST ARGUMENTS…

The program's modules are imported once and every run is a fork, so that a run takes as long as its
work. Prints how many runs were killed before they had ended.
"""

import importlib
import os
import random
import signal
import sys
import time

from training.runtime import run


def start(main, arguments):
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        run(main, arguments)
        os._exit(0)
    return child


def main(module, seed, kills, shortest, longest, *arguments):
    program = importlib.import_module(module).main
    moments = random.Random(int(seed))
    killed = 0
    for _ in range(int(kills)):
        child = start(program, list(arguments))
        time.sleep(moments.uniform(float(shortest), float(longest)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    _, status = os.waitpid(start(program, list(arguments)), 0)
    print(killed)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
