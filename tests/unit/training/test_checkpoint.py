import hashlib
import json
import os
import pickle
import shutil
import stat
from functools import partial
from pathlib import Path

import pytest
import torch

from modeling.weights import runs
from modeling.weights.metadata import DISCRIMINATOR, about_model, parse
from modeling.weights.tensors import read_file, read_state_dict
from tests.payload import Payload, forge
from tests.refusals import refusal
from training import checkpoint


def save(run_dir, step, keep=10):
    """A checkpoint whose every tensor tells its step."""
    weights = {
        name: ({"w": torch.full((2, 3), float(step))}, None)
        for name in ("generator", "generator_raw")
    }
    state = {"step": step, "best": 0.5, "optimizer": {"state": {0: {"m": torch.arange(3) * step}}}}
    return checkpoint.save(run_dir, step, weights, state, keep)


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def folder(run_dir, step):
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.all_checkpoints(run_dir)]


def altered(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def missing(path):
    path.unlink()


# ---------------------------------------------------------------------- saving
def test_weights_and_state_read_back_as_saved(tmp_path):
    path = save(tmp_path, 7)
    for name in ("generator", "generator_raw"):
        weights = read_state_dict(path / f"{name}.safetensors")
        assert list(weights) == ["w"] and torch.equal(weights["w"], torch.full((2, 3), 7.0))
    state = checkpoint.load_state(path)
    moments = state["optimizer"]["state"][0].pop("m")
    assert torch.equal(moments, torch.tensor([0, 7, 14]))
    assert state == {"step": 7, "best": 0.5, "optimizer": {"state": {0: {}}}}


def test_manifest_names_every_other_file_with_size_and_sha256(tmp_path):
    path = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    expected = [
        {"name": n, "bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()}
        for n, c in ((f.name, f.read_bytes()) for f in sorted(path.iterdir()))
        if n != "manifest.json"
    ]
    names = [entry["name"] for entry in manifest["files"]]
    assert names == ["generator.safetensors", "generator_raw.safetensors", "state.pt"]
    assert manifest["files"] == expected


def test_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [4, 5]


def test_going_on_from_an_earlier_step_drops_the_later_ones(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert save(tmp_path, 15, keep=2).is_dir()
    assert steps(tmp_path) == [10, 15]


def test_oldest_is_removed_only_after_the_new_one_is_whole(run_dir, monkeypatch):
    remove, found = checkpoint.shutil.rmtree, {}

    def watch(path, **options):
        found[Path(path).name.partition(".")[0]] = checkpoint.damage(folder(run_dir, 4))
        remove(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watch)
    save(run_dir, 4, keep=2)
    assert found == {"step-00000001": None, "step-00000002": None}
    assert steps(run_dir) == [3, 4]


def test_what_cannot_be_removed_of_an_old_one_is_no_checkpoint(run_dir, monkeypatch):
    def busy(path, **options):
        raise OSError(39, "Directory not empty")  # as NFS says while a reader is there

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        patch.setattr(os, "unlink", busy)
        save(run_dir, 4, keep=2)
        assert steps(run_dir) == [3, 4]
        assert checkpoint.damage(folder(run_dir, 4)) is None
        assert list((run_dir / "checkpoints").glob("step-00000001.*.partial"))
        # The run goes back to step 3, and removes it a second time.
        for step, left in ((3, [3]), (4, [3, 4]), (5, [4, 5])):
            save(run_dir, step, keep=2)
            assert steps(run_dir) == left
    save(run_dir, 6, keep=2)
    assert steps(run_dir) == [5, 6]
    assert not list((run_dir / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.rename"])
def test_failed_save_leaves_the_earlier_checkpoints(run_dir, monkeypatch, broken):
    def fail(*_, **__):
        raise OSError("disk full")

    module, name = broken.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, module), name, fail)
        refusal(lambda: save(run_dir, 4, keep=1), "step-00000004", "disk full")
    assert steps(run_dir) == [1, 2, 3] and not list(run_dir.rglob("*.partial"))
    assert checkpoint.choose(run_dir, True) == (folder(run_dir, 3), [])


def test_save_after_a_failed_one_starts_afresh(run_dir):
    partial = run_dir / "checkpoints" / "step-00000004.partial"
    partial.mkdir()
    (partial / "left.safetensors").write_bytes(b"half")
    path = save(run_dir, 4)
    assert not partial.exists() and not (path / "left.safetensors").exists()
    assert checkpoint.damage(path) is None


def test_what_killed_saves_left_is_removed_whatever_their_step(run_dir):
    left = run_dir / "checkpoints" / "step-00000002.partial"
    left.mkdir()
    save(run_dir, 4)
    assert not left.exists() and steps(run_dir) == [1, 2, 3, 4]


def test_later_steps_are_gone_before_the_new_one_is_there(run_dir, monkeypatch):
    # Else a kill in between would leave the newest to be one of a run that was left.
    rename, found = checkpoint.os.rename, []

    def watch(source, target):
        found.append((Path(target).name, steps(run_dir)))
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", watch)
    checkpoint.shutil.rmtree(folder(run_dir, 2))
    save(run_dir, 2)
    assert found[-1] == ("step-00000002", [1]) and steps(run_dir) == [1, 2]


def test_saving_a_damaged_step_again_makes_it_whole(run_dir):
    truncated(folder(run_dir, 3) / "state.pt")
    save(run_dir, 3)
    assert checkpoint.choose(run_dir, True) == (folder(run_dir, 3), [])


# ---------------------------------------------------------------------- choosing
def test_a_run_without_checkpoints_starts_from_the_beginning(tmp_path):
    assert checkpoint.choose(tmp_path, True) == (None, [])
    assert checkpoint.choose(tmp_path, False) == (None, [])


def test_the_newest_is_chosen(run_dir):
    assert checkpoint.choose(run_dir, True) == (folder(run_dir, 3), [])


@pytest.mark.parametrize("name", ["step-00000009.partial", "step-00000009x", "step-9", "xstep"])
def test_other_names_are_no_checkpoints(run_dir, name):
    os.rename(folder(run_dir, 3), run_dir / "checkpoints" / name)
    assert checkpoint.choose(run_dir, True) == (folder(run_dir, 2), [])


@pytest.mark.parametrize("name", ["generator.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [altered, truncated, missing])
def test_a_damaged_newest_is_named_and_the_one_before_chosen(run_dir, damage, name):
    damage(folder(run_dir, 3) / name)
    chosen, warnings = checkpoint.choose(run_dir, True)
    assert chosen == folder(run_dir, 2)
    assert len(warnings) == 1 and str(folder(run_dir, 3)) in warnings[0]


def test_resume_from_another_run_takes_its_newest_whole_one(run_dir, tmp_path):
    missing(folder(run_dir, 3) / "manifest.json")
    chosen, warnings = checkpoint.choose(tmp_path / "new", str(run_dir))
    assert chosen == folder(run_dir, 2) and len(warnings) == 1


def test_resume_from_a_checkpoint_takes_that_one(run_dir, tmp_path):
    first = str(folder(run_dir, 1))
    assert checkpoint.choose(tmp_path / "new", first) == (folder(run_dir, 1), [])


def test_names_are_durable_before_and_after_the_rename(tmp_path, monkeypatch):
    calls, sync, rename = [], os.fsync, os.rename

    def noted_sync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "rename", lambda a, b: calls.append("rename") or rename(a, b))
    save(tmp_path, 1)
    assert calls[-3:] == ["folder", "rename", "folder"] and calls.count("file") >= 3


def test_going_back_does_not_replace_later_checkpoints(run_dir):
    """The first stop would delete them, `keep_every`'s too."""
    first, second = (str(folder(run_dir, step)) for step in (1, 2))
    refusal(lambda: checkpoint.choose(run_dir, first), first, "step-00000003")
    shutil.rmtree(folder(run_dir, 3))
    assert checkpoint.choose(run_dir, second) == (folder(run_dir, 2), [])


@pytest.mark.parametrize(
    "damaged, resume, named",
    [
        ((), False, "step-00000003"),
        (None, True, "format 1"),  # it is whole: an older checkpoint is not taken instead
        ((), "nowhere", "nowhere"),
        ((), "empty", "empty"),
        ((2,), "run/checkpoints/step-00000002", "step-00000002"),  # takes no other one
        ((1, 2, 3), True, "run"),
        ((), "copied", "keeps its name"),
    ],
)
def test_what_cannot_be_resumed_is_named(run_dir, monkeypatch, damaged, resume, named):
    monkeypatch.chdir(run_dir.parent)
    Path("empty/checkpoints").mkdir(parents=True)
    manifest = folder(run_dir, 3) / "manifest.json"
    if damaged is None:
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    for step in damaged or ():
        altered(folder(run_dir, step) / "state.pt")
    shutil.copytree(folder(run_dir, 2), "copied")
    output = Path("new") if resume == "copied" or "checkpoints" in str(resume) else run_dir
    refusal(lambda: checkpoint.choose(output, resume), named)


def test_the_folder_of_a_runs_checkpoints_stands_for_the_run(run_dir, tmp_path):
    for name in (str(run_dir), str(run_dir / "checkpoints")):
        found, _ = checkpoint.choose(tmp_path / "new", name)
        assert found == folder(run_dir, 3) and checkpoint.named_by(name) == run_dir
    run_dir.rename(tmp_path / "checkpoints")  # a run of that name is a run
    found, _ = checkpoint.choose(tmp_path / "new", str(tmp_path / "checkpoints"))
    assert found == folder(tmp_path / "checkpoints", 3)


def test_a_fork_resumes_though_the_run_it_came_from_is_gone(run_dir, tmp_path):
    fork, named = tmp_path / "fork", str(run_dir)
    weights = {"generator": ({"w": torch.ones(1)}, None)}
    checkpoint.save(fork, 4, weights, {}, 2, origin=str(run_dir.resolve()))
    shutil.rmtree(run_dir)
    assert checkpoint.choose(fork, named)[0] == folder(fork, 4)


def fail_with(error, *_, **__):
    raise error


def test_a_state_that_cannot_be_read_is_not_called_damaged(run_dir, monkeypatch):
    path = folder(run_dir, 3)
    (path / "state.pt").unlink()  # as on a machine that does not see the folder
    said = refusal(lambda: checkpoint.load_state(path), "cannot read", "every machine")
    assert "remove" not in said
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(torch, "load", partial(fail_with, error))
        said = refusal(lambda: checkpoint.load_state(path), "cannot read", "memory")
        assert "remove" not in said and "()" not in said


# ---------------------------------------------------------------------- untrusted files
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_the_state_is_refused_and_not_run(run_dir, tmp_path, zipped):
    marker, path = tmp_path / "marker", folder(run_dir, 3)
    if zipped:
        torch.save({"step": 3, "x": Payload(marker)}, tmp_path / "payload")
        content = (tmp_path / "payload").read_bytes()
    else:
        content = pickle.dumps(Payload(marker), protocol=2)
        pickle.loads(content)  # it would work
        marker.rmdir()
    forge(path, "state.pt", content)
    assert checkpoint.damage(path) is None
    refusal(lambda: checkpoint.load_state(path), path / "state.pt")
    assert not marker.exists()


def test_code_in_the_weights_is_refused_and_not_run(run_dir, tmp_path):
    marker, path = tmp_path / "marker", folder(run_dir, 3)
    forge(path, "generator.safetensors", pickle.dumps(Payload(marker), protocol=2))
    file = path / "generator.safetensors"
    refusal(lambda: read_state_dict(file), file)
    assert not marker.exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_that_names_a_file_outside_does_not_hold(run_dir, absolute):
    path = folder(run_dir, 3)
    outside = path.parent / "outside"
    outside.write_bytes(b"secret")
    name = str(outside) if absolute else "../outside"
    sha = hashlib.sha256(b"secret").hexdigest()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"].append({"name": name, "bytes": 6, "sha256": sha})
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert name in checkpoint.damage(path)
    assert checkpoint.choose(run_dir, True)[0] == folder(run_dir, 2)


def test_weights_say_what_they_are(tmp_path):
    about = about_model(DISCRIMINATOR)
    weights = {name: ({"w": torch.ones(2)}, x) for name, x in (("a", about), ("b", None))}
    path = checkpoint.save(tmp_path, 1, weights, {}, 2)
    (_, said), (_, nothing) = (read_file(path / f"{name}.safetensors") for name in "ab")
    assert parse(said["alitok"], path) == about and "alitok" not in nothing
    assert checkpoint.damage(path) is None


# ---------------------------------------------------------------------- disks
def test_steps_of_keep_every_stay(tmp_path):
    for step in range(1, 8):
        weights = {"generator": ({"w": torch.ones(1)}, None)}
        checkpoint.save(tmp_path, step, weights, {"step": step}, keep=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7]


def test_no_room_is_said_before_anything_is_written(run_dir, monkeypatch):
    usage = checkpoint.shutil.disk_usage(run_dir)._replace(free=50)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint, "write_files", lambda *a: pytest.fail("wrote"))
    refusal(lambda: save(run_dir, 4), "step 4", "0.00 GB")
    assert steps(run_dir) == [1, 2, 3] and not list(run_dir.rglob("*.partial"))


# ---------------------------------------------------------------------- permissions
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_of_all_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = save(tmp_path / "run", 1)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert set(modes.values()) == {mode} and "generator_raw.safetensors" in modes, modes


@pytest.mark.parametrize("name", ["manifest.json", "generator_raw.safetensors"])
def test_checkpoint_that_may_not_be_read_is_not_passed_over_as_damaged(run_dir, monkeypatch, name):
    closed = folder(run_dir, 3) / name

    def guarded(original):
        def read(path, *args, **kwargs):
            if Path(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **kwargs)

        return read

    monkeypatch.setattr(runs, "file_entry", guarded(runs.file_entry))
    monkeypatch.setattr(Path, "read_text", guarded(Path.read_text))
    refusal(lambda: checkpoint.choose(run_dir, True), closed, "permission")
