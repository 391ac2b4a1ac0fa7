import copy
import warnings
from pathlib import Path

import lpips
import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from evaluation.lpips import LPIPS, LPIPS_FILE, VGG_FILE
from runtime.published import MissingFile
from tests.host_syncs import HostSyncs
from tests.refusals import refusal

WEIGHTS = Path("weights")
HEADS = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"


def without_random_start(patch):
    """Spare the seconds that the random start of VGG's classifier takes, which LPIPS drops."""
    patch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    patch.setattr(nn.init, "normal_", lambda tensor, *_, **__: tensor)


# ---------------------------------------------------------------------- weight files
def test_pretrained_network_without_its_file_is_refused(nowhere):
    named = VGG_FILE, "weights/", f"{nowhere}/hub/checkpoints", "weights/README.md", "loss to 0"
    with torch.device("meta"):
        refusal(lambda: LPIPS(WEIGHTS), *named)


def save_shapes(model, path):
    """A file with the model's names and shapes in a few bytes."""
    path.parent.mkdir(exist_ok=True)
    zero = torch.zeros(())
    torch.save({k: zero.expand(v.shape) for k, v in model.state_dict().items()}, path)


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_pretrained_network_takes_torchvisions_and_the_packages_files(nowhere):
    with torch.device("meta"):
        save_shapes(vgg16(), nowhere / "weights" / VGG_FILE)
        (nowhere / "weights" / LPIPS_FILE).write_bytes(HEADS.read_bytes())
        LPIPS(WEIGHTS)


def test_another_file_in_the_place_of_vgg_is_refused(nowhere):
    with torch.device("meta"):
        save_shapes(nn.Linear(2, 2), nowhere / "weights" / VGG_FILE)
        (nowhere / "weights" / LPIPS_FILE).write_bytes(HEADS.read_bytes())
        refusal(lambda: LPIPS(WEIGHTS), VGG_FILE)


# ---------------------------------------------------------------------- distance
@pytest.fixture(scope="module")
def published_lpips():
    """The package's network, on random weights and its own heads."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # torchvision's, of the package's old call
        without_random_start(patch)
        model = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    model.load_state_dict(torch.load(HEADS, "cpu", weights_only=True), strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def own_lpips(published_lpips):
    with pytest.MonkeyPatch.context() as patch:
        without_random_start(patch)
        model = LPIPS(None)
    convolutions = [m for m in published_lpips.net.modules() if isinstance(m, nn.Conv2d)]
    own = [m for m in model.vgg.modules() if isinstance(m, nn.Conv2d)]
    for mine, theirs in zip(own, convolutions, strict=True):
        mine.load_state_dict(theirs.state_dict())
    heads = torch.load(HEADS, "cpu", weights_only=True)
    missing, unknown = model.load_state_dict(heads, strict=False)
    assert not unknown and all(name.startswith("vgg.") for name in missing)
    return model


def test_lpips_is_that_of_the_package(published_lpips, own_lpips):
    images, targets = torch.rand(2, 2, 3, 64, 48)
    with torch.no_grad():
        expected = published_lpips(images * 2 - 1, targets * 2 - 1).mean()
        value = own_lpips.distance(images, targets)
    assert expected > 0.01
    torch.testing.assert_close(value, expected)


def test_lpips_normalises_by_constants_that_no_file_holds(own_lpips):
    buffers = dict(own_lpips.named_buffers())
    assert set(buffers) == {"shift", "scale"}
    assert not buffers.keys() & own_lpips.state_dict().keys()
    syncs = HostSyncs()
    with syncs:
        syncs.step = 1
        own_lpips.distance(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    assert syncs.found == {}


def test_lpips_gradient_is_that_of_the_package(published_lpips, own_lpips):
    images, targets = torch.rand(2, 1, 3, 32, 32)
    images.requires_grad_()
    [expected] = torch.autograd.grad(
        published_lpips(images * 2 - 1, targets * 2 - 1).mean(), images
    )
    [gradient] = torch.autograd.grad(own_lpips.distance(images, targets), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_lpips_gradient_is_finite_where_no_feature_answers(own_lpips):
    # Zero features are normalised by a root whose slope is infinite there.
    silent = copy.deepcopy(own_lpips)
    for name, parameter in silent.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(-99.0)
    images = torch.rand(1, 3, 32, 32).requires_grad_()
    assert not any(feature.any() for feature in silent.features(images))
    silent.distance(images, torch.rand(1, 3, 32, 32)).backward()
    assert images.grad.isfinite().all()


def test_lpips_of_equal_images_is_zero(own_lpips):
    images = torch.rand(1, 3, 32, 32)
    assert own_lpips.distance(images, images) == 0


def gradients_reach(network):
    """Whether images, targets and parameters get a gradient of their distance."""
    images, targets = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    images.requires_grad_(), targets.requires_grad_()
    network.distance(images, targets).backward()
    assert images.grad.isfinite().all()
    parameters = any(p.requires_grad for p in network.parameters())
    return bool(images.grad.any()), targets.grad is not None, parameters


def test_lpips_gradient_reaches_the_images_alone(own_lpips):
    assert gradients_reach(own_lpips) == (True, False, False)


def test_lpips_needs_both_files_before_it_is_built(nowhere, monkeypatch):
    monkeypatch.setattr("torchvision.models.vgg16", lambda: pytest.fail("built"))
    (nowhere / "weights").mkdir()
    for missing in (VGG_FILE, LPIPS_FILE):
        with pytest.raises(MissingFile, match=missing):
            LPIPS(WEIGHTS)
        (nowhere / "weights" / missing).touch()
