"""sample_imagenet.py in miniature: its knobs, its interruptions and what it refuses."""

import fcntl
import json
import random
import shutil
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from generation.folder import concatenate_parts
from runtime.parts import Parts
from tests.integration.conftest import execute
from tests.integration.test_bad_input import refused


def array(path):
    return np.load(path)["arr_0"]


@pytest.mark.slow
def test_classes_codes_and_grid(workspace, tmp_path):
    options = ["experiment.classes=[2,0]", "experiment.num_fid_samples=7", "experiment.grid=2"]
    knobs = ["model.generator.top_k=5", "model.generator.guidance_schedule=linear"]
    workspace.sample(tmp_path / "a", *options, *knobs)
    images, codes = array(tmp_path / "a.npz"), array(tmp_path / "a_codes.npz")
    assert codes.shape == (7, 21) and codes.dtype == np.uint16
    settings = json.loads((tmp_path / "a/sampling.json").read_text())
    assert settings["classes"] == [2, 0] and settings["top_k"] == 5 and settings["chunk"] == 3
    assert settings["precision"] == "fp32" and settings["compile"] is False
    grid = np.asarray(Image.open(tmp_path / "a_grid.png"))
    assert grid.shape == (32, 32, 3) and (grid[16:, :16] == images[2]).all()

    # The codes decoded again, without a generator, are the same images.
    workspace.sample(
        tmp_path / "b", f"experiment.codes={tmp_path}/a_codes.npz", "experiment.save_png=False"
    )
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()
    assert (tmp_path / "b_codes.npz").read_bytes() == (tmp_path / "a_codes.npz").read_bytes()

    other = tmp_path / "other.npz"
    np.savez(other, codes[:, :20])
    done = workspace.sample(tmp_path / "c", f"experiment.codes={other}", check=False)
    refused(done, other, "20 codes per image, not 21")
    np.savez(other, codes + 32)
    done = workspace.sample(tmp_path / "c", f"experiment.codes={other}", check=False)
    refused(done, other, "this tokenizer has 0…31")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_images_are_completed_from_a_photo_and_from_codes(workspace, tmp_path):
    options = ["experiment.num_fid_samples=5", "experiment.save_png=False"]
    photo = f"experiment.prefix={workspace.root}/val/class0/00.png"
    rows = "experiment.prefix_rows=1"  # after 5 prefix tokens, so 9 codes
    workspace.sample(tmp_path / "a", *options, photo, rows, ranks=2)
    codes = array(tmp_path / "a_codes.npz")
    assert (codes[:, :9] == codes[0, :9]).all() and len(np.unique(codes[:, 9:], axis=0)) > 1
    assert "prefix" in json.loads((tmp_path / "a/sampling.json").read_text())

    np.save(tmp_path / "codes.npy", codes[:1])
    workspace.sample(tmp_path / "b", *options, f"experiment.prefix={tmp_path}/codes.npy", rows)
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()

    edit = photo.replace("prefix", "edit")
    workspace.sample(tmp_path / "e", *options, edit, "experiment.mask=0,16,4,20")
    edited = array(tmp_path / "e_codes.npz")
    kept = (edited == edited[0]).all(0)
    assert kept[:9].all() and not kept.all()  # all but the patch, which is drawn for each image

    more = ["experiment.prefix_rows=2", "experiment.prefix_mask=True"]
    done = workspace.sample(tmp_path / "a", *options, photo, *more, check=False)
    refused(done, "holds work with other settings: prefix (")


@pytest.mark.slow
def test_chunk_is_chosen_from_memory_once_and_kept(workspace, tmp_path):
    config = tmp_path / "generator.yaml"
    text = (workspace.root / "generator.yaml").read_text()
    config.write_text(text.replace(", per_proc_batch_size: 3", ""))
    options = [f"config={config}", "experiment.num_fid_samples=5", "experiment.save_png=False"]
    weights = [
        f"experiment.generator_checkpoint={workspace.generator}",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
    ]
    run = ["sample_imagenet.py", *options, *weights, f"experiment.output_dir={tmp_path}/a"]
    execute(*run)
    settings = tmp_path / "a/sampling.json"
    assert json.loads(settings.read_text())["chunk"] == 5  # all of them
    # Another chunk there, as if chosen on a smaller machine: the run goes on with it.
    settings.write_text(settings.read_text().replace('"chunk": 5', '"chunk": 2'))
    (tmp_path / "a.npz").unlink()
    execute(*run, ranks=2)
    assert json.loads(settings.read_text())["chunk"] == 2
    assert array(tmp_path / "a.npz").shape == (5, 16, 16, 3)


