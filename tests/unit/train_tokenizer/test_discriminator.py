import numpy as np
import torch

from tests.golden.fill import images
from train_tokenizer.discriminator import (
    BlurDownsample,
    Discriminator,
    hinge_loss,
)


def test_logits_are_the_published_ones(golden, fill):
    expected = golden("discriminator.npz")
    model = fill(Discriminator())
    shapes = {k: [list(v.shape), "float32"] for k, v in model.state_dict().items()}
    assert shapes == golden("state_dicts.json")["discriminator"]
    x = torch.from_numpy(images(2, 256, 1))
    with torch.no_grad():
        small, whole = model(x[:, :, :128, :128]), model(x[:1])
    np.testing.assert_allclose(small.numpy(), expected["logits_128"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(whole.numpy(), expected["logits_256"], atol=1e-4, rtol=0)


def test_blur_of_an_odd_size_is_padded_by_two_at_its_end():
    blurred = BlurDownsample()(torch.ones(1, 1, 5, 6))[0, 0]
    # Of the kernel's (1, 3, 3, 1) / 8, what falls on the image.
    expected = torch.outer(torch.tensor([7.0, 8, 4]), torch.tensor([7.0, 8, 7])) / 64
    torch.testing.assert_close(blurred, expected)


def test_hinge_losses_on_known_logits():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == 0.5 * (0.5 + 1.0)
