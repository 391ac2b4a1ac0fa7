import json

import numpy as np
import pytest

import evaluation.compare
import sample_imagenet
from evaluation import sweep
from runtime.errors import InputError
from tests.inception import TinyFeatures


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """An empty folder with a reference, and a sampler whose images grow paler with the scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation.compare, "Inception", TinyFeatures)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 100, (16, 8, 8, 3), dtype=np.uint8)
    np.savez("reference.npz", noise)
    calls = []

    def sample(argv):
        given = dict(option.split("=") for option in argv)
        calls.append(given)
        folder = tmp_path / given["experiment.output_dir"]
        folder.mkdir(parents=True)
        shift = float(given["model.generator.guidance_scale"]) * 10
        shift += float(given["model.generator.guidance_scale_pow"])
        count = int(given["experiment.num_fid_samples"])
        np.savez(f"{folder}.npz", (noise[:count] + shift).astype(np.uint8))

    monkeypatch.setattr(sample_imagenet, "main", sample)
    return calls


ARGUMENTS = ["--reference=reference.npz", "--num_samples=16", "--output=out", "config=c.yaml"]
GRID = ["--scales=2,0.5", "--powers=1,3"]


def test_every_cell_is_sampled_scored_and_shown(asked, tmp_path, capsys):
    sweep.main([*ARGUMENTS, *GRID])
    assert [c["model.generator.guidance_scale"] for c in asked] == ["2.0", "2.0", "0.5", "0.5"]
    assert [c["model.generator.guidance_scale_pow"] for c in asked] == ["1.0", "3.0"] * 2
    assert {c["config"] for c in asked} == {"c.yaml"}
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if " / " in line][1:]
    assert [row[0] for row in rows] == ["2", "0.5"]
    assert said.count("*") == 2 and rows[1][3].endswith("*")  # the legend, and the palest shift
    result = json.loads((tmp_path / "out/scale2_power3.json").read_text())
    assert f"{result['metrics']['gFID']:.2f}" == rows[0][4]
    assert result["samples"]["images"] == 16
    assert not list(tmp_path.glob("out/*.npz")) and not (tmp_path / "out/scale2_power3").exists()


def test_heat_map_is_darkest_at_the_lowest_distance(asked, tmp_path):
    from PIL import Image

    sweep.main([*ARGUMENTS, *GRID])
    picture = Image.open(tmp_path / "out/sweep.png")
    width, height = sweep.CELL
    assert picture.size == (sweep.MARGIN + 2 * width, sweep.MARGIN + 2 * height)
    corners = {
        (i, j): picture.getpixel((sweep.MARGIN + j * width + 2, sweep.MARGIN + i * height + 2))
        for i in range(2)
        for j in range(2)
    }
    assert corners[1, 0] == sweep.BEST and corners[0, 1] == sweep.WORST
    assert corners[0, 0] not in (sweep.BEST, sweep.WORST)


def test_finished_cells_are_not_sampled_again(asked, capsys):
    sweep.main([*ARGUMENTS, "--scales=2", "--powers=1"])
    sweep.main([*ARGUMENTS, *GRID])
    assert len(asked) == 4  # one, and the three that were missing
    sweep.main([*ARGUMENTS, *GRID])
    assert len(asked) == 4


@pytest.mark.parametrize("other", ["--num_samples=12", "config=d.yaml"])
def test_results_of_other_settings_are_not_mixed_in(asked, other):
    sweep.main([*ARGUMENTS, "--scales=2", "--powers=1"])
    arguments = [a for a in ARGUMENTS if a.split("=")[0] != other.split("=")[0]]
    with pytest.raises(InputError, match=r"other settings.*--output"):
        sweep.main([*arguments, other, "--scales=2", "--powers=1"])
    assert len(asked) == 1


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--scales=2,x", "2,x: give numbers"),
        ("model.generator.guidance_scale=3", "the sweep sets this itself"),
        ("model.generator.guidance_scale_pow=3", "the sweep sets this itself"),
        ("experiment.output_dir=x", "the sweep sets this itself"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(asked, argument, words):
    with pytest.raises(InputError, match=words):
        sweep.main([*ARGUMENTS, *GRID, argument])
    assert not asked
