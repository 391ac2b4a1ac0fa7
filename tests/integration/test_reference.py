"""A fresh quickstart's losses against the reference curves."""

import pytest

from quickstart.reference import LARGEST, REFERENCE, outside
from tests.integration.conftest import ROOT, execute
from training.plot import read_records, run_records

QUICKSTART = ROOT / "output/quickstart"
SHARE = 0.1  # of the records may leave the range: luck takes single ones
CURVES = [("stage1", "mse"), ("stage2", "mse"), ("generator", "loss"), ("generator", "val/loss")]


def reference(run):
    return read_records(REFERENCE / f"{run}.jsonl")


def test_the_references_are_of_five_seeds_and_small():
    for run, name in CURVES:
        records = reference(run)
        assert {record["runs"] for record in records} == {5}
        assert any(f"low/{name}" in record for record in records)
    assert sum(file.stat().st_size for file in REFERENCE.iterdir()) <= LARGEST


@pytest.mark.slow
def test_a_fresh_stage_1_begins_within_the_range_of_five_seeds(tmp_path):
    """200 of its steps, with a seed that is none of the five, at the quickstart's rates."""
    execute("quickstart.digits", tmp_path / "data")
    execute(
        "train_tokenizer", "config=configs/digits_stage1.yaml", "training.seed=7",
        "phases=[{name: mse, steps: 200, learning_rate: 1.5e-3, end_lr: 1.45e-3}]",
        f"experiment.output_dir={tmp_path}/run", "experiment.eval_every=0", "experiment.generate_every=0",
        f"dataset.params.train_dir={tmp_path}/data/train", f"dataset.params.val_dir={tmp_path}/data/val",
    )  # fmt: skip
    beginning = [
        record for record in reference("stage1") if record["step"] <= 100
    ]  # smoothed to 200
    for name in ("mse", "quantizer"):
        left = outside(run_records(tmp_path / "run"), beginning, name)
        assert not left, f"{name} leaves the range at steps {left}"


@pytest.mark.slow
@pytest.mark.parametrize("run, name", CURVES)
def test_a_fresh_quickstart_stays_within_the_range_of_five_seeds(run, name):
    if not (QUICKSTART / "generator/generator.bin").exists():  # finished; never in CI
        pytest.skip("no finished output/quickstart: run quickstart.sh first, for ten minutes")
    records = reference(run)
    left = outside(run_records(QUICKSTART / run), records, name)
    known = sum(name in record for record in records)
    assert len(left) <= SHARE * known, f"{name} of {run} leaves the range at steps {left}"
