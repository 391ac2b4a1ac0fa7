import json

import pytest

from quickstart import reference
from quickstart.reference import outside, smoothed
from tests.refusals import refusal
from training import plot
from training.plot import curve, read_records


def write_run(folder, seed=0, names=("loss", "accuracy"), steps=12):
    """A run whose loss falls, with a bump per seed, and a validation record every fourth step."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        values = {name: 3 - 0.1 * step + 0.01 * ((step * (seed + 3)) % 5) for name in names}
        lines.append({"step": step, "lr": 1e-3, **values, "images/s": 100.0 + seed})
        if step % 4 == 0:
            lines.append({"step": step, "val/loss": 3 - 0.1 * step + 0.01 * seed})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9'  # cut by a kill
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def quickstarts(tmp_path):
    for seed in range(3):
        for name, names in (("stage1", ("mse", "quantizer")), ("generator", ("loss", "accuracy"))):
            write_run(tmp_path / f"seed{seed}" / name, seed, names)
    return [tmp_path / f"seed{seed}" for seed in range(3)]


def make(folders, tmp_path):
    reference.main([*map(str, folders), "--output", str(tmp_path / "reference")])
    return tmp_path / "reference"


def test_reference_is_the_smoothed_first_run_with_the_range_of_all(quickstarts, tmp_path):
    folder = make(quickstarts, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["generator.jsonl", "stage1.jsonl"]
    made = read_records(folder / "generator.jsonl")
    curves = [
        smoothed(curve(read_records(run / "generator/metrics.jsonl"), "loss"))
        for run in quickstarts
    ]
    assert [record["step"] for record in made] == list(range(1, 13))
    for record in made:
        found = [values[record["step"]] for values in curves]
        assert record["loss"] == pytest.approx(found[0], rel=1e-4)
        assert record["low/loss"] == pytest.approx(min(found), rel=1e-4)
        assert record["high/loss"] == pytest.approx(max(found), rel=1e-4)
        assert "images/s" not in record
    assert curve(made, "val/loss") == {4: 2.6, 8: 2.2, 12: 1.8}  # as it was measured
    assert curve(made, "high/val/loss") == {4: 2.62, 8: 2.22, 12: 1.82}


def test_smoothing_takes_the_records_around():
    assert smoothed({1: 1, 2: 2, 3: 9, 4: 4, 5: 5, 6: 6})[4] == (2 + 9 + 4 + 5 + 6) / 5
    assert smoothed({1: 1, 2: 2, 3: 9})[1] == 4


def test_a_run_outside_the_range_is_found(quickstarts, tmp_path):
    folder = make(quickstarts, tmp_path)
    known = read_records(folder / "generator.jsonl")
    records = read_records(quickstarts[1] / "generator/metrics.jsonl")
    assert outside(records, known, "loss") == outside(records, known, "val/loss") == []
    for record in records:
        if record["step"] > 9 and "loss" in record:
            record["loss"] += 0.2
    assert set(outside(records, known, "loss")) >= {10, 11, 12}
    assert not set(outside(records, known, "loss")) & set(range(1, 8))
    records[-1]["val/loss"] = float("nan")
    assert outside(records, known, "val/loss") == [12]
    refusal(lambda: outside(records[:-2], known, "loss"), "loss", "step 12")


def test_plot_draws_a_run_over_the_reference(quickstarts, tmp_path):
    folder = make(quickstarts, tmp_path)
    argv = [str(quickstarts[1] / "stage1"), "--output", str(tmp_path / "a.png")]
    plot.main(argv)
    without = (tmp_path / "a.png").read_bytes()
    plot.main([*argv, "--reference", str(folder / "stage1.jsonl")])
    assert (tmp_path / "a.png").read_bytes() != without
    figure = plot.plot_curves(
        {"run": read_records(quickstarts[1] / "stage1/metrics.jsonl")},
        read_records(folder / "stage1.jsonl"),
    )
    (axis,) = [axis for axis in figure.axes if axis.get_title() == "mse"]
    assert len(axis.collections) == 1  # the range
    assert list(axis.lines[0].get_ydata()) == list(curve(read_records(folder / "stage1.jsonl"), "mse").values())  # fmt: skip


# ---------------------------------------------------------------------- bad input
def unfinished(quickstarts, tmp_path):
    (quickstarts[1] / "generator/metrics.jsonl").unlink()
    return quickstarts


def shorter(quickstarts, tmp_path):
    write_run(tmp_path / "short/generator", steps=5)
    write_run(tmp_path / "short/stage1", names=("mse", "quantizer"), steps=12)
    return [quickstarts[0], tmp_path / "short"]


def longer(quickstarts, tmp_path):
    write_run(tmp_path / "long/generator", steps=2000)
    return [tmp_path / "long"]


@pytest.mark.parametrize(
    "runs, named",
    [
        (lambda quickstarts, tmp_path: [tmp_path / "nothing"], "quickstart.sh"),
        (unfinished, "seed1/generator"),
        (shorter, "at step"),
        (longer, 50000),
    ],
)
def test_runs_that_make_no_reference_are_refused(quickstarts, tmp_path, runs, named):
    folders = runs(quickstarts, tmp_path)
    refusal(lambda: make(folders, tmp_path), named)
    assert not (tmp_path / "reference").exists()


def test_a_reference_of_one_seed_has_no_range(quickstarts, tmp_path):
    known = read_records(make(quickstarts[2:], tmp_path) / "generator.jsonl")
    records = read_records(quickstarts[2] / "generator/metrics.jsonl")
    refusal(lambda: outside(records, known, "loss"), "loss", "several seeds")
