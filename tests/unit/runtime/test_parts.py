import json
import zipfile

import numpy as np
import pytest

from runtime import files
from runtime import parts as module
from runtime.parts import Parts, check_settings
from tests.refusals import refusal

SETTINGS = {"tokenizer": "abc", "images": 10, "crops": "ten_crop"}


def fail(*_, **__):
    raise OSError("disk full")


def test_part_reads_back_as_written(tmp_path):
    parts = Parts(tmp_path, 3)
    parts.write(1, codes=np.arange(6), labels=np.ones(2))
    assert (parts.read(1, "codes") == np.arange(6)).all()
    assert (parts.read(1, "labels") == 1).all()


def test_part_whose_writing_failed_is_absent(tmp_path, monkeypatch):
    parts = Parts(tmp_path, 2)

    def half(file, **_):
        file.write(b"half")
        fail()

    monkeypatch.setattr(module.np, "savez", half)
    refusal(lambda: parts.write(0, codes=np.arange(6)), parts.path(0), "disk full")
    assert not parts.path(0).exists() and parts.missing() == [0, 1]


def test_part_not_yet_renamed_is_absent_and_can_be_written_again(tmp_path, monkeypatch):
    parts = Parts(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        refusal(lambda: parts.write(0, codes=np.zeros(6)), parts.path(0))
    assert parts.missing() == [0]
    parts.write(0, codes=np.arange(6))
    assert (parts.read(0, "codes") == np.arange(6)).all() and parts.missing() == []


def test_parts_hold_no_pickled_objects(tmp_path):
    parts = Parts(tmp_path, 1)
    parts.write(0, codes=np.array([{}], dtype=object))
    refusal(lambda: parts.read(0, "codes"), parts.path(0))


def test_a_part_that_claims_more_values_than_memory_holds_is_refused(tmp_path):
    parts = Parts(tmp_path, 1)
    with zipfile.ZipFile(parts.path(0), "w") as archive, archive.open("codes.npy", "w") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(file, header)
    refusal(lambda: parts.read(0, "codes"), parts.path(0))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_missing_parts_are_split_over_ranks_without_overlap(tmp_path, world):
    parts = Parts(tmp_path, 7)
    shares = [parts.missing()[rank::world] for rank in range(world)]
    assert sorted(number for share in shares for number in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_finished_parts_are_skipped_and_the_rest_split_anew(tmp_path):
    parts = Parts(tmp_path, 6)
    for number in (0, 2, 4):  # all that the first of two ranks had
        parts.write(number, codes=np.zeros(1))
    shares = [parts.missing()[rank::2] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == [1, 3, 5] and all(shares)


def test_settings_are_written_where_there_are_none(tmp_path):
    path = tmp_path / "work" / "settings.json"
    check_settings(path, SETTINGS, "remove it")
    assert json.loads(path.read_text()) == SETTINGS


def test_equal_settings_are_accepted_and_left_alone(tmp_path):
    path = tmp_path / "settings.json"
    check_settings(path, SETTINGS, "remove it")
    before = path.stat().st_mtime_ns
    check_settings(path, dict(reversed(SETTINGS.items())), "remove it")
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"images": 11}, ("images (10 there, 11 now)",)),
        ({"dtype": "bf16"}, ("dtype (None there, bf16 now)",)),
        ({"crops": None}, ("crops (ten_crop there, None now)",)),
    ],
)
def test_differing_settings_are_refused(tmp_path, changed, named):
    path = tmp_path / "settings.json"
    check_settings(path, SETTINGS, "remove it")
    now = {name: value for name, value in {**SETTINGS, **changed}.items() if value is not None}
    said = refusal(lambda: check_settings(path, now, "remove it"), tmp_path, "remove it", *named)
    assert "tokenizer" not in said and json.loads(path.read_text()) == SETTINGS


@pytest.mark.parametrize("content", [b"", b'{"tokenizer": "ab', b"\xff\xff"])
def test_damaged_settings_are_refused(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    refusal(lambda: check_settings(path, SETTINGS, "remove it"), path, "remove it")
