"""What weights files say of themselves, compared before anything is sampled."""

import pytest

from configs.schema import GeneratorModels, GeneratorOptions
from data.classes import write_trained
from generation.models import check_files, class_names
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.tensors import fingerprint, write_state_dict
from runtime.errors import InputError
from tests.unit.generation.conftest import GENERATOR as GENERATOR_SIZES
from tests.unit.generation.conftest import SIZES


@pytest.fixture
def written(fill, tmp_path):
    """(sizes, tokenizer's file, its tensors, generator's file)."""
    tokenizer, generator = fill(Tokenizer(SIZES)), fill(Generator(GENERATOR_SIZES))
    state = tokenizer.state_dict()
    about = about_model(TOKENIZER, SIZES, stage=2)
    write_state_dict(state, tmp_path / "t.safetensors", about)
    about = about_model(GENERATOR, GENERATOR_SIZES, fingerprint(state), classes=["a", "b", "c"])
    write_state_dict(generator.state_dict(), tmp_path / "g.safetensors", about)
    sizes = {name: about.config[name] for name in about.config}
    models = GeneratorModels(SIZES, GeneratorOptions(**sizes))
    return models, tmp_path / "t.safetensors", state, tmp_path / "g.safetensors"


def test_files_that_belong_together_pass(written):
    about = check_files(*written)
    assert about.classes == ("a", "b", "c")
    models, tokenizer, state, _ = written
    assert check_files(models, tokenizer, state) is None  # codes are decoded


def test_a_generator_with_the_tokenizer_of_other_codes_is_refused(written):
    models, tokenizer, state, generator = written
    other = {**state, "latent_tokens": state["latent_tokens"] + 1}
    with pytest.raises(InputError, match=r"g\.safetensors models the codes of another tokenizer"):
        check_files(models, tokenizer, other, generator)


def test_a_difference_from_the_config_is_named(written):
    models, *files = written
    models.vq_model.encoder_heads = 4
    with pytest.raises(
        InputError, match=r"encoder_heads=4 contradicts .*t\.safetensors.* states 2"
    ):
        check_files(models, *files)


def test_names_come_from_the_file_else_from_the_run_else_from_imagenet(written, tmp_path):
    about = check_files(*written)
    assert class_names(about, "g.bin", 3).labels(["c"]) == [2]
    write_trained(tmp_path / "run", ["ant", "bee", "cat"], [0, 2])
    assert class_names(None, str(tmp_path / "run/g.bin"), 3).labels(["cat"]) == [2]
    assert class_names(None, "g.bin", 1000).labels(["otter"]) == [360]
    with pytest.raises(InputError, match="pass numbers, 0…2"):
        class_names(None, "g.bin", 3).labels(["cat"])
