"""Pretokenization as it is used and as it is interrupted, in processes forked from a warm one."""

import json
import random
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from configs.load import load_sizes
from data.images import center_crop, load_image, to_float, to_uint8
from data.tokens import NpzStore, TokenStore, open_tokens
from encoding.job import encode
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import TOKENIZER, about_model
from modeling.weights.opened import load_tokenizer, open_weights
from modeling.weights.tensors import read_state_dict, write_state_dict


def image_dependent_tokenizer(workspace, path):
    """Random weights so large that no two views share their codes: a mix-up cannot hide."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = Tokenizer(config_of(workspace))
    state = {
        name: tensor if "ln_" in name else torch.randn(tensor.shape, generator=generator)
        for name, tensor in tokenizer.state_dict().items()
    }
    write_state_dict(state, path)
    return path


def config_of(workspace):
    return load_sizes(workspace.root / "generator.yaml").model.vq_model


class Runs:
    """Pretokenization of one data set and tokenizer into `cache`, by `tests.integration.warm`."""

    def __init__(self, workspace, warm, folder):
        self.workspace, self.warm = workspace, warm
        self.tokenizer = image_dependent_tokenizer(workspace, folder / "tokenizer.pth")

    def argv(self, cache, *options, data=None):
        return [
            "pretokenization.py", "--config", self.workspace.root / "generator.yaml",
            "--img_size", 16, "--batch_size", 1, "--data_path", data or self.workspace.root / "train",
            "--cached_path", cache, "--tokenizer_checkpoint", self.tokenizer, "--num_workers", 0,
            *options,
        ]  # fmt: skip

    def ok(self, *args, data=None):
        return self.warm.ok(*self.argv(*args, data=data))

    def refused(self, *args, data=None, largest_file=0):
        return self.warm.refused(*self.argv(*args, data=data), largest_file=largest_file)


@pytest.fixture(scope="module")
def runs(workspace, warm, tmp_path_factory):
    return Runs(workspace, warm, tmp_path_factory.mktemp("runs"))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def manifest(cache):
    return json.loads((cache / "manifest.json").read_text())


def copies(folder, images):
    """An image folder of two classes and so many images, each different."""
    rng = np.random.default_rng(1)
    for i in range(images):
        path = folder / f"c{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 23, 3), dtype=np.uint8)).save(path)
    return folder


# ---------------------------------------------------------------------- views
def encoded(runs, views):
    """Codes of PIL images, by the encoder alone."""
    opened = open_weights(runs.tokenizer, TOKENIZER)
    encoder = load_tokenizer(opened, config_of(runs.workspace), with_decoder=False)
    pixels = to_float(torch.stack([to_uint8(view) for view in views]))
    return encode(encoder, pixels, "fp32").numpy()


def test_default_stores_the_codes_of_the_centre_crop_and_of_its_real_mirror_image(
    workspace, runs, tmp_path
):
    runs.ok(tmp_path / "cache")
    store = TokenStore(tmp_path / "cache")
    path = (tmp_path / "cache/paths.txt").read_text().splitlines()[3]
    image = load_image(workspace.root / "train" / path)
    view = center_crop(image, 16)
    expected = encoded(runs, [view, ImageOps.mirror(view)])
    assert (np.stack([store.codes(3, v) for v in (0, 1)]) == expected).all()
    assert (expected[0] != expected[1]).any()


def test_flip_flag_asks_for_what_all_but_five_crop_store_anyway(runs, tmp_path):
    for name, options in {
        "center": [], "center_flag": ["--flip_flag"], "ten": ["--ten_crop"],
        "ten_flag": ["--ten_crop", "--flip_flag"], "five_flag": ["--five_crop", "--flip_flag"],
    }.items():  # fmt: skip
        runs.ok(tmp_path / name, *options)
    assert files(tmp_path / "center") == files(tmp_path / "center_flag")
    assert files(tmp_path / "ten") == files(tmp_path / "ten_flag") == files(tmp_path / "five_flag")
    assert manifest(tmp_path / "ten")["views"] == 10


# ---------------------------------------------------------------------- splits
def test_split_takes_the_folder_below(workspace, runs, tmp_path):
    runs.ok(tmp_path / "val", "--split", "val", data=workspace.root)
    assert manifest(tmp_path / "val")["images"] == 5
    runs.ok(tmp_path / "train", "--split", "train", data=workspace.root)
    runs.ok(tmp_path / "direct", data=workspace.root / "train")
    assert files(tmp_path / "train") == files(tmp_path / "direct")


def test_root_without_a_split_means_its_train_folder_and_the_first_line_says_so(
    workspace, runs, tmp_path
):
    output = runs.ok(tmp_path / "root", data=workspace.root).splitlines()
    said = f"--data_path {workspace.root} holds train/ and --split is not set: reading "
    classes = "14 images, 3 classes (class0, class1, class2)"
    assert f"{said}{workspace.root}/train: {classes}" == output[0]
    runs.ok(tmp_path / "direct", data=workspace.root / "train")
    assert files(tmp_path / "root") == files(tmp_path / "direct")


@pytest.mark.parametrize("layout", ["packed", "npz"])
def test_images_in_no_folders_make_the_cache_of_one_folder(runs, tmp_path, layout):
    copies(tmp_path / "two", 5)
    for target in ("flat", "one/images"):
        (tmp_path / target).mkdir(parents=True)
        for image in (tmp_path / "two").rglob("*.png"):
            shutil.copy2(image, tmp_path / target)
    for name in ("flat", "one"):
        said = runs.ok(tmp_path / f"{name}_c", "--format", layout, data=tmp_path / name)
        assert ("5 images, no class folders: one class (images)" in said) == (name == "flat")
    assert files(tmp_path / "flat_c") == files(tmp_path / "one_c")
    assert open_tokens(tmp_path / "flat_c").classes == ["images"]


def test_root_without_a_train_folder_is_no_folder_of_classes(workspace, runs, tmp_path):
    for split in ("training", "validation"):
        shutil.copytree(workspace.root / "val", tmp_path / "root" / split)
    line = runs.refused(tmp_path / "cache", data=tmp_path / "root")
    assert f"{tmp_path}/root is not a folder of classes: training, validation hold" in line
    assert f"the folder above those, such as {tmp_path}/root/training" in line
    assert not (tmp_path / "cache").exists() and not (tmp_path / "cache.partial").exists()


def test_empty_train_folder_is_refused(runs, tmp_path):
    (tmp_path / "root/train").mkdir(parents=True)
    line = runs.refused(tmp_path / "cache", data=tmp_path / "root")
    assert f"{tmp_path}/root/train holds no images" in line


def test_published_flags_without_effect_are_named_once(runs, tmp_path):
    published = ["--seed", 3, "--no_pin_mem", "--world_size", 1, "--dist_url", "env://"]
    output = runs.ok(tmp_path / "flags", *published)
    said = "without effect here: --seed, --no_pin_mem, --world_size, --dist_url"
    assert output.count(said) == 1
    runs.ok(tmp_path / "plain")
    assert files(tmp_path / "flags") == files(tmp_path / "plain")


@pytest.mark.parametrize("option", ["--num_workers=-1", "--batch_size=1e3", "--cached_path="])
def test_value_without_sense_is_one_line(runs, tmp_path, option):
    assert option.split("=")[0] in runs.refused(tmp_path / "cache", option)
    assert not list(tmp_path.iterdir())


def test_split_that_is_not_there_is_named(workspace, runs, tmp_path):
    line = runs.refused(tmp_path / "c", "--split", "val", data=workspace.root / "train")
    assert f"{workspace.root}/train/val" in line


# ---------------------------------------------------------------------- sizes that no shape shows
def test_manifest_records_the_heads_and_other_heads_are_refused(workspace, runs, tmp_path):
    other = tmp_path / "heads.yaml"
    text = (workspace.root / "generator.yaml").read_text()
    other.write_text(text.replace("encoder_heads: 2", "encoder_heads: 4"))
    runs.ok(tmp_path / "cache")
    assert manifest(tmp_path / "cache")["encoder_heads"] == 2
    line = runs.refused(tmp_path / "cache", "--config", other)  # the weights do not say so
    assert "encoder_heads (2 there, 4 now)" in line
    stating, about = tmp_path / "stating.pth", about_model(TOKENIZER, config_of(workspace))
    write_state_dict(read_state_dict(runs.tokenizer), stating, about)
    line = runs.refused(tmp_path / "other", "--config", other, "--tokenizer_checkpoint", stating)
    assert f"encoder_heads=4 ({other}, line" in line and "weights have encoder_heads=2" in line


# ---------------------------------------------------------------------- precision
def test_bf16_prints_its_agreement_and_is_recorded(runs, tmp_path):
    output = runs.ok(tmp_path / "cache", "--dtype", "bf16", "--batch_size", "4")
    agreement = output.split("bf16 agrees with fp32 on ")[1].split("%")[0]
    assert 50 < float(agreement) <= 100 and "of the 336 codes" in output
    assert manifest(tmp_path / "cache")["dtype"] == "bf16"


def test_fp32_has_nothing_to_compare(runs, tmp_path):
    assert "agrees" not in runs.ok(tmp_path / "cache")


def test_tf32_is_refused_on_a_cpu(runs, tmp_path):
    assert "CUDA" in runs.refused(tmp_path / "cache", "--dtype", "tf32")
    assert not list(tmp_path.iterdir())


def test_precision_of_an_earlier_run_is_kept_to(runs, tmp_path):
    runs.ok(tmp_path / "cache")
    line = runs.refused(tmp_path / "cache", "--dtype", "bf16")
    assert "dtype (fp32 there, bf16 now)" in line


def test_size_of_the_images_and_weights_of_a_run_are_found_where_they_are(
    workspace, warm, tmp_path
):
    options = ["--config", workspace.root / "generator.yaml", "--num_workers", 0,
               "--batch_size", 3, "--data_path", workspace.root / "train", "--ten_crop"]  # fmt: skip
    run = workspace.tokenizer.parent
    warm.ok(
        "pretokenization.py", *options, "--cached_path", tmp_path / "c",
        "--tokenizer_checkpoint", run,
    )  # fmt: skip
    assert files(tmp_path / "c") == files(workspace.cache)


@pytest.mark.parametrize("option", ["--batch_size=0", "--skip_unreadable=-1", "--img_size=0"])
def test_number_out_of_range_is_refused(runs, tmp_path, option):
    assert option.split("=")[0] in runs.refused(tmp_path / "cache", option)


# ---------------------------------------------------------------------- the published layout
def test_npz_layout_is_the_published_one_with_the_same_codes(workspace, runs, tmp_path):
    runs.ok(tmp_path / "npz", "--format", "npz")
    runs.ok(tmp_path / "packed")
    store, paths = TokenStore(tmp_path / "packed"), (tmp_path / "packed/paths.txt").read_text()
    for image, path in enumerate(paths.splitlines()):
        with np.load(tmp_path / f"npz/{path}.npz") as arrays:
            assert arrays.files == ["codes"]
            assert arrays["codes"].dtype == np.int64 and arrays["codes"].shape == (2, 21)
            assert (arrays["codes"] == [store.codes(image, v) for v in (0, 1)]).all()
    names = {f"{path}.npz" for path in paths.splitlines()} | {"manifest.json"}
    assert {str(path) for path in files(tmp_path / "npz")} == names


def test_an_exported_cache_is_that_of_the_published_layout_byte_for_byte(runs, warm, tmp_path):
    runs.ok(tmp_path / "packed")
    runs.ok(tmp_path / "npz", "--format", "npz")
    warm.ok("data.tokens", "export", tmp_path / "packed", "--output", tmp_path / "exported")
    assert files(tmp_path / "exported") == files(tmp_path / "npz")
    assert not (tmp_path / "exported.partial").exists()
    again = ["export", tmp_path / "packed", "--output", tmp_path / "exported"]
    assert "exported exists: choose another --output" in warm.refused("data.tokens", *again)


def test_npz_work_whose_files_were_removed_starts_anew(runs, tmp_path):
    data = copies(tmp_path / "data", 20)
    bad = data / "c1/019.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    runs.refused(tmp_path / "npz", "--format", "npz", data=data)
    assert len(list((tmp_path / "npz.partial/parts").iterdir())) == 1
    shutil.rmtree(tmp_path / "npz.partial/store")
    bad.write_bytes(whole)
    runs.ok(tmp_path / "npz", "--format", "npz", data=data)
    assert NpzStore(tmp_path / "npz").images == 20


@pytest.mark.slow
def test_generator_trains_the_same_on_either_layout(workspace, runs, tmp_path):
    from tests.integration.test_pipeline import losses

    options = ["--ten_crop", "--batch_size", 3, "--tokenizer_checkpoint", workspace.tokenizer]
    runs.ok(tmp_path / "npz", "--format", "npz", *options)
    workspace.train_ar(tmp_path / "run", f"dataset.params.pretokenization={tmp_path}/npz")
    assert losses(tmp_path / "run") == losses(workspace.generator.parent)


# ---------------------------------------------------------------------- unreadable images
@pytest.fixture
def damaged(tmp_path):
    """36 images in three parts; images 3, 20 and 21 by order are unreadable."""
    data = copies(tmp_path / "data", 36)
    paths = sorted(data.rglob("*.png"))
    for i in (3, 20, 21):
        paths[i].write_bytes(paths[i].read_bytes()[:60])
    return data


BAD = ["c0/006.png", "c1/005.png", "c1/007.png"]


def test_skipped_images_are_left_out_and_listed(damaged, runs, tmp_path):
    output = runs.ok(tmp_path / "some", "--skip_unreadable", 3, data=damaged)
    assert f"skipped 3 unreadable images: {', '.join(BAD)}" in output
    assert manifest(tmp_path / "some")["skipped"] == BAD
    for name in BAD:
        (damaged / name).unlink()
    runs.ok(tmp_path / "rest", data=damaged)
    assert TokenStore(tmp_path / "some").images == 33
    for name in ("codes-00000.bin", "labels.bin", "paths.txt"):
        assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "rest" / name).read_bytes()


def test_more_unreadable_images_than_allowed_stop_it_and_it_goes_on_with_more(
    damaged, runs, tmp_path
):
    line = runs.refused(tmp_path / "cache", "--skip_unreadable", 2, data=damaged)
    assert "more than --skip_unreadable 2: 3 unreadable images" in line and BAD[0] in line
    assert not (tmp_path / "cache").exists()
    runs.ok(tmp_path / "cache", "--skip_unreadable", 3, data=damaged)
    runs.ok(tmp_path / "once", "--skip_unreadable", 3, data=damaged)
    assert files(tmp_path / "cache") == files(tmp_path / "once")
    assert "is complete" in runs.ok(tmp_path / "cache", data=damaged)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "npz"])
def test_skipping_is_the_same_on_two_ranks(damaged, workspace, runs, tmp_path, layout):
    options = ["--format", layout, "--skip_unreadable", 3, "--data_path", damaged]
    options += ["--batch_size", 1, "--tokenizer_checkpoint", runs.tokenizer]
    runs.ok(tmp_path / "one", *options, "--ten_crop")
    workspace.pretokenize(tmp_path / "two", *options, ranks=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


# ---------------------------------------------------------------------- interruptions
def test_full_disk_is_one_line_and_what_is_finished_stays(runs, tmp_path):
    data = copies(tmp_path / "data", 36)
    runs.ok(tmp_path / "whole", data=data)
    parts = tmp_path / "cache.partial/parts"
    # A part of 16 images holds 1,344 bytes of codes, the one shard 3,024.
    line = runs.refused(tmp_path / "cache", data=data, largest_file=2500)
    assert "cannot write" in line and "finished work is kept" in line
    assert len(list(parts.iterdir())) == 3 and not (tmp_path / "cache").exists()
    written = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    line = runs.refused(tmp_path / "cache", data=data, largest_file=2500)
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == written
    runs.ok(tmp_path / "cache", data=data)
    assert files(tmp_path / "cache") == files(tmp_path / "whole")


def test_damaged_part_of_a_stopped_run_is_named(runs, tmp_path):
    data = copies(tmp_path / "data", 36)
    runs.refused(tmp_path / "cache", data=data, largest_file=2500)
    part = tmp_path / "cache.partial/parts/000001.npz"
    part.write_bytes(part.read_bytes()[:100])
    assert str(part) in runs.refused(tmp_path / "cache", data=data)
    part.unlink()
    runs.ok(tmp_path / "cache", data=data)


KILLS = 12


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "npz"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(runs, tmp_path, layout):
    data, cache = copies(tmp_path / "data", 150), tmp_path / "cache"
    work = tmp_path / "cache.partial"
    runs.ok(tmp_path / "whole", "--format", layout, data=data)
    expected, moments, rng = files(tmp_path / "whole"), [], random.Random(0)

    def parts():
        return len(list(work.glob("parts/*.npz")))

    while len(moments) < KILLS:
        run, further = runs.warm.start(*runs.argv(cache, "--format", layout, data=data)), parts()
        further += rng.randint(0, 3)  # of ten
        while run.alive() and parts() < further:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        if run.kill():
            moments.append(parts())
            continue
        assert run.end() == 0, run.output()[-2000:]
        assert files(cache) == expected  # it was faster: begin again
        shutil.rmtree(cache)
    runs.ok(cache, "--format", layout, data=data)
    assert files(cache) == expected and not work.exists()
    assert len(set(moments)) > 1  # parts finished at a kill: the moments were spread
