"""Weights of a run are used with the run's own sizes, also those that no tensor's shape shows."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from configs.load import UNSEEN_SIZES, config_beside, load, sizes_for
from configs.schema import GeneratorRun
from modeling.generator import GeneratorConfig
from modeling.tokenizer import TokenizerConfig
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from runtime.errors import InputError

SIZES = {"image_size": 16, "patch_size": 8, "encoder_width": 16, "encoder_heads": 4}


@pytest.fixture
def run(tmp_path):
    """A tokenizer's run folder with a checkpoint."""
    folder = tmp_path / "run"
    (folder / "checkpoints/step-00000004").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"vq_model": SIZES}}))
    return folder


@pytest.fixture
def config(tmp_path):
    sizes = {**SIZES, "encoder_heads": 2}
    models = {"vq_model": sizes, "generator": {"image_seq_len": 7}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": models}))
    return f"config={tmp_path}/c.yaml"


@pytest.mark.parametrize("program", ["sample_imagenet", "train_ar"])
@pytest.mark.parametrize("part", ["", "checkpoints/step-00000004", "tokenizer.pth"])
def test_a_run_brings_its_sizes(run, config, part, program, capsys):
    options = load(GeneratorRun, [config, f"experiment.tokenizer_checkpoint={run / part}"], program)
    assert options.model.vq_model.encoder_heads == 4
    assert "model.vq_model.encoder_heads=4" in capsys.readouterr().err


def test_null_stands_for_another_number_on_another_grid(run, tmp_path):
    sizes = {**SIZES, "image_size": 32, "num_latent_tokens": 21}
    models = {"vq_model": sizes, "generator": {"image_seq_len": 21}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": models}))
    given = [f"config={tmp_path}/c.yaml", f"experiment.tokenizer_checkpoint={run}"]
    found = load(GeneratorRun, given, "train_ar").model.vq_model
    assert (found.num_latent_tokens, found.num_tokens) == (None, 7)


@pytest.mark.parametrize("of_run, of_config", [(None, 7), (7, None)])
def test_null_and_the_number_that_it_stands_for_are_the_same(
    run, tmp_path, of_run, of_config, capsys
):
    for path, tokens in ((run / "config.yaml", of_run), (tmp_path / "c.yaml", of_config)):
        models = {
            "vq_model": {**SIZES, "num_latent_tokens": tokens},
            "generator": {"image_seq_len": 7},
        }
        path.write_text(yaml.safe_dump({"model": models}))
    given = [f"config={tmp_path}/c.yaml", f"experiment.tokenizer_checkpoint={run}"]
    assert load(GeneratorRun, given, "sample_imagenet").model.vq_model.num_tokens == 7
    assert not capsys.readouterr().err


def test_the_command_line_may_not_contradict_a_run(run, config):
    heads = "model.vq_model.encoder_heads"
    given = [config, f"experiment.tokenizer_checkpoint={run}"]
    with pytest.raises(InputError, match=f"{heads}=2 contradicts {run}/config.yaml"):
        load(GeneratorRun, [*given, f"{heads}=2"], "sample_imagenet")
    assert (
        load(GeneratorRun, [*given, f"{heads}=4"], "sample_imagenet").model.vq_model.encoder_heads
        == 4
    )


def test_a_generator_run_brings_its_sizes_and_leaves_the_sampling(tmp_path, config):
    run = tmp_path / "run_ar"
    (run / "checkpoints").mkdir(parents=True)
    generator = {"hidden_size": 64, "image_seq_len": 7, "guidance_scale": 3.0}
    models = {"vq_model": SIZES, "generator": generator}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": models}))
    options = load(
        GeneratorRun, [config, f"experiment.generator_checkpoint={run}"], "sample_imagenet"
    )
    assert options.model.generator.hidden_size == 64
    assert options.model.generator.guidance_scale == 16.0


@pytest.mark.parametrize("part", ["", "generator.bin", "checkpoints/step-00000002/ema.safetensors"])
def test_weights_of_a_run_are_not_sampled_with_another_number_of_codes(tmp_path, config, part):
    """No tensor shows it: neither the codes' number nor whether prefix tokens come first."""
    run = tmp_path / "run_ar"
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    models = {"vq_model": {**SIZES, "num_latent_tokens": 4}, "generator": {"image_seq_len": 4}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": models}))
    weights = f"experiment.generator_checkpoint={run / part}"
    with pytest.raises(InputError, match=r"=4, but the tokenizer .* makes 7 codes .*run_ar/config"):
        load(GeneratorRun, [config, weights], "sample_imagenet")
    seven = "model.generator.image_seq_len=7"
    with pytest.raises(InputError, match=f"{seven} contradicts {run}/config.yaml"):
        load(GeneratorRun, [config, weights, seven], "sample_imagenet")
    mine = [config, weights, "model.vq_model.num_latent_tokens=4"]
    fitting = load(GeneratorRun, [*mine, "model.generator.image_seq_len=4"], "sample_imagenet")
    assert fitting.model.generator.image_seq_len == 4


def test_another_image_size_comes_with_the_run(run, tmp_path, capsys):
    """A generator that is still to be trained follows, unless the command line says otherwise."""
    sizes = {**SIZES, "image_size": 32}
    models = {"vq_model": sizes, "generator": {"image_seq_len": 21}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": models}))
    given = [f"config={tmp_path}/c.yaml", f"experiment.tokenizer_checkpoint={run}"]
    tokens = "model.generator.image_seq_len"
    with pytest.raises(InputError, match="image_seq_len=21, but the tokenizer"):
        load(GeneratorRun, [*given, f"{tokens}=21"])
    with pytest.raises(InputError, match="image_seq_len=21, but the tokenizer"):
        load(GeneratorRun, [*given, "experiment.generator_checkpoint=of_21_codes.bin"])
    assert load(GeneratorRun, given).model.generator.image_seq_len == 7
    assert f"{tokens}=7, as many as the tokenizer makes, instead of 21" in capsys.readouterr().err


def test_a_config_that_contradicts_the_run_is_refused(run, config):
    file = config.removeprefix("config=")
    assert sizes_for(str(run), None, UNSEEN_SIZES).encoder_heads == 4
    with pytest.raises(InputError, match=r"encoder_heads=2 .* set 4, or leave --config out"):
        sizes_for(str(run), file, UNSEEN_SIZES)
    assert sizes_for(str(run), file, ()).encoder_heads == 2


def test_what_describes_weights_lies_beside_them(run, tmp_path):
    assert config_beside(tmp_path / "AliTok.pth") is None
    (tmp_path / "config.yaml").touch()  # of something else: no run
    assert config_beside(tmp_path / "AliTok.pth") is None
    (tmp_path / "AliTok.yaml").touch()
    assert config_beside(tmp_path / "AliTok.pth") == tmp_path / "AliTok.yaml"
    inside = run / "checkpoints/step-00000004/tokenizer.safetensors"
    for path in (run, run / "tokenizer.pth", inside.parent, inside):
        assert config_beside(path) == run / "config.yaml"


# ---------------------------------------------------------------------- files that say what they are
STATED = {**SIZES, "codebook_size": 64, "num_latent_tokens": 6, "decoder_heads": 8, "causal": True}


@pytest.fixture
def files(tmp_path):
    """A tokenizer's file and a generator's, which state their sizes."""
    tokenizer = TokenizerConfig(**STATED)
    about = about_model(TOKENIZER, tokenizer, "t" * 16, stage=2)
    save_file({"a": torch.ones(1)}, tmp_path / "t.safetensors", about.entries())
    sizes = GeneratorConfig(64, 2, 2, codebook_size=64, image_seq_len=6, condition_num_classes=3)
    about = about_model(GENERATOR, sizes, "t" * 16)
    save_file({"a": torch.ones(1)}, tmp_path / "g.safetensors", about.entries())
    return (
        f"experiment.tokenizer_checkpoint={tmp_path}/t.safetensors",
        f"experiment.generator_checkpoint={tmp_path}/g.safetensors",
    )


def test_files_bring_the_sizes_that_they_state(files, config, capsys):
    model = load(GeneratorRun, [config, *files], "sample_imagenet").model
    assert model.vq_model == TokenizerConfig(**STATED)
    generator = model.generator
    assert (generator.hidden_size, generator.num_hidden_layers) == (64, 2)
    assert (generator.codebook_size, generator.image_seq_len) == (64, 6)
    assert generator.guidance_scale == 16.0 and generator.dropout == 0.1  # not sizes
    said = capsys.readouterr().err
    for words in ("model.vq_model.decoder_heads=8, from ", "model.generator.hidden_size=64, from"):
        assert words in said


def test_what_fits_already_is_not_worth_a_word(files, tmp_path, capsys):
    generator = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_seq_len=6,
                     condition_num_classes=3)  # fmt: skip
    models = {"vq_model": STATED, "generator": generator}
    (tmp_path / "same.yaml").write_text(yaml.safe_dump({"model": models}))
    load(GeneratorRun, [f"config={tmp_path}/same.yaml", *files], "sample_imagenet")
    assert not capsys.readouterr().err


def test_training_follows_the_tokenizers_file(files, config):
    model = load(GeneratorRun, [config, files[0]], "train_ar").model
    assert model.vq_model == TokenizerConfig(**STATED)
    assert (model.generator.image_seq_len, model.generator.codebook_size) == (6, 64)
    assert model.generator.hidden_size == 768


@pytest.mark.parametrize(
    "option", ["model.vq_model.decoder_heads=2", "model.generator.hidden_size=128"]
)
def test_the_command_line_may_not_contradict_a_file(files, config, option):
    with pytest.raises(InputError, match=rf"{option} contradicts .*\.safetensors"):
        load(GeneratorRun, [config, *files, option], "sample_imagenet")


def test_a_file_of_the_other_kind_is_refused(files, config):
    swapped = [option.split("=")[1] for option in files]
    given = [f"experiment.tokenizer_checkpoint={swapped[1]}"]
    with pytest.raises(InputError, match="holds a generator, not a tokenizer"):
        load(GeneratorRun, [config, *given], "train_ar")


def test_a_program_with_flags_takes_the_sizes_of_a_file(files, tmp_path, config):
    path = files[0].split("=")[1]
    assert sizes_for(path, None, ("encoder_heads",)) == TokenizerConfig(**STATED)
    assert sizes_for(path, None, (), image_size=16).num_latent_tokens == 6
    with pytest.raises(
        InputError, match=r"image_size=32 \(the command line\) contradicts .*states image_size=16"
    ):
        sizes_for(path, None, (), image_size=32)
    with pytest.raises(InputError, match=r"codebook_size=4096 \(.*c\.yaml\) contradicts"):
        sizes_for(path, config.removeprefix("config="), ())
    other_decoder = {**STATED, "decoder_heads": 4}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({"model": {"vq_model": other_decoder}}))
    assert sizes_for(path, f"{tmp_path}/d.yaml", ("encoder_heads",)).decoder_heads == 8
    with pytest.raises(InputError, match="decoder_heads=4"):
        sizes_for(path, f"{tmp_path}/d.yaml", UNSEEN_SIZES)
