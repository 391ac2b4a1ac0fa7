import pytest
import torch

from modeling.generator import Generator, next_code_loss
from tests.tiny import tiny_generator
from training import utilisation
from training.utilisation import peak_flops, training_flops


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    sizes = dict(hidden_size=64, num_attention_heads=4, codebook_size=32, image_seq_len=21)
    config = tiny_generator(**sizes, attn_drop=0.0)
    model = Generator(config)
    codes = torch.randint(32, (3, 21))
    with FlopCounterMode(display=False) as counter:
        next_code_loss(model(codes[:, :-1], torch.tensor([1, 2, 3])), codes)[0].backward()
    # torch counts every score, and that the backward pass computes the forward's scores again.
    scores = 2 * 2 * 64 * 21 * 21 * 2  # q·k and its share of v, 2 layers, of one image
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for name, n in counts.items() if "attention" in str(name))
    assert attention in (0, 3 * scores * 3, 3 * scores * 3.5)
    matrices = counter.get_total_flops() - attention
    assert training_flops(config) == pytest.approx(matrices / 3 + 3 * scores / 2)


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GB200", 2250),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_peak_by_the_devices_name(monkeypatch, name, tera):
    monkeypatch.setattr(utilisation, "device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == tera * 1e12


def test_no_peak_is_claimed_where_it_is_not_known(monkeypatch):
    monkeypatch.setattr(utilisation, "device_name", lambda device: "Some new device")
    assert peak_flops(torch.device("cuda"), "bf16") is None
    monkeypatch.setattr(utilisation, "device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda"), "no") is None  # the peaks are of 16 bits
    assert peak_flops(torch.device("cpu"), "bf16") is None
