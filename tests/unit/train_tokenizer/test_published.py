"""The presets that say as published take the published value of every option of the recipe."""

from types import SimpleNamespace

import pytest
import torch

import configs.load
from configs.schema import GeneratorRun, TokenizerRun
from tests.refusals import refusal
from train_tokenizer.__main__ import build_discriminator, build_tokenizer, learning_rate
from train_tokenizer.discriminator import Discriminator


def tokenizer_preset(name, *options):
    arguments = [f"config=configs/{name}.yaml", *options]
    return configs.load.load(TokenizerRun, arguments, "train_tokenizer")


def test_published_stage1():
    run = tokenizer_preset("tokenizer_stage1")
    assert run.model.vq_model.position_init == "normal"
    assert run.model.cluster_in_critic_steps
    params = run.optimizer.params
    assert (params.warmup_steps, params.count_from) == (10_000, 0)
    assert (run.losses.critic_weight, run.training.max_grad_norm) == (0.1, 0)


def test_published_stage2():
    run = tokenizer_preset("tokenizer_stage2")
    assert (run.model.decoder_init, run.model.critic_init) == ("stage1", "stage1")
    assert run.optimizer.params.warmup_steps == 0
    assert (run.losses.critic_weight, run.training.max_grad_norm) == (0.1, 0)


@pytest.mark.parametrize(
    "name",
    [*(f"tokenizer_stage{n}{size}" for n in (1, 2) for size in ("", "_512")), "finetune_decoder"],
)
def test_published_discriminator_follows_the_rate_of_the_phase(name):
    run = tokenizer_preset(name)
    assert run.optimizer.params.critic_learning_rate is None
    steps = [phase.steps for phase in run.phases]
    adversarial = [sum(steps[:-1]) + within for within in (1, steps[-1])]
    first, last = (learning_rate(run, step, train_critic=True) for step in adversarial)
    assert (first, last) == (pytest.approx(2e-5, rel=1e-3), pytest.approx(2e-6))


def test_warm_up_is_the_tokenizers_alone():
    run = tokenizer_preset("tokenizer_stage1")
    rates = [learning_rate(run, 5_001, critic) for critic in (False, True)]
    assert rates == [pytest.approx(0.5e-4), 1e-4]


@pytest.mark.parametrize("name", ["alitok_b", "alitok_l", "alitok_xl"])
def test_published_generators(name):
    run = configs.load.load(GeneratorRun, [f"config=configs/{name}.yaml"], "train_ar")
    assert run.lr_scheduler.params.count_from == 0 and run.training.max_grad_norm == 1.0


@pytest.mark.parametrize("name", ["digits_stage1", "tokenizer_v3_stage1", "tokenizer_stage1_512"])
def test_other_presets_start_every_latent_at_its_own_patch(name):
    assert tokenizer_preset(name).model.vq_model.position_init == "own_patch"


def test_stage2_without_a_discriminator_of_stage1_says_what_to_set(tmp_path):
    torch.save({"latent_tokens": torch.ones(1)}, tmp_path / "w.pth")
    run = tokenizer_preset("tokenizer_stage2", f"experiment.stage1_checkpoint={tmp_path}/w.pth")
    state = SimpleNamespace(options=run, checkpoint=SimpleNamespace(holds=lambda _: False))
    refusal(lambda: build_discriminator(state), "a discriminator", "model.critic_init=scratch")


@pytest.mark.parametrize("stage", [1, 2])
def test_the_discriminator_beside_initial_weights_is_kept(tmp_path, stage):
    """As the published trainer's last.pth holds it; a checkpoint that has one wins."""
    state = Discriminator().state_dict()
    theirs = {f"discriminator.{name}": torch.full_like(t, 2) for name, t in state.items()}
    torch.save({"model_state": {}, "criterion_state": theirs}, tmp_path / "last.pth")
    init = [f"experiment.init_weights={tmp_path}/last.pth", "model.critic_init=stage1"]
    options = tokenizer_preset(f"tokenizer_stage{stage}", *init)
    for saved in (False, True):
        checkpoint = SimpleNamespace(holds=lambda _, saved=saved: saved)
        built = build_discriminator(SimpleNamespace(options=options, checkpoint=checkpoint))
        assert (built.block_in[0].weight == 2).all().item() is not saved


@pytest.mark.parametrize(
    "stage, start", [(1, "stage1"), (2, "scratch")]
)  # the first is the default
def test_v3_presets_are_those_of_parity_md(stage, start):
    run = tokenizer_preset(f"tokenizer_v3_stage{stage}")
    params = run.optimizer.params
    assert (params.warmup_steps, params.count_from) == (10_000, 1)
    assert (run.losses.critic_weight, run.training.max_grad_norm) == (1, 1)
    assert run.model.decoder_init == start and not run.model.cluster_in_critic_steps
    assert not any(p.reset_optimizer for p in run.phases) and run.phases[2].critic_after == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_is_that_of_the_option(recompute):
    with torch.device("meta"):
        made = build_tokenizer(
            tokenizer_preset("tokenizer_stage1", f"model.use_checkpoint={recompute}")
        )
    assert made.encoder.recompute is recompute and made.decoder.recompute is recompute
