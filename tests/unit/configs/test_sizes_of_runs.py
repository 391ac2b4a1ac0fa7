"""Weights of a run are used with the run's own sizes, also those that no tensor's shape shows."""

import pytest
import yaml

from configs.load import UNSEEN_SIZES, config_beside, load, sizes_for
from configs.schema import GeneratorRun
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


def test_another_image_size_comes_with_the_run(run, tmp_path):
    sizes = {**SIZES, "image_size": 32}
    models = {"vq_model": sizes, "generator": {"image_seq_len": 21}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": models}))
    with pytest.raises(InputError, match="image_seq_len=21, but the tokenizer"):
        load(GeneratorRun, [f"config={tmp_path}/c.yaml", f"experiment.tokenizer_checkpoint={run}"])


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
