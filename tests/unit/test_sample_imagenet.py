import pytest

import sample_imagenet
from data.classes import write_trained


class Reached(Exception):
    """The models would be loaded now."""


@pytest.mark.parametrize("classes, warned", [("[0,1,2]", True), ("[1]", False)])
def test_classes_never_trained_are_warned_of(tmp_path, monkeypatch, capsys, classes, warned):
    def load_models(*args):
        raise Reached

    monkeypatch.setattr(sample_imagenet, "read_weights", lambda *args: {})
    monkeypatch.setattr(sample_imagenet, "load_models", load_models)
    write_trained(tmp_path, ["a", "b"], [1])
    with pytest.raises(Reached):
        sample_imagenet.main([
            "config=configs/alitok_b.yaml", f"experiment.output_dir={tmp_path}/samples",
            f"experiment.generator_checkpoint={tmp_path}/generator.bin",
            f"experiment.classes={classes}",
        ])  # fmt: skip
    said = capsys.readouterr().out
    assert ("warning: 2 of 3 classes (0, 2) were never trained in" in said) is warned
