import json

import pytest

import sample_imagenet


class Reached(Exception):
    """The models would be loaded now."""


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What is printed before the models are loaded, for a run with these {label: class}."""

    def load_models(*args):
        raise Reached

    monkeypatch.setattr(sample_imagenet, "read_weights", lambda *args: {})
    monkeypatch.setattr(sample_imagenet, "load_models", load_models)

    def start(trained, classes):
        (tmp_path / "classes.json").write_text(json.dumps(trained))
        with pytest.raises(Reached):
            sample_imagenet.main([
                "config=configs/alitok_b.yaml", f"experiment.output_dir={tmp_path}/samples",
                f"experiment.generator_checkpoint={tmp_path}/generator.bin",
                f"experiment.classes={classes}",
            ])  # fmt: skip
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("classes, warned", [("[0,1,2]", True), ("[1]", False)])
def test_classes_never_trained_are_warned_of(said, classes, warned):
    text = said({1: "b"}, classes)
    assert ("warning: 2 of 3 classes (0, 2) were never trained in" in text) is warned


@pytest.mark.parametrize("classes, warned", [("[2]", True), ("['10']", False), ("null", False)])
def test_a_number_of_a_class_that_is_called_by_another_is_warned_of(said, classes, warned):
    text = said({0: "0", 1: "1", 2: "10", 3: "2"}, classes)
    assert ("warning: the classes' names are numbers" in text) is warned
