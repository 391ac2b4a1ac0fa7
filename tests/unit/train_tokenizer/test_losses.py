from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from configs.schema import Losses, Phase
from modeling.tokenizer import Tokenizer, TokenizerConfig, prefix_target
from tests.tiny import STAGE1, tiny_tokenizer
from train_tokenizer import losses
from train_tokenizer.__main__ import TrainState
from train_tokenizer.discriminator import Discriminator
from train_tokenizer.losses import FrozenNetworks, stitch, tokenizer_terms

PLAIN = Phase(steps=1)


class Network:
    """Stands for a frozen network; remembers what it compared."""

    def __init__(self, value):
        self.value, self.calls, self.prepared = value, [], 0

    def targets(self, images):
        self.prepared += 1
        return images

    def distance(self, images, targets):
        self.calls.append((images, targets))
        return self.value


class Brightness(torch.nn.Module):
    """Stands for a discriminator."""

    def forward(self, images):
        return images.mean((1, 2, 3))


class Networks:
    def __init__(self, convnext=None, lpips=None):
        self.convnext, self.lpips = convnext, lpips
        self.precision = nullcontext


def terms_of(config, stage, phase=PLAIN, weights=None, networks=None, discriminator=None):
    """Terms of one step, with its images and the output that they are of."""
    images = torch.rand(2, 3, 32, 32)
    out = Tokenizer(config)(images)
    weights = weights or Losses()
    networks = networks or Networks()  # without any: a term that asks for one fails
    return (
        tokenizer_terms(out, images, config, stage, phase, weights, networks, discriminator),
        images,
        out,
    )


def stage1(**changes):
    return tiny_tokenizer(image_size=32, **STAGE1, **changes)


def stage2():
    return tiny_tokenizer(image_size=32)


# ---------------------------------------------------------------------- which terms
def test_stage1_has_strip_and_quantizer_terms():
    assert set(terms_of(stage1(), 1)[0]) == {"mse", "aux", "quantizer"}


def test_stage2_has_neither_strip_nor_quantizer_term():
    assert set(terms_of(stage2(), 2)[0]) == {"mse"}


@pytest.mark.parametrize(
    "weight, term",
    [("perceptual_weight", "perceptual"), ("lpips_weight", "lpips"), ("gan_weight", "gan")],
)
def test_term_of_a_phase_is_there_only_with_a_weight(weight, term):
    network = Network(torch.tensor(3.0))
    phase = Phase(steps=1, **{weight: 0.25})
    given, *_ = terms_of(stage2(), 2, phase, None, Networks(network, network), Brightness())
    assert set(given) == {"mse", term} and given[term][0] == 0.25


def test_terms_of_weight_zero_call_no_network():
    network = Network(torch.tensor(3.0))

    def discriminator(images):
        raise AssertionError("called")

    terms_of(stage1(), 1, PLAIN, None, Networks(network, network), discriminator)
    assert network.calls == []


# ---------------------------------------------------------------------- weights
@pytest.mark.parametrize("tokens, prefix", [(None, 5), (20, 4)])
def test_aux_weight_is_ten_times_the_prefix_over_the_image_tokens(tokens, prefix):
    terms, *_ = terms_of(stage1(num_latent_tokens=tokens), 1)
    assert terms["aux"][0] == pytest.approx(10 * prefix / 16)


def test_published_aux_weight_is_170_over_256():
    config = TokenizerConfig(**STAGE1)
    images = torch.zeros(1, 3, 256, 256)
    out = losses.TokenizerOutput(images, torch.zeros(1, 3, 16, 272), images, images, images.sum())
    terms = tokenizer_terms(out, images, config, 1, PLAIN, Losses(), Networks(), None)
    assert terms["aux"][0] == pytest.approx(170 / 256)


def test_weights_of_the_config_are_used():
    terms, *_ = terms_of(stage1(), 1, PLAIN, Losses(aux_weight=4.0))
    assert terms["aux"][0] == pytest.approx(4 * 5 / 16)
    assert terms["quantizer"][0] == terms["mse"][0] == 1.0


# ---------------------------------------------------------------------- values
def test_values_are_those_of_the_output():
    terms, images, out = terms_of(stage1(), 1)
    assert torch.equal(terms["mse"][1], F.mse_loss(out.images, images))
    assert torch.equal(terms["aux"][1], F.mse_loss(out.strip, prefix_target(images, stage1())))
    assert terms["quantizer"][1] is out.quantizer_loss


def test_perceptual_terms_compare_the_reconstruction_with_the_image():
    convnext, lpips = Network(torch.tensor(3.0)), Network(torch.tensor(5.0))
    phase = Phase(steps=1, perceptual_weight=0.1, lpips_weight=1.0)
    terms, images, out = terms_of(stage2(), 2, phase, None, Networks(convnext, lpips))
    assert (terms["perceptual"][1].item(), terms["lpips"][1].item()) == (3.0, 5.0)
    for network in (convnext, lpips):
        [(compared, target)] = network.calls
        assert compared is out.images and target is images


