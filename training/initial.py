"""The weights that a new run starts from, `experiment.init_weights`, and the record of them.

Only weights are taken: the run has step 1, a new optimizer and an average that starts as a copy. Its
checkpoints record what it started from, so that it is not resumed as a run that started elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from data.classes import first_names
from modeling.generator import GeneratorConfig
from modeling.weights.metadata import GENERATOR, about_model
from modeling.weights.opened import Opened, open_weights
from modeling.weights.tensors import tensors_hash
from runtime.errors import InputError


def record_of(path: str, weights: Opened) -> dict[str, str]:
    """What a run's checkpoints record of its initial weights; `path` is `experiment.init_weights`."""
    return {"path": path, "hash": tensors_hash(weights.state)}


def check_same_start(
    recorded: Optional[dict[str, str]], path: Optional[str], kind: str, source: Path
) -> None:
    """Raise InputError if the run of checkpoint `source` did not start from the weights at `path`.

    `recorded` is the `record_of` its start; None: it started from random weights. An equal path counts
    as the same weights: a run folder may hold newer ones by now, and a file may be gone. The weights at
    another path, of a model of this kind, are read and compared. A `path` of None fits any start.
    """
    if path is None or (recorded is not None and recorded["path"] == path):
        return
    if recorded and recorded["hash"] == record_of(path, open_weights(path, kind))["hash"]:
        return
    start = "random weights" if recorded is None else recorded["path"]
    raise InputError(
        f"{source} belongs to a run that started from {start}, not from experiment.init_weights={path}: "
        f"leave init_weights out (null) to resume it, or set another experiment.output_dir to start "
        f"a run from these weights"
    )


def fit_classes(
    weights: Opened, config: GeneratorConfig, classes: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """A generator's tensors for the classes of a training set, and in words what was done.

    The rows of the codes and of "no class" are copied. With another number of classes their meaning
    has changed: every class then starts at the mean of the old rows. With the same number the rows are
    copied by label; classes that are called otherwise are named. Raises InputError where
    another size is not that of `config`.
    """
    here = about_model(GENERATOR, config).config
    before, after = weights.about.config["condition_num_classes"], here.pop("condition_num_classes")
    weights.about.sizes(here, weights.file, "model.generator.{}={}".format)
    if before == after:
        return weights.state, renamed_rows(weights.about.classes or (), classes)
    state, name = weights.state, "embeddings.weight"
    first = int(config.condition_rows(torch.tensor(0)))  # the last row is "no class"
    rows = state[name]
    mean = rows[first:-1].float().mean(0, keepdim=True).expand(after, -1)
    fitted = torch.cat([rows[:first], mean.to(rows.dtype), rows[-1:]])
    words = f"; {after} classes instead of {before}: every class starts at the mean of the old ones"
    return {**state, name: fitted}, words


def renamed_rows(before: Sequence[str], after: Sequence[str]) -> str:
    """In words, the classes whose rows belonged to classes of other names; empty without any."""
    other = [f"{new} at {old}" for old, new in zip(before, after) if old != new]
    if not other:
        return ""
    return (
        f"; warning: {len(other)} classes start at the rows of other classes: {first_names(other)}"
    )
