"""The whole command in one process, on features that cost nothing; test_features.py has the real."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import evaluation.evaluator
import evaluation.metrics
import evaluation.statistics
from data.images import center_crop
from evaluation.metrics import frechet_distance, in_order
from evaluation.statistics import Collector
from tests.inception import TinyFeatures
from tests.refusals import refusal
from tests.tars import packed


def pictures(count, seed, size=8):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 128 + 100 * seed, (count, size, size, 3), dtype=np.uint8)


SAMPLES, REFERENCE = pictures(20, 0), pictures(30, 1)


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Run evaluate.py on files in an empty folder; returns the JSON result and all that it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", TinyFeatures)
    np.savez("samples.npz", SAMPLES)
    np.savez("reference.npz", REFERENCE)

    def start(*arguments, samples="samples.npz", reference="reference.npz", count=20):
        argv = [f"--num_samples={count}", "--device=cpu", f"--reference={reference}", *arguments]
        evaluate.main([*argv, *([f"--samples={samples}"] if samples else [])])
        said = capsys.readouterr().out
        last = said.strip().splitlines()[-1]
        return json.loads(last) if last.startswith("{") else None, said

    return start


def write_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")


def features_of(images):
    return [x.numpy() for x in TinyFeatures()(torch.from_numpy(images).permute(0, 3, 1, 2))]


# ---------------------------------------------------------------------- results
def test_table_and_json_hold_the_five_figures_and_their_terms(score):
    result, said = score()
    ours, theirs = features_of(SAMPLES), features_of(REFERENCE)
    metrics = result["metrics"]
    assert list(metrics) == ["gFID", "sFID", "IS", "IS_std", "precision", "recall"]
    assert metrics["gFID"] == pytest.approx(frechet_distance(ours[0], theirs[0]), rel=1e-9)
    assert metrics["sFID"] == pytest.approx(frechet_distance(ours[1], theirs[1]), rel=1e-9)
    assert f"gFID       {metrics['gFID']:.4f}" in said
    assert not any(name in said for name in ("rFID", "PARTIAL", "warning:"))
    assert result["samples"]["images"] == 20 and result["reference"]["images"] == 30
    assert result["samples"]["size"] == [8, 8] and result["samples"]["duplicates"] == 0
    assert result["samples"]["hash"] != result["reference"]["hash"]
    assert result["features"]["network"] == "tiny"
    assert result["precision"] == {"network": "float32 without TF32", "statistics": "float64"}
    assert result["versions"].keys() == {"torch", "torch-fidelity", "numpy", "pillow"}
    assert result["images_asked"] == 20 and not result["partial"]


def test_folder_of_the_same_images_is_the_same_set(score, tmp_path):
    write_folder(tmp_path / "folder", SAMPLES)
    from_npz, _ = score()
    from_folder, _ = score(samples="folder")
    assert from_folder["metrics"] == from_npz["metrics"]
    assert from_folder["samples"]["hash"] == from_npz["samples"]["hash"]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_changes_nothing(score, batch):
    expected, _ = score()
    found, _ = score(f"--batch_size={batch}", "--num_workers=3")
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    assert found["samples"] == expected["samples"]


def test_identical_sets_are_warned_of(score):
    result, said = score(samples="reference.npz", count=30)
    assert "warning: reference.npz and reference.npz are the same images" in said
    assert not any("same images" in warning for warning in score()[0]["warnings"])
    metrics = result["metrics"]
    assert metrics["gFID"] < 1e-6 and metrics["sFID"] < 1e-6
    assert metrics["precision"] == metrics["recall"] == 1


def test_saved_statistics_stand_for_the_images(score, tmp_path):
    expected, _ = score()
    _, said = score("--save_stats=stats.npz", samples=None)
    assert "wrote stats.npz: 30 images" in said
    found, _ = score(reference="stats.npz")
    assert found["metrics"] == expected["metrics"]
    for key in ("images", "size", "hash", "manifold_images"):
        assert found["reference"][key] == expected["reference"][key]
    assert not list(tmp_path.glob("*.partial"))


def write_adm(path, images=None, **changed):
    pool, spatial, _ = features_of(pictures(50, 1))
    moments = {"mu": pool.mean(0), "sigma": np.cov(pool.T)}
    moments |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}
    arrays = {} if images is None else {"arr_0": images}
    np.savez(path, **{**arrays, **moments, **changed})
    return pool


def test_adm_statistics_alone_give_no_precision(score):
    pool = write_adm("adm.npz")
    result, said = score(reference="adm.npz")
    expected = frechet_distance(features_of(SAMPLES)[0], pool)
    assert result["metrics"]["gFID"] == pytest.approx(expected, rel=1e-5)
    assert result["metrics"]["precision"] is None
    assert "precision  unknown: the reference lacks its statistics" in said


def test_mean_and_covariance_alone_give_fid_and_leave_sfid_out(score):
    write_adm("adm.npz")
    with np.load("adm.npz") as arrays:
        np.savez("pytorch_fid.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    both, _ = score(reference="adm.npz")
    result, said = score(reference="pytorch_fid.npz")
    assert result["metrics"]["gFID"] == both["metrics"]["gFID"]
    assert result["metrics"]["sFID"] is None
    assert "warning: pytorch_fid.npz does not say how its images were resized" in said
    assert "sFID       unknown: the reference lacks its statistics" in said


def test_reference_of_larger_pictures_is_cropped_as_adm_does(score, tmp_path):
    large = pictures(9, 1, 20)
    write_folder(tmp_path / "large", large)
    (tmp_path / "cropped").mkdir()
    for i, image in enumerate(large):
        center_crop(Image.fromarray(image), 8).save(tmp_path / f"cropped/{i}.png")
    expected, _ = score(reference="cropped")
    result, _ = score("--crop=8", reference="large")
    assert result["metrics"] == expected["metrics"]
    assert result["reference"]["hash"] == expected["reference"]["hash"]
    (tmp_path / "large.tar").write_bytes(packed(tmp_path / "large"))
    assert score("--crop=8", reference="large.tar")[0]["metrics"] == expected["metrics"]
    refusal(lambda: score("--crop=8"), "reference.npz", "--crop")
    write_adm("adm.npz")
    refusal(lambda: score("--crop=8", reference="adm.npz"), "adm.npz", "--crop takes")
    refusal(lambda: score("--crop=0", reference="large"), "--crop")


def test_manifold_in_half_precision_is_said_and_changes_no_distance(score, monkeypatch):
    halves, distances = [], evaluation.metrics.squared_distances

    def recorded(rows, columns, half=False):
        halves.append(half)
        return distances(rows, columns, half)

    monkeypatch.setattr(evaluation.metrics, "squared_distances", recorded)
    exact, _ = score()
    assert halves and not any(halves)
    halves.clear()
    half, _ = score("--half_manifold")
    assert halves and all(halves)
    same = ("gFID", "sFID", "IS", "IS_std")
    assert all(half["metrics"][name] == exact["metrics"][name] for name in same)
    assert (exact["protocol"]["distances"], half["protocol"]["distances"]) == ("float64", "float16")
    assert half["metrics"]["precision"] == pytest.approx(exact["metrics"]["precision"], abs=0.15)


def test_protocol_names_what_figures_compare_by(score):
    result, _ = score()
    protocol = result["protocol"]
    assert protocol["network"] == "tiny" and protocol["images"] == 20
    assert protocol["reference"] == result["reference"]["hash"]
    assert protocol["image_size"] == [8, 8] and "299" in protocol["resize"]


def test_adm_file_of_both_gives_moments_from_one_and_precision_from_the_other(score):
    write_adm("adm.npz")
    write_adm("both.npz", REFERENCE)
    alone, images, both = (score(reference=f"{x}.npz")[0] for x in ("adm", "reference", "both"))
    assert both["metrics"]["gFID"] == alone["metrics"]["gFID"] != images["metrics"]["gFID"]
    assert both["metrics"]["precision"] == images["metrics"]["precision"]
    assert both["reference"]["manifold_images"] == 30
    assert alone["reference"]["hash"] in both["reference"]["hash"]


def test_large_manifolds_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(evaluation.metrics, "MANIFOLD_IMAGES", 5)
    collector = Collector("memory", 20, (8, 8), TinyFeatures())
    pixels = torch.from_numpy(SAMPLES).permute(0, 3, 1, 2)
    for first in (12, 0, 6):
        collector.add(first, pixels[first : first + (8 if first == 12 else 6)])
    side = collector.finish()
    np.testing.assert_allclose(side.parts["manifold"][0], features_of(SAMPLES)[0][3::4], rtol=1e-6)


def test_order_of_batches_changes_no_hash():
    pixels = torch.from_numpy(SAMPLES).permute(0, 3, 1, 2)
    hashes = set()
    for starts in ((0, 10), (10, 0)):
        collector = Collector("memory", 20, (8, 8), TinyFeatures())
        for start in starts:
            collector.add(start, pixels[start : start + 10])
        hashes.add(collector.finish().hash)
    other = Collector("memory", 20, (8, 8), TinyFeatures())
    other.add(0, pixels.flip(0))
    assert len(hashes) == 1 and other.finish().hash not in hashes


def test_pixels_alone_identify_a_set_as_its_features_do():
    pixels = torch.from_numpy(np.concatenate([SAMPLES, SAMPLES[:3]])).permute(0, 3, 1, 2)
    sides = [Collector("memory", 23, (8, 8), network) for network in (TinyFeatures(), None)]
    for first in (12, 0, 6):
        for side in sides:
            side.add(first, pixels[first : first + (11 if first == 12 else 6)])
    with_features, without = (side.finish() for side in sides)
    assert without.summary() == {**with_features.summary(), "manifold_images": None}
    assert without.duplicates == 3 and not without.parts


def test_rows_come_in_order():
    rows, places = [torch.tensor([[3], [0]]), torch.tensor([[1]])], [torch.tensor([3, 0]), torch.tensor([1])]  # fmt: skip
    assert in_order(rows, places, torch.device("cpu")).flatten().tolist() == [0, 1, 3]


# ---------------------------------------------------------------------- bad input
def test_incomplete_set_is_refused_or_declared(score):
    refusal(lambda: score(count=21), "samples.npz", "20 images, 21", "--allow_partial")
    result, said = score("--allow_partial", count=21)
    assert result["partial"] and result["images_asked"] == 21
    assert "PARTIAL    20 of 21 images" in said


def test_incomplete_set_is_refused_before_the_reference_is_read(score):
    refusal(lambda: score(reference="none.npz"), "none.npz")
    refusal(lambda: score(reference="none.npz", count=21), "21 are expected")


def test_more_images_than_asked_are_refused(score):
    refusal(lambda: score(count=19), "20 images", "--num_samples 20")


def test_images_of_another_size_than_the_references_are_refused(score):
    np.savez("large.npz", pictures(30, 1, 16))
    refusal(lambda: score(reference="large.npz"), "8x8", "large.npz", "16x16")
    score("--save_stats=stats.npz", samples=None, reference="large.npz")
    refusal(lambda: score(reference="stats.npz"), "8x8")


def test_statistics_are_tried_before_the_reference_is_measured(score, monkeypatch):
    monkeypatch.setattr(evaluate, "Evaluator", lambda *_: pytest.fail("the reference was measured"))
    Path("blocked").write_text("a file")
    refusal(lambda: score("--save_stats=blocked/s.npz", samples=None), "blocked")


def test_sizes_are_compared_before_the_network_reads_an_image(score, monkeypatch):
    class Unused(TinyFeatures):
        def __call__(self, images):
            raise AssertionError("an image went through the network")

    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", Unused)
    np.savez("large.npz", pictures(30, 1, 16))
    refusal(lambda: score(reference="large.npz"), "large.npz", "16x16")


def test_statistics_of_other_features_are_refused(score, monkeypatch):
    score("--save_stats=stats.npz", samples=None)
    monkeypatch.setitem(
        evaluation.evaluator.NETWORKS, "inception", lambda d, w: TinyFeatures(d, w, "other")
    )
    refusal(lambda: score(reference="stats.npz"), "stats.npz", "tiny", "other")


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(mu=np.zeros(64)), ("mu holds float64 (64,)", "(12,)", "other features")),
        (dict(sigma_s=np.full((6, 6), np.nan)), ("sigma_s holds", "not finite")),
        (dict(mu=np.array([{}] * 12)), ("bad.npz",)),
        (dict(pool_3=np.zeros((5, 64), np.float32)), ("bad.npz: pool_3", "--save_stats")),
        (dict(pool_3=np.zeros((5, 12), np.int64)), ("bad.npz: pool_3",)),
        (dict(pool_3=np.full((5, 12), np.nan, np.float32)), ("bad.npz: pool_3",)),
        (dict(size=np.array([8])), ("bad.npz: size", "(2,)")),
    ],
)
def test_unfit_statistics_are_refused(score, changed, words):
    write_adm("bad.npz", **changed)
    refusal(lambda: score(reference="bad.npz"), *words)


def test_statistics_that_lack_a_moment_are_refused(score):
    np.savez("half.npz", mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(6))
    refusal(lambda: score(reference="half.npz"), "half.npz", "sigma_s")
    np.savez("half.npz", mu=np.zeros(12))
    refusal(lambda: score(reference="half.npz"), "half.npz", "sigma")


def test_truncated_files_are_refused(score, tmp_path):
    for name in ("samples.npz", "reference.npz"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refusal(score, name, "cut short")
        path.write_bytes(whole)


def test_features_that_are_not_finite_are_refused(score, monkeypatch):
    def broken(device, weights):
        features = TinyFeatures(device)
        features.bases[0][3, 2] = float("nan")
        return features

    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", broken)
    refusal(score, "30 of 30", "reference.npz", "NaN")


def test_copies_and_few_images_are_warned_of(score):
    np.savez("samples.npz", np.concatenate([SAMPLES[:8], SAMPLES[:3]]))
    result, said = score(count=11)
    assert "warning: 3 images of samples.npz are copies of others in it" in said
    assert "warning: samples.npz holds 11 images, fewer than the 12 features" in said
    assert len(result["warnings"]) == 2 and result["samples"]["duplicates"] == 3


def test_unpublished_weights_are_warned_of(score, monkeypatch):
    monkeypatch.setattr(TinyFeatures, "published", False)
    assert "not the published file" in score()[1]


def test_one_image_has_no_covariance(score):
    np.savez("samples.npz", SAMPLES[:1])
    refusal(lambda: score(count=1), "one image")


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["needs --reference and --samples (or --save_stats)", "--reconstruction"]),
        (["--samples=a.npz"], ["scoring samples needs --reference"]),
        (["--reference=a.npz"], ["needs --samples (or --save_stats)"]),
        (["--reference=a.npz", "--save_stats=b"], ["--save_stats", ".npz"]),
        (["--reconstruction"], ["--reconstruction", "--data_path"]),
        (["--generator=x.bin"], ["--generator", "--cache"]),
        (["--classify"], ["--classify needs --cache and --generator"]),
        (
            ["--generator=x", "--cache=c", "--answers=a.csv"],
            ["--answers does not go with --generator"],
        ),
        (["--cache=c"], ["--cache does not go with scoring samples"]),
        *(
            (
                [*task.split(), flag],
                [f"{flag.split('=')[0]} does not go with {task.split()[0].split('=')[0]}"],
            )
            for task, flags in (
                ("--selfcheck", "--reference=r --save_stats=s.npz --features=dinov2 --crop=8"),
                ("--reconstruction --data_path=d", "--samples=a.npz --reference=r --half_manifold"),
                (
                    "--classify --generator=x --cache=c",
                    "--compare=y --picture=p.png --reconstruction",
                ),
                ("--generator=x --cache=c", "--reconstruction --reference=r --features=dinov2"),
            )
            for flag in flags.split()
        ),
        (
            ["--reference=a.npz", "--samples=b.npz", "--batch_size=0"],
            ["--batch_size"],
        ),
    ],
)
def test_arguments_that_make_no_task_are_refused(argv, words):
    refusal(lambda: evaluate.main(argv), *words)
