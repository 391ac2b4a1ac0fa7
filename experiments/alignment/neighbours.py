"""How well neighbouring codes predict a code, by tables of counts.

A table knows, for every context, how often each code followed it in one set of images, and pays
-log2 p for the codes of other images. So its bits per code are, on average, *above* the entropy of a code
given that context, and the more so the more contexts there are to learn: the dependence that a table shows, bits
without context less bits with it, is understated. (Entropies of the counts themselves would err the
other way: with 256 codes, two neighbours make 65,536 contexts, more than there are codes to count, and
even independent codes would look predictable.)

Shape suffixes: N images, K prefix tokens, g grid, T = K + g² codes; V codes in the codebook.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.tokenizer import TokenizerConfig

FOLDS = 10  # of the images, where no others are there to count
# Context -> what is known, from the coarsest; a table falls back on the one before it.
CONTEXTS = {
    "nothing": ("nothing",),
    "position": ("nothing", "position"),
    "left": ("nothing", "left"),
    "above": ("nothing", "above"),
    "left and above": ("nothing", "left", "left and above"),
}


def neighbours(config: TokenizerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the left and of the upper neighbour of every code, (T,) each; -1: there is none.

    The prefix is the row above the first: its last g codes lie above the g columns. Without prefix the
    first row has nothing above it.
    """
    grid, prefix, tokens = config.grid, config.num_prefix_tokens, config.num_tokens
    position = np.arange(tokens)
    first = (position == 0) | ((position >= prefix) & ((position - prefix) % grid == 0))
    left = np.where(first, -1, position - 1)
    start = prefix + grid if prefix < grid else prefix  # of the codes with something above them
    above = np.where(position < start, -1, position - grid)
    return left, above


def contexts(codes: np.ndarray, config: TokenizerConfig) -> dict[str, np.ndarray]:
    """Every context of codes (N, T) as one number per code: (N, T), int64."""
    left, above = neighbours(config)
    outside = np.full((len(codes), 1), config.codebook_size)
    padded = np.concatenate([codes, outside], 1)  # -1 indexes the last column
    return {
        "nothing": np.zeros_like(codes),
        "position": np.broadcast_to(np.arange(codes.shape[1]), codes.shape),
        "left": padded[:, left],
        "above": padded[:, above],
        "left and above": padded[:, left] * (config.codebook_size + 1) + padded[:, above],
    }


@dataclass
class Table:
    """Counts of codes after contexts. Arrays of one line per context, or per (context, code)."""

    codes: int  # V
    contexts: np.ndarray  # sorted
    totals: np.ndarray  # codes counted after the context
    distinct: np.ndarray  # different ones among them
    favourites: np.ndarray  # the most frequent
    pairs: np.ndarray  # context·V + code, sorted
    counts: np.ndarray

    @classmethod
    def of(cls, context: np.ndarray, codes: np.ndarray, size: int) -> "Table":
        """Count codes of any shape after contexts of the same shape."""
        pairs, counts = np.unique(context * size + codes, return_counts=True)
        owners = pairs // size
        found, start = np.unique(owners, return_index=True)
        distinct = np.diff(np.append(start, len(pairs)))
        by_count = np.lexsort((counts, owners))  # of every context, the most frequent last
        favourites = pairs[by_count[start + distinct - 1]] % size
        return cls(size, found, np.add.reduceat(counts, start), distinct, favourites, pairs, counts)

    def predict(
        self, context: np.ndarray, codes: np.ndarray, chance: np.ndarray, guess: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of codes and the code guessed, after these contexts; all of one shape.

        `chance` and `guess` are those of a coarser context. With n codes counted after the context, d
        different ones, c of them this one: p = (c + d·chance) / (n + d) (Witten & Bell 1991, method C).
        A context that was never counted leaves both as they are.
        """
        at, known = find(self.contexts, context)
        pair, counted = find(self.pairs, context * self.codes + codes)
        c, d, n = np.where(counted, self.counts[pair], 0), self.distinct[at], self.totals[at]
        finer = (c + d * chance) / (n + d)
        return np.where(known, finer, chance), np.where(known, self.favourites[at], guess)


def find(within: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of values in a sorted array, and whether they are there (else the index means nothing)."""
    index = np.searchsorted(within, values).clip(max=len(within) - 1)
    return index, within[index] == values


def predict(
    counted: np.ndarray, codes: np.ndarray, config: TokenizerConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bits of every code and whether it was guessed, by context; `counted` (N', T), codes (N, T).

    Both arrays are (N, T). The coarsest table falls back on the uniform distribution over V codes.
    """
    size = config.codebook_size
    known, asked = contexts(counted, config), contexts(codes, config)
    tables = {name: Table.of(context, counted, size) for name, context in known.items()}
    found = {}
    for name, chain in CONTEXTS.items():
        chance, guess = np.full(codes.shape, 1 / size), np.zeros_like(codes)
        for step in chain:
            chance, guess = tables[step].predict(asked[step], codes, chance, guess)
        found[name] = (-np.log2(chance), guess == codes)
    return found


def code_dependence(
    codes: np.ndarray, config: TokenizerConfig, counted: np.ndarray | None = None
) -> dict[str, Any]:
    """Bits per code and share guessed by every context of CONTEXTS, of codes (N, T).

    The tables count `counted` (N', T), codes of other images; by default each tenth of the images is
    predicted from the other nine. `bits_by_row` has the prefix codes first, where there are any.
    """
    if counted is not None:
        found = predict(counted, codes, config)
    else:
        folds = min(FOLDS, len(codes))
        parts = []
        for fold in range(folds):
            here = np.arange(len(codes)) % folds == fold
            parts.append(predict(codes[~here], codes[here], config))
        found = {
            name: tuple(np.concatenate([part[name][kind] for part in parts]) for kind in (0, 1))
            for name in CONTEXTS
        }
    prefix, grid = config.num_prefix_tokens, config.grid
    starts = sorted({0, *range(prefix, config.num_tokens, grid)})
    ends = [*starts[1:], config.num_tokens]
    return {
        "bits": {name: float(bits.mean()) for name, (bits, _) in found.items()},
        "bits_per_image": {name: float(bits.sum(1).mean()) for name, (bits, _) in found.items()},
        "top1": {name: float(hits.mean()) for name, (_, hits) in found.items()},
        "bits_by_row": {
            name: [float(bits[:, start:end].mean()) for start, end in zip(starts, ends)]
            for name, (bits, _) in found.items()
        },
    }
