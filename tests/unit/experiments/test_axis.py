"""The axis: places, effects, the plateau's rule and the line, from figures as the study writes them."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from experiments.alignment import axis
from experiments.alignment.axis import (
    Pair,
    bits_at_equal_psnr,
    joined,
    known_pairs,
    pairs_of,
    table,
    trend,
)
from experiments.alignment.results import Result
from experiments.alignment.rows import ROWS
from tests.refusals import refusal

FIGURES = {
    "psnr": 20.0, "entropy": 7.0, "fid_decoded": 200.0, "fid_decoded_1": 200.0, "fid_decoded_2": 230.0,
    "fid_decoded_4": 300.0, "top1": 0.1, "nats": 4.0, "changed": 0.3,
}  # fmt: skip


def pair(needed=64.0, codes=256, **after):
    return Pair(64, 8, codes, 1, needed, 20.5, FIGURES, {**FIGURES, **after})


def test_the_place_is_the_logarithm_of_how_much_too_small_a_code_is():
    assert pair(needed=64, codes=256).place == 3
    assert pair(needed=64, codes=16).place == 4


def test_an_effect_is_causal_over_bidirectional():
    found = pair(fid_decoded=100.0, top1=0.2, nats=3.9, changed=0.25)
    assert found.effect("fid_decoded") == pytest.approx(-math.log(2))
    assert found.effect("top1") == pytest.approx(math.log(2))
    assert found.effect("nats") == pytest.approx(-0.1)
    assert found.effect("changed") == pytest.approx(-5)


def test_a_run_below_patches_of_one_colour_is_on_a_plateau():
    assert not pair(psnr=19.6).on_plateau
    assert pair(psnr=19.4).on_plateau
    assert "left out" in table([pair(psnr=19.4)]) and "left out" not in table([pair()])


def test_the_line_has_its_slope_and_error():
    exact = trend([1.0, 2.0, 3.0, 4.0], [-0.1, -0.2, -0.3, -0.4])
    assert (exact.slope, exact.intercept) == pytest.approx((-0.1, 0), abs=1e-12)
    assert exact.mean == pytest.approx(-0.25) and exact.mean_low < -0.25 < exact.mean_high
    noisy = trend([1.0, 2.0, 3.0, 4.0], [-0.1, 0.2, -0.3, 0.1])
    assert noisy.slope_low < 0 < noisy.slope_high and noisy.slope_p > 0.5
    refusal(lambda: trend([1.0, 2.0], [0.0, 0.1]), "2 pairs")


def test_pairs_are_gathered_from_the_variations_of_photographs(tmp_path, monkeypatch):
    """A seed that lacks a row is not a pair; the ablation itself, on digits, is not on the axis."""
    rows = {row.name: row for row in ROWS}
    names = ["", "data=photographs,image_size=32", "data=photographs,codebook_size=1024"]

    def collect(output, variation):
        runs = [("bidirectional", 1), ("causal", 1), ("causal", 2)]
        results = [Result(variation, rows[name], seed, tmp_path) for name, seed in runs]
        for result in results:
            result.__dict__["figures"] = {**FIGURES, "psnr": 20.0 + result.seed}
        return results

    monkeypatch.setattr(axis, "variations_of", lambda output: names)
    monkeypatch.setattr(axis, "collect", collect)
    monkeypatch.setattr(axis, "patch_figures", lambda data, *place: (80.0, 20.5))
    found = joined(pairs_of(tmp_path), [])
    assert [(p.image_size, p.patch_size, p.codebook_size, p.seed) for p in found] == [
        (64, 8, 1024, 1), (32, 8, 256, 1),
    ]  # fmt: skip
    assert found[0].place == 3 and found[0].before["psnr"] == 21.0
    monkeypatch.setattr(axis, "variations_of", lambda output: names[:1])
    refusal(lambda: joined(pairs_of(tmp_path), []), "no finished pair")


def test_pairs_of_an_earlier_call_are_added_once(tmp_path):
    file = tmp_path / "axis.json"
    file.write_text(
        json.dumps({"pairs": [asdict(pair(needed=64)), asdict(pair(needed=32, codes=16))]})
    )
    known = known_pairs(file)
    assert joined([pair(codes=1024)], known) == [pair(codes=1024), known[0], known[1]]
    refusal(lambda: joined([pair(codes=16)], known), "16 codes, seed 1")
    file.write_text("[]")
    refusal(lambda: known_pairs(file), file)
    refusal(lambda: known_pairs(tmp_path / "none.json"), "none.json")


def test_the_picture_of_known_pairs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: None)
    known = Path(axis.__file__).parent / "axis.json"
    axis.main([str(tmp_path), "--known", str(known)])
    again, before = json.loads((tmp_path / "axis.json").read_text()), json.loads(known.read_text())
    assert again == before and len(again["pairs"]) == 9


def test_bits_at_equal_psnr_are_the_distance_of_two_lines():
    """Per patch, 60 and 90 bits per dB; the causal row has 0.3 dB less, and 5 bits more at equal PSNR."""
    pairs = []
    for patch, slope in ((4, 60.0), (8, 90.0)):
        for n, codes in enumerate((64, 256, 1024)):
            psnr, noise = 20.0 + 0.2 * n, (0.5, -0.9, 0.4)[n]
            before = {"psnr": psnr, "bits": slope * (psnr - 19) + noise}
            after = {"psnr": psnr - 0.3, "bits": slope * (psnr - 0.3 - 19) + 5 - noise}
            pairs.append(replace(pair(codes=codes), patch_size=patch, before=before, after=after))
    more, low, high = bits_at_equal_psnr(pairs)
    assert more == pytest.approx(5, abs=0.5) and low < 5 < high and high - low < 5
    refusal(lambda: bits_at_equal_psnr(pairs[:1]), "1 pairs")
