"""The weights that a new run starts from, `experiment.init_weights`, and their record in its checkpoints.

The run starts at step 1 with a new optimizer and average. The record prevents that it is resumed as a
run that started elsewhere.
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
    """A generator's tensors for the classes of a training set, and a description for the log.

    With the same number of classes their rows are copied by label, with a warning that lists renamed
    classes. With another number, each class starts at the mean of the old rows. All other rows are
    copied. Raises InputError if another size differs from `config`.
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
    """A warning that lists classes whose rows belonged to classes of other names; empty if none."""
    other = [f"{new} at {old}" for old, new in zip(before, after) if old != new]
    if not other:
        return ""
    return (
        f"; warning: {len(other)} classes start at the rows of other classes: {first_names(other)}"
    )
