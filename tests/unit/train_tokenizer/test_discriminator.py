import numpy as np
import torch

from tests.golden.fill import images
from train_tokenizer.discriminator import Discriminator, adversarial_loss, hinge_loss, same_padding


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


def test_same_padding_puts_the_odd_pixel_last():
    x = torch.ones(1, 1, 5, 6)
    assert same_padding(x, 4, 2).shape[2:] == (8, 8)  # outputs 3 = ceil(5 / 2) and 3
    assert same_padding(x, 4, 2)[0, 0, 1, 0] == 0 and same_padding(x, 4, 2)[0, 0, 1, 1] == 1


def test_hinge_losses_on_known_logits():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == 0.5 * (0.5 + 1.0)
    assert adversarial_loss(fake).item() == 1.0
