import os

import pytest

from runtime import files
from runtime.files import lock_folder, whole_file, write_torch, write_whole, writing
from tests.refusals import refusal


def fail(*_, **__):
    raise OSError("disk full")


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "Path.write_bytes"])
def test_a_file_that_cannot_be_written_keeps_its_content(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_whole(path, b"old")
    module, name = call.split(".")
    monkeypatch.setattr(getattr(files, module), name, fail)
    refusal(lambda: write_whole(path, b"new"), path, "disk full")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_folders_are_made(tmp_path):
    write_whole(tmp_path / "a/b/file", b"x")
    assert (tmp_path / "a/b/file").read_bytes() == b"x"


def test_a_file_is_synced_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: calls.append("fsync") or sync(fd))
    monkeypatch.setattr(files.os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    write_whole(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace"]


def test_a_mistake_of_the_program_is_no_trouble_with_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as partial:
        partial.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_the_place_is_named_that_the_system_names(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    def below():
        with writing(tmp_path):
            (tmp_path / "file" / "below").mkdir()

    refusal(below, tmp_path / "file/below", "Not a directory")


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_a_file_in_the_place_of_a_folder_is_not_called_a_lack_of_space(tmp_path, output):
    (tmp_path / "file").touch()
    refusal(lambda: lock_folder(tmp_path / output), tmp_path / "file", "it is a file")


def test_what_torch_says_of_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nC++")

    monkeypatch.setattr("torch.save", fail)
    refusal(lambda: write_torch({}, tmp_path / "x.pth"), tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_not_the_disks_keeps_its_name(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), writing(tmp_path):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"), whole_file(tmp_path / "file"):
        raise RuntimeError("a bug")
