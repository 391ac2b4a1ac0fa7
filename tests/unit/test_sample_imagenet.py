import pytest

import generation.job
import sample_imagenet
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.tensors import write_state_dict
from tests.tiny import tiny_generator, tiny_tokenizer


class Reached(Exception):
    """The models would be loaded now."""


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What is printed before the models are loaded, for a run with these {label: class}."""

    def load_models(*args):
        raise Reached

    monkeypatch.setattr(generation.job, "load_models", load_models)

    about = about_model(TOKENIZER, tiny_tokenizer())
    write_state_dict(Tokenizer(tiny_tokenizer()).state_dict(), tmp_path / "t.pth", about)
    (tmp_path / "bare.yaml").write_text("model: {generator: {guidance_scale: 2.0}}")

    def start(names, untrained, classes):
        config = tiny_generator(condition_num_classes=4)
        about = about_model(GENERATOR, config, classes=names, untrained=untrained)
        write_state_dict(Generator(config).state_dict(), tmp_path / "g.bin", about)
        with pytest.raises(Reached):
            sample_imagenet.main([
                f"config={tmp_path}/bare.yaml", f"experiment.output_dir={tmp_path}/samples",
                f"experiment.generator_checkpoint={tmp_path}/g.bin",
                f"experiment.tokenizer_checkpoint={tmp_path}/t.pth",
                f"experiment.classes={classes}",
            ])  # fmt: skip
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("classes, warned", [("[0,1,2]", True), ("[1]", False)])
def test_classes_never_trained_are_warned_of(said, classes, warned):
    text = said(["a", "b"], [0], classes)
    assert ("was not trained on 2 of 3 classes (0, 2)" in text) is warned


@pytest.mark.parametrize("classes, warned", [("[2]", True), ("['10']", False), ("null", False)])
def test_a_number_of_a_class_that_is_called_by_another_is_warned_of(said, classes, warned):
    text = said(["0", "1", "10", "2"], [], classes)
    assert ("warning: the class names are not labels" in text) is warned
