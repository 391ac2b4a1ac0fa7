"""Figures of runs, rows over seeds and paired differences, from files as the commands write them."""

import json
import math

import pytest

from experiments.alignment import ablation, charts
from experiments.alignment.results import collect, difference, gained, groups_of, neighbours
from experiments.alignment.rows import ROWS
from experiments.alignment.table import difference_table, table, write_tables
from tests.refusals import refusal


def write_run(folder, nats, tokens, psnr, stage2=None):
    for part in ("stage1", "generator", *(["stage2"] if stage2 else [])):
        (folder / part).mkdir(parents=True)
    bits = nats * tokens / math.log(2)
    likelihood = {
        "metrics": {"nats_per_code": nats, "bits_per_image": bits, "top1": 0.25},
        "cache": {"codes": tokens},
    }
    (folder / "likelihood.json").write_text(json.dumps(likelihood))
    scores = {"fid": 1.5, "recognised": 0.9, "fid_val": 0.1, "recognised_val": 0.99, "copied": 0.0}
    (folder / "scores_stage1.json").write_text(json.dumps(scores))
    write_records(
        folder / "stage1", {"step": 1, "val/psnr": 1.0}, {"step": 2, "val/psnr": psnr, "val/codebook_use": 0.5, "val/perplexity": 9.0},
    )  # fmt: skip
    write_records(
        folder / "generator", {"step": 1, "loss": 4.0}, {"step": 1, "val/loss": nats}, {"step": 2, "loss": 1.0}, {"step": 2, "val/loss": nats + 1},
    )  # fmt: skip
    if stage2:
        write_records(folder / "stage2", {"step": 1, "val/psnr": stage2})
        (folder / "scores_stage2.json").write_text(json.dumps({**scores, "fid": 1.0}))


