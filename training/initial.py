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
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.opened import Opened
from modeling.weights.runs import find_weights
from modeling.weights.tensors import read_state_dict, tensors_hash
from runtime.errors import InputError


def check_same_start(recorded: Optional[dict[str, str]], path: Optional[str], source: Path) -> None:
    """Raise InputError if the run of checkpoint `source` did not start from the weights at `path`.

    `recorded` is what it started from: `path`, `experiment.init_weights` as it was named, and `hash`.

    The same path is taken for the same weights: a run folder may have newer ones by now, and a file
    may be gone. Another path is read and compared by its tensors. None stands for what is recorded.
    """
    if path is None or (recorded is not None and recorded["path"] == path):
        return
    if recorded is not None:
        there = tensors_hash(read_state_dict(find_weights(path, GENERATOR, TOKENIZER)))
        if there == recorded["hash"]:
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
    first = config.codebook_size + 1  # the row of class 0; the last row is "no class"
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