# ---------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    "option, words",
    [
        ("experiment.classes=[0,3]", ["class 3 is unknown", "0…2"]),
        ("experiment.per_proc_batch_size=1000000000", ["images at once", "per_proc_batch_size="]),
        ("experiment.precision=tf32", ["tf32", "choose fp32 or bf16"]),
        ("experiment.prefix=none.npy", ["experiment.prefix=none.npy is not a file of codes"]),
        ("experiment.prefix=none.png", ["unreadable image none.png"]),
        ("experiment.mask=1,1,2,2", ["mask=1,1,2,2: it needs experiment.edit"]),
        ("model.generator.top_p=0", ["top_p"]),
        ("model.generator.hidden_size=64", ["hidden_size=64", "weights have hidden_size=32"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(workspace, tmp_path, option, words):
    done = workspace.sample(tmp_path / "a", option, check=False)
    refused(done, *words)
    assert not list(tmp_path.iterdir())


def test_folder_in_use_is_refused_and_that_of_a_dead_run_is_not(workspace, tmp_path):
    options = ["experiment.num_fid_samples=4", "experiment.save_png=False"]
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a/.lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = workspace.sample(tmp_path / "a", *options, check=False)
        refused(done, f"{tmp_path}/a is in use by another run", "use another folder")
        assert [p.name for p in (tmp_path / "a").iterdir()] == [".lock"]
    # Nobody holds the file any more. Now the disk is full when the second chunk is written.
    chunks = tmp_path / "a/chunks"
    chunks.mkdir()
    (chunks / "000001.npz.partial").symlink_to("/dev/full")
    done = workspace.sample(tmp_path / "a", *options, check=False)
    refused(done, f"{chunks}/000001.npz (No space left on device)", "finished work is kept")
    assert (chunks / "000000.npz").exists() and not (tmp_path / "a.npz").exists()
    before = (chunks / "000000.npz").stat().st_mtime_ns
    done = workspace.sample(tmp_path / "a", *options, "experiment.num_fid_samples=5", check=False)
    refused(done, "images (4 there, 5 now)")
    assert (chunks / "000000.npz").stat().st_mtime_ns == before
    workspace.sample(tmp_path / "a", *options)
    assert len(array(tmp_path / "a.npz")) == 4


# ---------------------------------------------------------------------- interruptions
@pytest.mark.slow
def test_killed_at_random_moments_the_bytes_are_the_same(workspace, warm, tmp_path):
    arguments = [
        f"config={workspace.root}/generator.yaml",
        f"experiment.generator_checkpoint={workspace.generator}",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
        "experiment.num_fid_samples=240",
    ]

    def start(name):
        run = f"experiment.output_dir={tmp_path}/{name}"
        return warm.start("sample_imagenet.py", *arguments, run)

    def done():
        return len(list((tmp_path / "killed/chunks").glob("*.npz")))

    assert start("whole").end() == 0
    moments, kills, chunks = random.Random(1), 0, set()
    while kills < 12:
        further = done() + moments.randint(0, 9)  # of 80
        run = start("killed")
        while run.alive() and done() < further:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        if not run.kill():  # it was faster: begin again
            assert run.end() == 0
            shutil.rmtree(tmp_path / "killed")
            for name in (".npz", "_codes.npz"):
                (tmp_path / f"killed{name}").unlink()
            continue
        kills += 1
        chunks.add(done())
    assert len(chunks) > 3  # the kills came within the work
    assert start("killed").end() == 0
    for end in (".npz", "_codes.npz"):
        assert (tmp_path / f"killed{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    pictures = [
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.png")}
        for name in ("killed", "whole")
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 240


def test_joining_holds_one_part_at_a_time(tmp_path):
    parts = Parts(tmp_path / "parts", 24)
    images = np.zeros((16, 128, 128, 3), np.uint8)  # 0.8 MB
    for number in range(parts.count):
        parts.write(number, images=images + number)
    shape = (16 * parts.count, 128, 128, 3)
    tracemalloc.start()
    try:
        concatenate_parts(parts, tmp_path / "all.npz", "images", shape[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * images.nbytes  # of 24
    joined = array(tmp_path / "all.npz")
    assert joined.shape == shape and (joined[::16, 0, 0, 0] == range(24)).all()
