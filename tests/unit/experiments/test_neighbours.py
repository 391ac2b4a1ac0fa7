"""Bits per code of codes whose entropies are known by construction."""

import numpy as np
import pytest

from experiments.alignment.neighbours import CONTEXTS, Table, code_dependence, neighbours
from tests.tiny import tiny_tokenizer

CODES = 8
RNG = np.random.default_rng


def config(codes=CODES, tokens=None):
    return tiny_tokenizer(codebook_size=codes, num_latent_tokens=tokens, patch_size=4)


def filled(next_code, images, seed=0):
    """Codes (N, 21) in raster order by `next_code(left, above, rng)`; -1 for no neighbour."""
    rng, (left, above) = RNG(seed), neighbours(config())
    codes = np.full((images, 22), -1)
    for position in range(21):
        codes[:, position] = next_code(codes[:, left[position]], codes[:, above[position]], rng)
    return codes[:, :21]


def independent(left, above, rng):
    return rng.integers(0, CODES, len(left))


def one_more_than_left(left, above, rng):
    return np.where(left < 0, rng.integers(0, CODES, len(left)), (left + 1) % CODES)


def as_above(left, above, rng):
    return np.where(above < 0, rng.integers(0, CODES, len(left)), above)


def sum_of_both(left, above, rng):
    known = (left >= 0) & (above >= 0)
    return np.where(known, (left + above) % CODES, rng.integers(0, CODES, len(left)))


# ---------------------------------------------------------------------- who is whose neighbour
def test_neighbours_are_left_and_above_and_the_prefix_lies_above_the_first_row():
    left, above = neighbours(config())  # K = 5: corner, then the first row
    assert left.tolist() == [
        -1,
        0,
        1,
        2,
        3,
        -1,
        5,
        6,
        7,
        -1,
        9,
        10,
        11,
        -1,
        13,
        14,
        15,
        -1,
        17,
        18,
        19,
    ]
    assert above.tolist() == [-1] * 5 + [1, 2, 3, 4, *range(5, 17)]
    left, above = neighbours(config(tokens=20))  # K = 4
    assert left[:9].tolist() == [-1, 0, 1, 2, -1, 4, 5, 6, -1]
    assert above.tolist() == [-1] * 4 + list(range(16))
    left, above = neighbours(config(tokens=16))  # K = 0
    assert left[:9].tolist() == [-1, 0, 1, 2, -1, 4, 5, 6, -1]
    assert above.tolist() == [-1] * 4 + list(range(12))


# ---------------------------------------------------------------------- bits
def test_independent_codes_cost_their_entropy_whatever_is_known():
    found = code_dependence(filled(independent, 2000), config())
    for name in CONTEXTS:
        assert found["bits"][name] >= 3 - 0.001  # never less than the entropy: nothing to learn …
    assert found["bits"]["nothing"] == pytest.approx(3, abs=0.001)
    assert found["bits"]["left"] == pytest.approx(3, abs=0.02)
    assert found["bits"]["left and above"] == pytest.approx(3, abs=0.1)  # … but the cost of trying
    assert found["top1"]["nothing"] == pytest.approx(1 / 8, abs=0.02)


def test_few_images_overstate_never_understate_the_bits():
    found = code_dependence(filled(independent, 30), config())
    assert found["bits"]["left and above"] > found["bits"]["left"] > 3


@pytest.mark.parametrize("rule, known, other", [(one_more_than_left, "left", "above"), (as_above, "above", "left")])  # fmt: skip
def test_a_code_decided_by_one_neighbour_costs_nothing_given_it(rule, known, other):
    codes = filled(rule, 2000)
    found, alone = code_dependence(codes, config()), neighbours(config())[known == "above"] < 0
    # Codes without that neighbour are free choices of eight: 3 bits each, nothing else.
    assert found["bits"][known] == pytest.approx(3 * alone.mean(), abs=0.02)
    assert found["bits"]["nothing"] == pytest.approx(3, abs=0.01)
    assert found["bits"][other] > found["bits"][known] + 1
    assert found["top1"][known] == pytest.approx(1 - alone.mean() * 7 / 8, abs=0.02)


def test_a_code_decided_by_both_neighbours_needs_both():
    left, above = neighbours(config())
    found = code_dependence(filled(sum_of_both, 4000), config())
    free = ((left < 0) | (above < 0)).mean()
    assert found["bits"]["left and above"] == pytest.approx(3 * free, abs=0.1)
    assert found["bits"]["left"] > 2.9 and found["bits"]["above"] > 2.9


def test_codes_of_a_position_cost_nothing_given_it():
    codes = np.broadcast_to(RNG(1).permutation(21) % CODES, (500, 21))
    found = code_dependence(codes, config())
    assert found["bits"]["position"] < 0.02 and found["top1"]["position"] == 1
    assert found["bits"]["nothing"] > 2.9


def test_rows_and_images_add_up():
    found = code_dependence(filled(one_more_than_left, 200), config())
    for name in CONTEXTS:
        rows = found["bits_by_row"][name]
        whole = (5 * rows[0] + 4 * sum(rows[1:])) / 21
        assert whole == pytest.approx(found["bits"][name]) and len(rows) == 5
        assert found["bits_per_image"][name] == pytest.approx(21 * found["bits"][name])


def test_tables_count_the_other_images_where_they_are_given():
    codes = filled(one_more_than_left, 50)
    other = filled(one_more_than_left, 2000, seed=1)
    alone, helped = code_dependence(codes, config()), code_dependence(codes, config(), other)
    assert helped["bits"]["left"] < alone["bits"]["left"]
    unrelated = filled(independent, 2000, seed=1)
    assert code_dependence(codes, config(), unrelated)["bits"]["left"] == pytest.approx(3, abs=0.2)


def test_no_image_is_predicted_from_itself():
    """Two images, each with codes that the other never has: every code is a surprise."""
    codes = np.stack([np.zeros(21, int), np.ones(21, int)])
    found = code_dependence(codes, config())
    assert found["bits"]["left"] > 3 and found["top1"]["left"] == 0


# ---------------------------------------------------------------------- the tables
def test_probabilities_are_witten_bells_and_add_up_to_one():
    context, codes = np.array([0, 0, 0, 1]), np.array([2, 2, 3, 1])
    table = Table.of(context, codes, 4)
    asked = np.arange(4)
    uniform, guess = np.full(4, 0.25), np.zeros(4, int)
    chance, guessed = table.predict(np.zeros(4, int), asked, uniform, guess)
    np.testing.assert_allclose(chance, np.array([0.5, 0.5, 2.5, 1.5]) / 5)  # (c + 2/4) / (3 + 2)
    assert guessed.tolist() == [2] * 4
    chance, guessed = table.predict(np.full(4, 7), asked, uniform, guess)  # never counted
    assert chance.tolist() == [0.25] * 4 and guessed.tolist() == [0] * 4


def test_large_codebooks_do_not_overflow():
    large = config(codes=65536)
    codes = RNG(0).integers(65000, 65536, (20, 21))
    found = code_dependence(codes, large)
    assert all(np.isfinite(bits) and bits > 0 for bits in found["bits"].values())
