"""The weights that a new run starts from, `experiment.init_weights`.

The run starts at step 1 with a new optimizer and average.
"""

from collections.abc import Sequence
from typing import Optional
from unicodedata import normalize

import torch
from torch import Tensor

from configs.load import resumed_run
from configs.schema import Experiment
from data.classes import first_names
from modeling.generator import GeneratorConfig
from modeling.weights.metadata import GENERATOR, about_model
from modeling.weights.opened import Opened
from runtime.processes import on_main, open_on_all


def open_initial(experiment: Experiment, kind: str) -> Optional[Opened]:
    """The weights of `experiment.init_weights`, which set the sizes of a new run's model; all ranks call
    this. None without the option, and if the run resumes."""
    if experiment.init_weights is None or on_main(lambda: resumed_run(experiment)) is not None:
        return None
    return open_on_all(experiment.init_weights, kind)


def fit_classes(
    weights: Opened, config: GeneratorConfig, classes: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """A generator's tensors for the classes of a training set, and a description for the log.

    The rows of the codes and of "no class" are copied, and a class has the row of its name. If the
    weights name no classes, or the data names none for a label, it has the row of its label, provided
    the number of classes is the same. Any other class starts at the mean of the old rows. Raises
    InputError if another size differs from `config`.
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
