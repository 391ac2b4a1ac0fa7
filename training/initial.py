"""The weights that a new run starts from, `experiment.init_weights`, and the record of them.

Only weights are taken: the run has step 1, a new optimizer and an average that starts as a copy. Its
checkpoints record what it started from, so that it is not resumed as a run that started elsewhere.
"""

from pathlib import Path
from typing import Optional, TypedDict

import torch
from torch import Tensor

from modeling.generator import GeneratorConfig
from modeling.weights.tensors import tensors_hash
from runtime.errors import InputError
from training.checkpoint import read_weights, weights_file

NAMES = ("generator", "tokenizer")  # what checkpoints call the weights to use


class Record(TypedDict):
    """What a run started from: `experiment.init_weights` as it was named, and `tensors_hash`."""

    path: str
    hash: str


def initial_file(path: str) -> Path:
    """The weights file that `experiment.init_weights` stands for (`checkpoint.weights_file`)."""
    return weights_file(path, *NAMES)


def check_same_start(recorded: Optional[Record], path: Optional[str], source: Path) -> None:
    """Raise InputError if the run of checkpoint `source` did not start from the weights at `path`.

    The same path is taken for the same weights: a run folder may have newer ones by now, and a file
    may be gone. Another path is read and compared by its tensors. None stands for what is recorded.
    """
    if path is None or (recorded is not None and recorded["path"] == path):
        return
    if recorded is not None and tensors_hash(read_weights(path, *NAMES)) == recorded["hash"]:
        return
    start = "random weights" if recorded is None else recorded["path"]
    raise InputError(
        f"{source} belongs to a run that started from {start}, not from experiment.init_weights={path}: "
        f"leave init_weights out (null) to resume it, or set another experiment.output_dir to start "
        f"a run from these weights"
    )


def fit_classes(
    state: dict[str, Tensor], config: GeneratorConfig, source: str
) -> tuple[dict[str, Tensor], str]:
    """A generator's tensors for `config.condition_num_classes`, and in words what was done.

    The rows of the codes and of "no class" are copied. With another number of classes their meaning
    has changed: every class then starts at the mean of the old rows. Raises InputError where
    the codes are others. A state dict of another model is returned unchanged.
    """
    name = "embeddings.weight"
    if name not in state or "output.weight" not in state:
        return state, ""
    codes, rows = len(state["output.weight"]), state[name]
    if codes != config.codebook_size:
        raise InputError(
            f"{source} is a generator of {codes} codes, but model.generator.codebook_size="
            f"{config.codebook_size}: codes of another tokenizer mean something else; pass a "
            f"generator of this tokenizer's codes"
        )
    first = codes + 1  # the row of class 0; the last row is "no class"
    before, after = len(rows) - first - 1, config.condition_num_classes
    if before < 1 or before == after:
        return state, ""
    mean = rows[first:-1].float().mean(0, keepdim=True).expand(after, -1)
    fitted = torch.cat([rows[:first], mean.to(rows.dtype), rows[-1:]])
    words = f"; {after} classes instead of {before}: every class starts at the mean of the old ones"
    return {**state, name: fitted}, words
