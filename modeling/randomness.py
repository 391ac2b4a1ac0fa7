"""The random numbers of an image: a pure function of (seed, index), the same on every machine.

They are those of NumPy's `Generator(Philox(SeedSequence(seed, spawn_key=(index,))))`, computed here
because the models depend on PyTorch alone. A seed sequence (O'Neill 2015, as NumPy implements it)
hashes seed and index into a key of 128 bits; Philox 4x64 with ten rounds (Salmon et al. 2011) turns
the key and a counter into four 64-bit words per count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# 32-bit constants of the seed sequence.
POOL_WORDS = 4
HASH_START, HASH_STEP = 0x43B0D7E5, 0x931E8875
STATE_START, STATE_STEP = 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = 0xCA01F9DD, 0x4973F715
MASK = 0xFFFFFFFF
# 64-bit constants of Philox: multipliers of words 0 and 2, and what each round adds to the key.
PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
PHILOX_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
PHILOX_ROUNDS = 10


def image_uniforms(seed: int, indices: Sequence[int], steps: int) -> Tensor:
    """Uniforms in [0, 1) of the images `indices`: (len(indices), steps), float32, on the CPU.

    Row i depends on (seed, indices[i]) alone, never on the rank, the batch or the device.
    """
    keys = torch.tensor([_philox_key(seed, i) for i in indices], dtype=torch.int64).view(-1, 2)
    blocks = -(-steps // 8)  # a count makes four words, and a word two numbers
    words = _philox(keys, blocks)  # (N, 4 · blocks)
    halves = torch.stack([words & MASK, (words >> 32) & MASK], -1).flatten(1)  # low half first
    return (halves[:, :steps] >> 8).float() * 2.0**-24


class _WordHash:
    """Hashes 32-bit words; its multiplier changes from word to word."""

    def __init__(self, start: int, step: int):
        self.multiplier, self.step = start, step

    def __call__(self, word: int) -> int:
        word ^= self.multiplier
        self.multiplier = self.multiplier * self.step & MASK
        word = word * self.multiplier & MASK
        return word ^ word >> 16


def _words(value: int) -> list[int]:
    """A non-negative integer as 32-bit words, the lowest first; 0 is one word."""
    words = [value & MASK]
    while value := value >> 32:
        words.append(value & MASK)
    return words


def _philox_key(seed: int, index: int) -> tuple[int, int]:
    """The key of (seed, index): two 64-bit words, as signed integers."""
    seed_words = _words(seed)
    padding = [0] * (POOL_WORDS - len(seed_words))  # so that seed and index cannot run together
    entropy = seed_words + padding + _words(index)
    hash_word = _WordHash(HASH_START, HASH_STEP)
    pool = [hash_word(word) for word in entropy[:POOL_WORDS]]

    def mix(target: int, word: int) -> None:
        mixed = (MIX_LEFT * pool[target] - MIX_RIGHT * hash_word(word)) & MASK
        pool[target] = mixed ^ mixed >> 16

    for source in range(POOL_WORDS):
        for target in range(POOL_WORDS):
            if source != target:
                mix(target, pool[source])
    for word in entropy[POOL_WORDS:]:
        for target in range(POOL_WORDS):
            mix(target, word)
    hash_state = _WordHash(STATE_START, STATE_STEP)
    state = [hash_state(word) for word in pool]
    return _signed(state[0] | state[1] << 32), _signed(state[2] | state[3] << 32)


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits, which tensors can hold."""
    return word - 2**64 if word >= 2**63 else word


def _high_product(words: Tensor, multiplier: int) -> Tensor:
    """The upper 64 bits of unsigned products 64 x 64 bits, from products of their halves.

    int64 arithmetic wraps, so its bits are those of unsigned numbers; only shifts need a mask.
    """
    low, high = words & MASK, (words >> 32) & MASK
    m_low, m_high = multiplier & MASK, multiplier >> 32
    crossed, other = low * m_high, high * m_low
    carried = ((low * m_low >> 32) & MASK) + (crossed & MASK) + (other & MASK)
    return high * m_high + ((crossed >> 32) & MASK) + ((other >> 32) & MASK) + (carried >> 32)


def _philox(keys: Tensor, blocks: int) -> Tensor:
    """Keys (N, 2) -> the words of counts 1 … blocks: (N, 4 · blocks), int64."""
    zeros = torch.zeros(len(keys), blocks, dtype=torch.int64)
    a, b, c, d = zeros + torch.arange(1, blocks + 1), zeros, zeros, zeros
    key_0, key_1 = keys[:, :1], keys[:, 1:]
    m_0, m_1 = PHILOX_MULTIPLIERS
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _high_product(a, m_0), a * _signed(m_0)
        high_c, low_c = _high_product(c, m_1), c * _signed(m_1)
        a, b, c, d = high_c ^ b ^ key_0, low_c, high_a ^ d ^ key_1, low_a
        key_0, key_1 = key_0 + _signed(PHILOX_STEPS[0]), key_1 + _signed(PHILOX_STEPS[1])
    return torch.stack([a, b, c, d], -1).flatten(1)
