"""The presets that say as published take the published value of every option of the recipe."""

import pytest
import torch

import configs.load
from configs.schema import GeneratorRun, TokenizerRun
from runtime.errors import InputError
from train_tokenizer.__main__ import build_discriminator


def tokenizer_preset(name, *options):
    arguments = [f"config=configs/{name}.yaml", *options]
    return configs.load.load(TokenizerRun, arguments, "train_tokenizer")


def test_published_stage1():
    run = tokenizer_preset("tokenizer_stage1")
    assert run.model.vq_model.position_init == "normal"
    assert not run.model.vq_model.exact_attention
    assert run.model.cluster_in_critic_steps
    params = run.optimizer.params
    assert (params.warmup_steps, params.count_from, params.critic_learning_rate) == (
        10_000,
        0,
        1e-4,
    )
    assert (run.losses.critic_weight, run.training.max_grad_norm) == (0.1, 0)


def test_published_stage2():
    run = tokenizer_preset("tokenizer_stage2")
    assert (run.model.decoder_init, run.model.critic_init) == ("stage1", "stage1")
    params = run.optimizer.params
    assert (params.warmup_steps, params.critic_learning_rate) == (0, 1e-4)
    assert (run.losses.critic_weight, run.training.max_grad_norm) == (0.1, 0)


@pytest.mark.parametrize("name", ["alitok_b", "alitok_l", "alitok_xl"])
def test_published_generators(name):
    run = configs.load.load(GeneratorRun, [f"config=configs/{name}.yaml"], "train_ar")
    assert run.lr_scheduler.params.count_from == 0 and run.training.max_grad_norm == 1.0


@pytest.mark.parametrize("name", ["digits_stage1", "tokenizer_v3_stage1", "tokenizer_stage1_512"])
def test_other_presets_start_every_latent_at_its_own_patch(name):
    assert tokenizer_preset(name).model.vq_model.position_init == "own_patch"


@pytest.mark.parametrize(
    "preset, option, reason",
    [
        ("tokenizer_stage1", "model.critic_init=stage1", "stage 1 always starts from scratch"),
        (
            "tokenizer_stage2",
            "model.cluster_in_critic_steps=true",
            "needs model.vq_model.clustering=true",
        ),
    ],
)
def test_option_of_the_other_stage_is_refused(preset, option, reason):
    with pytest.raises(InputError, match=reason):
        tokenizer_preset(preset, option)


def test_stage2_without_a_discriminator_of_stage1_says_what_to_set(tmp_path):
    torch.save({"latent_tokens": torch.ones(1)}, tmp_path / "w.pth")
    run = tokenizer_preset("tokenizer_stage2", f"experiment.stage1_checkpoint={tmp_path}/w.pth")
    with pytest.raises(InputError, match=r"no block_in.0.weight.*set model.critic_init=scratch"):
        build_discriminator(run)
