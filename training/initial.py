"""The weights that a new run starts from, `experiment.init_weights`, and their record in its checkpoints.

The run starts at step 1 with a new optimizer and average. The record prevents a resume of a run that started
elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional
from unicodedata import normalize

import torch
from torch import Tensor

from configs.load import resumed_run
from configs.schema import Experiment
from data.classes import first_names
from modeling.generator import GeneratorConfig
from modeling.weights.metadata import GENERATOR, about_model
from modeling.weights.opened import Opened, open_weights
from modeling.weights.tensors import tensors_hash
from runtime.errors import InputError
from runtime.processes import on_main
from runtime.weights import open_on_all


def record_of(path: str, weights: Opened) -> dict[str, str]:
    """The record of a run's initial weights in its checkpoints; `path` is `experiment.init_weights`."""
    return {"path": path, "hash": tensors_hash(weights.state)}


def open_initial(experiment: Experiment, kind: str) -> Optional[Opened]:
    """The weights of `experiment.init_weights`, which set the sizes of a new run's model; all ranks call
    this. None without the option, and if the run resumes."""
    if experiment.init_weights is None or on_main(lambda: resumed_run(experiment)) is not None:
        return None
    return open_on_all(experiment.init_weights, kind)


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

    The rows of the codes and of "no class" are copied, and a class has the row of its name. If the weights
    or the data do not name a class, it has the row of its label, if there are as many classes. Any other class starts at the mean of the old rows. Raises InputError if another size differs from
    `config`.
    """
    here = about_model(GENERATOR, config).config
    before, after = weights.about.config["condition_num_classes"], here.pop("condition_num_classes")
    weights.about.sizes(here, weights.file, "model.generator.{}={}".format)
    rows = [row if before == after else None for row in range(after)]  # by label
    if weights.about.classes is not None:
        named = {normalize("NFC", name): row for row, name in enumerate(weights.about.classes)}
        rows[: len(classes)] = [named.get(normalize("NFC", name)) for name in classes]
    if rows == list(range(before)):
        return weights.state, ""
    state, name = weights.state, "embeddings.weight"
    table, first = state[name], int(config.condition_rows(torch.tensor(0)))
    old, no_class = table[first:-1], table[-1:]
    mean = old.float().mean(0).to(table.dtype)
    made = [mean if row is None else old[row] for row in rows]
    fitted = torch.cat([table[:first], torch.stack(made), no_class])
    names = [*classes, *map(str, range(len(classes), after))]
    new = [name for name, row in zip(names, rows) if row is None]
    words = f"; {after} instead of {before} classes" * (before != after)
    if new:
        words += f"; {len(new)} new, at the mean of the old ones: {first_names(new)}"
    return {**state, name: fitted}, words
