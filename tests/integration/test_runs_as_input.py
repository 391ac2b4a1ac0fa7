"""A run's folder, or a checkpoint of it, in place of a weights file, in every program."""

import json

import numpy as np
import pytest

from tests.integration.test_bad_input import refused


def array(path):
    return np.load(path)["arr_0"]


@pytest.mark.slow
def test_sampling_takes_runs_and_checkpoints_with_their_sizes(workspace, tmp_path):
    text = (workspace.root / "generator.yaml").read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("encoder_heads: 2", "encoder_heads: 4"))
    run, run_ar = workspace.tokenizer.parent, workspace.generator.parent
    files = "experiment.num_fid_samples=4", "experiment.save_png=False"
    workspace.sample(tmp_path / "a", *files)
    folders = [
        f"experiment.tokenizer_checkpoint={run}/checkpoints/step-00000004",
        f"experiment.generator_checkpoint={run_ar}/checkpoints/step-00000006",
    ]
    done = workspace.sample(tmp_path / "b", f"config={other}", *folders, *files, check=False)
    refused(done, "config")  # one config only
    other.replace(tmp_path / "kept.yaml")
    (workspace.root / "generator.yaml").write_text((tmp_path / "kept.yaml").read_text())
    try:
        done = workspace.sample(tmp_path / "c", *folders, *files, check=False)
        refused(done, "encoder_heads=4 (", "whose weights have encoder_heads=2")
    finally:
        (workspace.root / "generator.yaml").write_text(text)
    workspace.sample(tmp_path / "b", *folders, *files)
    assert (array(tmp_path / "a.npz") == array(tmp_path / "b.npz")).all()
    assert json.loads((tmp_path / "b/sampling.json").read_text())["encoder_heads"] == 2
