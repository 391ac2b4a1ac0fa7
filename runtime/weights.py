"""Opens weights in a job of several processes."""

from modeling.weights.opened import Opened, open_file
from modeling.weights.runs import find_weights
from runtime.processes import on_main


def open_on_all(path: str, kind: str) -> Opened:
    """`modeling.weights.opened.open_weights` on all processes, which call this together.

    Only the main process searches for the file and verifies its hash.
    """
    return open_file(on_main(lambda: find_weights(path, kind)), kind)
