import json

import pytest

from evaluation import report
from tests.refusals import refusal


def result(**changed):
    protocol = {"network": "tiny", "images": 20, "reference": "abc", "distances": "float64"}
    return {
        "metrics": {"gFID": 1.5, "sFID": None, "IS": 300.25},
        "samples": {"path": "x.npz"},
        "protocol": {**protocol, **changed},
    }


@pytest.fixture
def write(tmp_path):
    def save(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return save


def test_results_of_one_protocol_make_a_table(write, capsys):
    other = result()
    other["metrics"] = {"gFID": 2.0, "IS": 200.0, "precision": 0.5}
    printed = f"samples  x.npz: 20 images\n{json.dumps(other)}\n"  # all that evaluate.py prints
    files = [write("a.json", json.dumps(result(), indent=1)), write("b.txt", printed)]
    report.main(files)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("protocol: network tiny, images 20")
    rows = [line.split() for line in said[1:]]
    assert rows[0] == ["gFID", "sFID", "IS", "precision"]
    assert rows[1] == [files[0], "1.5000", "-", "300.2500", "-"]
    assert rows[2] == [files[1], "2.0000", "-", "200.0000", "0.5000"]


@pytest.mark.parametrize(
    "key, value", [("images", 10), ("reference", "def"), ("distances", "float16"), ("new", 1)]
)
def test_results_of_other_protocols_are_refused(write, key, value, capsys):
    files = [write("a.json", result()), write("b.json", result(**{key: value}))]
    refusal(lambda: report.main(files), *files, key, value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[1]", "no json", '{"metrics": 1}'),
        result() | {"metrics": {"gFID": "1.5"}},
        result() | {"metrics": [1]},
        result() | {"protocol": None},
        result() | {"other_features": [{}]},
        result() | {"other_features": 3},
        {"generator": {"path": "x"}, "metrics": {"nats_per_code": 1.0}},
    ],
)
def test_other_files_are_named(write, content):
    path = write("a.json", content)
    refusal(lambda: report.main([path]), path, "scores of images", "evaluate.py")


def test_a_missing_file_is_named():
    refusal(lambda: report.main(["none.json"]), "none.json")


def with_dinov2(distance=200.0, **changed):
    other = {"metrics": {"FD_DINOv2": distance}, "samples": {"path": "x.npz"}}
    protocol = {"network": "dinov2-vitl14 1", "images": 20, "reference": "abc", **changed}
    return {**result(), "other_features": [{**other, "protocol": protocol}]}


def test_feature_spaces_have_columns_and_protocols_of_their_own(write, capsys):
    files = [write("a.json", result()), write("b.json", with_dinov2())]
    report.main(files)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("protocol: network tiny") and "dinov2-vitl14 1" in said[1]
    rows = [line.split() for line in said[2:]]
    assert rows[0] == ["gFID", "sFID", "IS", "FD_DINOv2"]
    assert rows[1][-1] == "-" and rows[2][-1] == "200.0000"


def test_other_protocols_of_the_second_space_are_refused_too(write):
    files = [write("a.json", with_dinov2()), write("b.json", with_dinov2(reference="def"))]
    refusal(lambda: report.main(files), *files, "reference", "abc", "def")