def test_gan_term_rewards_what_the_discriminator_takes_for_real():
    phase = Phase(steps=1, gan_weight=0.005)
    terms, _, out = terms_of(stage2(), 2, phase, None, None, Brightness())
    torch.testing.assert_close(terms["gan"][1], -out.images.mean())


def test_gan_term_has_a_gradient_for_the_images_and_none_for_the_discriminator():
    judge = Discriminator(32)
    phase = Phase(steps=1, gan_weight=0.005)
    state = SimpleNamespace(discriminator=judge, accelerator=Accelerator(cpu=True))
    terms, _, out = terms_of(stage2(), 2, phase, None, None, partial(TrainState.judge, state))
    assert all(p.requires_grad for p in judge.parameters())
    [gradient] = torch.autograd.grad(terms["gan"][1], out.images, retain_graph=True)
    assert gradient.any()
    terms["gan"][1].backward()
    assert all(p.grad is None for p in judge.parameters())


def test_every_parameter_but_the_codebooks_share_gets_a_gradient_in_stage1():
    config = stage1()
    model, images = Tokenizer(config), torch.rand(2, 3, 32, 32)
    terms = tokenizer_terms(model(images), images, config, 1, PLAIN, Losses(), Networks(), None)
    sum(weight * value for weight, value in terms.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


# ---------------------------------------------------------------------- stitched aux term
STITCHED = Losses(aux="stitched", aux_weight=0.5)


def test_stitched_image_is_the_strip_above_the_detached_reconstruction():
    out = Tokenizer(stage1(num_latent_tokens=20))(torch.rand(2, 3, 32, 32))
    image = stitch(out)
    assert torch.equal(image[:, :, :8], out.strip)
    assert torch.equal(image[:, :, 8:], out.images[:, :, 8:])
    strip, main = torch.autograd.grad(image.sum(), [out.strip, out.images], allow_unused=True)
    assert strip is not None and main is None


def test_stitched_aux_is_mse_and_perceptual_term_of_that_image():
    convnext = Network(torch.tensor(3.0))
    phase = Phase(steps=1, perceptual_weight=0.25)
    config = stage1(num_latent_tokens=20)
    terms, images, out = terms_of(config, 1, phase, STITCHED, Networks(convnext))
    assert set(terms) == {"mse", "aux", "aux_perceptual", "quantizer", "perceptual"}
    assert terms["aux"][0] == 0.5 and terms["aux_perceptual"] == (0.125, convnext.value)
    torch.testing.assert_close(terms["aux"][1], F.mse_loss(stitch(out), images))
    assert convnext.prepared == 1  # for both distances
    stitched, target = convnext.calls[0]
    assert torch.equal(stitched, stitch(out)) and target is images


def test_stitched_aux_without_a_perceptual_weight_calls_no_network():
    terms, *_ = terms_of(stage1(num_latent_tokens=20), 1, PLAIN, STITCHED)
    assert set(terms) == {"mse", "aux", "quantizer"}


# ---------------------------------------------------------------------- networks
@pytest.mark.parametrize(
    "phases, built",
    [
        ([PLAIN], set()),
        ([PLAIN, Phase(steps=1, perceptual_weight=0.1)], {"convnext"}),
        ([Phase(steps=1, lpips_weight=1.0), PLAIN], {"lpips"}),
        ([Phase(steps=1, gan_weight=1.0)], set()),
    ],
)
def test_only_networks_that_a_phase_needs_are_built(monkeypatch, phases, built):
    monkeypatch.setattr(losses, "ConvNeXtLogits", lambda weights: torch.nn.Identity())
    monkeypatch.setattr(losses, "LPIPS", lambda weights: torch.nn.Identity())
    networks = FrozenNetworks(phases, None, torch.device("cpu"))
    assert {name for name in ("convnext", "lpips") if getattr(networks, name)} == built


def test_frozen_networks_convolve_in_channels_last(monkeypatch):
    monkeypatch.setattr(losses, "ConvNeXtLogits", lambda weights: torch.nn.Conv2d(3, 4, 3))
    monkeypatch.setattr(losses, "LPIPS", lambda weights: torch.nn.Conv2d(3, 4, 3))
    phases = [Phase(steps=1, perceptual_weight=1.0, lpips_weight=1.0)]
    networks = FrozenNetworks(phases, None, torch.device("cpu"))
    for network in (networks.convnext, networks.lpips):
        out = network(torch.rand(2, 3, 8, 8))
        assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