def write_records(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def output(tmp_path):
    """Three seeds of rows with nats of known differences, and a variation of one of them."""
    for seed, nats in ((1, 2.0), (2, 2.1), (10, 2.3)):
        run = tmp_path / f"seed_{seed}"
        write_run(run / "bidirectional", nats, 64, 27.0)
        write_run(run / "causal", nats + 0.1 * seed, 64, 26.0 + seed / 10)
        write_run(run / "aux", nats, 73, 25.0, stage2=26.5)
    write_run(tmp_path / "vary/steps=3/seed_1/causal", 1.5, 64, 29.0)
    return tmp_path


def test_the_figures_of_a_run_are_those_of_its_files(output):
    results = {(r.row.name, r.seed): r.figures for r in collect(output)}
    assert list(results)[:3] == [("bidirectional", 1), ("bidirectional", 2), ("bidirectional", 10)]
    assert results["causal", 2] == pytest.approx({
        "nats": 2.3, "bits": 2.3 * 64 / math.log(2), "top1": 0.25, "psnr": 26.2,
        "codebook_use": 0.5, "perplexity": 9.0, "tokens": 64, "training loss": 4.0, "fid": 1.5,
        "recognised": 0.9, "fid_val": 0.1, "recognised_val": 0.99, "copied": 0.0, "gained": 25.2,
    })  # fmt: skip
    first, second = results["aux", 1], results["stage2", 1]
    assert (first["psnr"], second["psnr"]) == (25.0, 26.5)
    assert (first["fid"], second["fid"]) == (1.5, 1.0)
    assert first["nats"] == second["nats"]


def test_the_last_third_of_stage_1_shows_whether_it_still_gains():
    records = [
        {"step": step, "val/psnr": psnr}
        for step, psnr in ((100, 9), (350, 18), (400, 19), (600, 20.5))
    ]
    assert gained(records, "val/psnr") == 1.5


def test_a_look_inside_joins_the_figures_of_its_run(output):
    row = {
        "name": "causal", "masked": {"another image": {"earlier": [0.1, 0.3]}, "mean colour": {"earlier": [0.9]}},
        "replaced": {"shares": {"earlier": 0.0, "own": 0.75, "later": 0.25}},
        "neighbours": {"bits": {"nothing": 7.0, "left": 5.0, "above": 6.0, "left and above": 5.5}},
    }  # fmt: skip
    (output / "inside/seed_2").mkdir(parents=True)
    (output / "inside/seed_2/inside.json").write_text(json.dumps({"rows": [row]}))
    results = {(r.row.name, r.seed): r.figures for r in collect(output)}
    found = {name: results["causal", 2][name] for name in ("changed", "later", "by neighbours")}
    assert found == pytest.approx({"changed": 0.2, "later": 0.25, "by neighbours": 5.0})
    assert "changed" not in results["bidirectional", 2]


def test_unfinished_runs_are_left_out(output):
    (output / "seed_2/causal/scores_stage1.json").unlink()
    assert ("causal", 2) not in {(r.row.name, r.seed) for r in collect(output)}


def test_a_difference_is_that_of_a_paired_t_test():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t = 2√3 with two degrees of freedom."""
    before, after = {1: 5.0, 2: 7.0, 3: 1.0, 4: 0.0}, {3: 4.0, 1: 6.0, 2: 9.0}
    found = difference("nats", before, after)
    t, error = 2 * math.sqrt(3), 1 / math.sqrt(3)
    # The distribution of t with two degrees of freedom has a closed form.
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.mean == 2 and found.seeds == 3
    assert found.low == pytest.approx(2 - 4.302653 * error)
    assert found.high == pytest.approx(2 + 4.302653 * error)


def test_one_seed_and_equal_differences_have_no_p():
    assert difference("nats", {1: 1.0}, {1: 3.0}).p is None
    assert difference("nats", {1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p is None
    refusal(lambda: difference("nats", {1: 1.0}, {2: 1.0}), "seed")


def test_each_row_is_compared_with_the_one_before_it_and_a_variation_with_its_row(output):
    plain, varied = collect(output), collect(output, "steps=3")
    pairs = [(a.title, b.title) for a, b in neighbours(groups_of([*plain, *varied]))]
    titles = {row.name: row.title for row in ROWS}
    assert pairs == [
        (titles["bidirectional"], titles["causal"]),
        (titles["causal"], titles["aux"]),
        (titles["aux"], titles["stage2"]),
        (titles["causal"], titles["causal"] + ", steps=3"),
    ]


def test_a_row_that_shares_codes_is_compared_with_the_row_that_made_them(output):
    write_run(output / "seed_1/prefix", 2.0, 73, 25.0, stage2=26.5)
    pairs = [(a.row.name, b.row.name) for a, b in neighbours(groups_of(collect(output)))]
    assert pairs == [
        ("bidirectional", "causal"),
        ("causal", "prefix"),
        ("prefix", "aux"),
        ("aux", "stage2"),
        ("prefix", "quickstart"),
    ]


def test_the_tables_say_what_was_measured(output):
    groups = groups_of(collect(output))
    lines = [line.split(" | ") for line in table(groups).splitlines()]
    assert lines[0][3] == "nats per code" and lines[3][3] == "2.567 ± 0.643"  # 2.1, 2.3, 3.3
    assert lines[-1][7:9] == ["0.10", "99.0"]
    lines = [line.split(" | ") for line in difference_table(neighbours(groups)).splitlines()]
    assert lines[2][1].startswith("+0.433 (p 0.268)")  # 0.1, 0.2, 1.0: t = 1.52
    assert lines[4][1] == "same" and lines[4][4] == "+1.50"  # of all seeds alike


def test_files_of_a_study_and_of_its_variation(output, capsys):
    write_tables(output)
    write_tables(output, "steps=3")
    found = json.loads((output / "results.json").read_text())
    assert [row["row"] for row in found["rows"]] == ["bidirectional", "causal", "aux", "stage2"]
    assert found["rows"][1]["figures"]["nats"]["seeds"] == pytest.approx(
        {"1": 2.1, "2": 2.3, "10": 3.3}
    )
    assert found["differences"][0]["metrics"][0]["mean"] == pytest.approx(1.3 / 3)
    varied = json.loads((output / "vary/steps=3/results.json").read_text())
    assert [(r["row"], r["variation"]) for r in varied["rows"]] == [
        ("causal", ""),
        ("causal", "steps=3"),
    ]
    assert (output / "table.md").read_text().strip() in capsys.readouterr().out
    for name in ("rows.png", "answer.png", "curves.png", "vary/steps=3/rows.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_variations_are_gathered(output):
    write_run(output / "vary/steps=3/seed_1/bidirectional", 1.7, 64, 29.0)
    write_tables(output)
    lines = (output / "variations.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["+0.433 (p 0.268)", "-0.200"]
    assert (output / "variations.png").exists()


def test_nothing_finished_is_said(tmp_path):
    refusal(lambda: write_tables(tmp_path), "no finished run")


def test_a_study_without_matplotlib_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    refusal(lambda: ablation.main(["--output", str(tmp_path / "out")]), "matplotlib")
    assert not (tmp_path / "out").exists()
