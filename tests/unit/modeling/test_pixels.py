import torch

from modeling.pixels import to_float, to_uint8


def test_values_are_truncated_not_rounded():
    values = torch.tensor([0.0, 0.5, 254.999 / 255, 1.0])
    assert to_uint8(values).tolist() == [0, 127, 254, 255]


def test_values_beyond_the_unit_interval_are_clamped():
    assert to_uint8(torch.tensor([-0.5, 1.5])).tolist() == [0, 255]


def test_floats_are_shares_of_255():
    values = to_float(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32 and values[51] == 0.2 and values[255] == 1
