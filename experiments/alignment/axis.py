"""Does the effect grow where a code is too small for its patch? `python -m experiments.alignment.axis OUTPUT`.

Gathers the pairs bidirectional/causal of every variation of OUTPUT by their place on the axis, the base-2 logarithm of (bits that
a patch needs for 30 dB) / (bits of a code), and fits a line to the effect over the place. Writes OUTPUT/axis.json, axis.md and
axis.png. `--known axis.json` adds the pairs of an earlier call; without a finished pair in OUTPUT, they are all.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from configs.load import load_sizes
from experiments.alignment.charts import draw
from experiments.alignment.needed_bits import IMAGES, flat_psnr, needed_bits, patches
from experiments.alignment.photo_score import crops
from experiments.alignment.results import Result, collect
from experiments.alignment.rows import DATA, GUIDANCE, STAGE1, Overrides, varied
from experiments.alignment.table import line_of, variations_of
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.program import run

PLATEAU = 1.0  # dB below patches of one colour: a pair with such a run is left out
# A figure of a run -> the effect's title, and how it compares the causal row with the bidirectional one.
EFFECTS = {
    "fid_decoded": (
        "primary: distance of generated crops to reconstructions, ln of the ratio",
        "ratio",
    ),
    "top1": ("top-1, ln of the ratio", "ratio"),
    "nats": ("nats per code, difference", "difference"),
    "changed": ("codes of kept rows that change, difference in points", "points"),
}
# What digits.md says of the digits' two places: bits needed over those of a code, and effects. Their distance is another
# measure, and no test uses them.
DIGITS: list[tuple[float, dict[str, float]]] = [
    (10.4 / 8, {"nats": 0.071, "top1": math.log(38.0 / 40.9)}),  # 4x4, seeds 42 to 44
    (20.7 / 8, {"nats": -0.069, "changed": 6.1}),  # 8x8, five seeds
]


@dataclass(frozen=True)
class Pair:
    """Both rows of one seed at one place."""

    image_size: int
    patch_size: int
    codebook_size: int
    seed: int
    needed: float  # bits of a patch of the training crops for 30 dB
    flat: float  # PSNR in dB of the validation crops, of patches of one colour
    before: dict[str, float]  # figures of the bidirectional row
    after: dict[str, float]  # of the causal one

    @property
    def place(self) -> float:
        return math.log2(self.needed / math.log2(self.codebook_size))

    @property
    def on_plateau(self) -> bool:
        return min(self.before["psnr"], self.after["psnr"]) < self.flat - PLATEAU

    def effect(self, name: str) -> float:
        before, after, kind = self.before[name], self.after[name], EFFECTS[name][1]
        if kind == "ratio":
            return math.log(after / before)
        return (100 if kind == "points" else 1) * (after - before)


@cache
def patch_figures(data: Path, image: int, patch: int, codes: int) -> tuple[float, float]:
    """Bits that a patch of the training crops needs, and the PSNR of the validation crops' flat patches."""
    trained, held_out = (crops(data / split, image, IMAGES) for split in ("train", "val"))
    needed = needed_bits(patches(trained, patch))
    return needed, flat_psnr(patches(held_out, patch), codes, len(held_out))


def pairs_of(output: Path) -> list[Pair]:
    """The finished pairs of all variations."""
    found = []
    for variation in variations_of(output):
        overrides = varied(variation)[0] if variation else Overrides()
        if overrides.data not in DATA:
            continue
        sizes = load_sizes(STAGE1, **overrides.sizes).model.vq_model
        rows: dict[int, dict[str, Result]] = {}
        for result in collect(output, variation):
            rows.setdefault(result.seed, {})[result.row.name] = result
        for seed, runs in rows.items():
            if not {"bidirectional", "causal"} <= runs.keys():
                continue
            place = sizes.image_size, sizes.patch_size, sizes.codebook_size
            needed, flat = patch_figures(output / "data" / overrides.data, *place)
            before, after = runs["bidirectional"].figures, runs["causal"].figures
            if not before.keys() & after.keys() >= EFFECTS.keys():
                continue  # of other data, or not looked into yet
            found.append(Pair(*place, seed, needed, flat, before, after))
    return found


def known_pairs(file: Path) -> list[Pair]:
    """The pairs of an axis.json. Raises InputError if it is none."""
    try:
        return [Pair(**pair) for pair in json.loads(file.read_text())["pairs"]]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise InputError(
            f"--known {file}: pass an axis.json of experiments.alignment.axis ({e})"
        ) from e


def joined(found: list[Pair], known: list[Pair]) -> list[Pair]:
    """Both, in the order of the axis. Raises InputError for a pair that is in both, and if there is none."""

    def name(pair: Pair) -> tuple[int, int, int, int]:
        return pair.image_size, pair.patch_size, pair.codebook_size, pair.seed

    if twice := set(map(name, found)) & set(map(name, known)):
        size, patch, codes, seed = twice.pop()
        raise InputError(
            f"--known has {size} px, {patch}x{patch}, {codes} codes, seed {seed} too: drop it there"
        )
    if not (found or known):
        raise InputError("no finished pair: run experiments.alignment.ablation first")
    return sorted([*found, *known], key=lambda pair: (pair.place, pair.seed))


def bits_at_equal_psnr(pairs: list[Pair]) -> tuple[float, float, float]:
    """Bits per image that the causal row needs more at equal PSNR, and their 95 % interval.

    Least squares over all runs of: bits per image, by the generator of the row, as a line over PSNR per patch size, and
    a constant for the causal row. Raises InputError if the runs are too few for it.
    """
    patches_of = sorted({pair.patch_size for pair in pairs})
    runs = [
        (p.patch_size, row, figures)
        for p in pairs
        for row, figures in enumerate((p.before, p.after))
    ]
    lines = [
        [
            value
            for size in patches_of
            for value in (patch == size, (patch == size) * figures["psnr"])
        ]
        for patch, _, figures in runs
    ]
    design = np.array([[*line, row] for line, (_, row, _) in zip(lines, runs)], np.float64)
    bits = np.array([figures["bits"] for *_, figures in runs])
    free = len(runs) - design.shape[1]
    if free < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise InputError(
            f"{len(pairs)} pairs: a line per patch needs at least two codebooks of each"
        )
    found, residuals, *_ = np.linalg.lstsq(design, bits)
    variance = float(residuals[0]) / free * np.linalg.inv(design.T @ design)[-1, -1]
    half = float(stats.t.ppf(0.975, free)) * math.sqrt(variance)
    return float(found[-1]), float(found[-1]) - half, float(found[-1]) + half


@dataclass(frozen=True)
class Trend:
    """The line through the effects of all pairs, and their mean."""

    pairs: int
    slope: float  # per doubling of the ratio of bits
    slope_low: float  # the 95 % interval
    slope_high: float
    slope_p: float
    intercept: float
    mean: float
    mean_low: float
    mean_high: float
    mean_p: float


def trend(places: list[float], effects: list[float]) -> Trend:
    """Raises InputError for fewer than three pairs."""
    if len(places) < 3:
        raise InputError(f"{len(places)} pairs: a line with its error needs three")
    line: Any = stats.linregress(places, effects)
    half = float(line.stderr * stats.t.ppf(0.975, len(places) - 2))
    test: Any = stats.ttest_1samp(effects, 0)
    interval = test.confidence_interval(0.95)
    return Trend(
        len(places), line.slope, line.slope - half, line.slope + half, line.pvalue, line.intercept,
        float(np.mean(effects)), float(interval.low), float(interval.high), float(test.pvalue),
    )  # fmt: skip


def table(pairs: list[Pair]) -> str:
    """Markdown: a line per pair, bidirectional → causal."""
    heads = ["image, patch", "codes", "bits needed / of a code", "PSNR, dB (one colour)", "entropy, bits",
             "distance to reconstructions", "best scale", "top-1, %", "nats per code", "codes that change, %"]  # fmt: skip
    lines = [line_of(heads), line_of(["---"] * len(heads))]
    for pair in pairs:
        a, b = pair.before, pair.after
        left_out = ", left out" if pair.on_plateau else ""
        lines.append(line_of([
            f"{pair.image_size}, {pair.patch_size}×{pair.patch_size}", str(pair.codebook_size),
            f"{2**pair.place:.1f}", f"{a['psnr']:.2f} → {b['psnr']:.2f} ({pair.flat:.1f}{left_out})",
            f"{a['entropy']:.2f} → {b['entropy']:.2f}", f"{a['fid_decoded']:.0f} → {b['fid_decoded']:.0f}",
            f"{best_scale(a)} → {best_scale(b)}", f"{100 * a['top1']:.1f} → {100 * b['top1']:.1f}",
            f"{a['nats']:.2f} → {b['nats']:.2f}", f"{100 * a['changed']:.1f} → {100 * b['changed']:.1f}",
        ]))  # fmt: skip
    return "\n".join(lines)


def best_scale(figures: dict[str, float]) -> str:
    """The scale of guidance whose images are closest to the reconstructions."""
    return min(GUIDANCE, key=lambda scale: figures[f"fid_decoded_{scale}"])


def trend_table(trends: dict[str, Trend]) -> str:
    lines = [line_of(["effect", "slope per doubling", "p", "mean", "p"]), line_of(["---"] * 5)]
    for name, of in trends.items():
        lines.append(line_of([
            EFFECTS[name][0], f"{of.slope:+.3f} ({of.slope_low:+.3f} to {of.slope_high:+.3f})",
            f"{of.slope_p:.2f}", f"{of.mean:+.3f} ({of.mean_low:+.3f} to {of.mean_high:+.3f})", f"{of.mean_p:.2f}",
        ]))  # fmt: skip
    return "\n".join(lines)


def panels(figure: Any, pairs: list[Pair], trends: dict[str, Trend]) -> None:
    """A panel per effect: a point per pair, by patch and codebook, the line, and the digits beside it."""
    colours = {patch: f"C{n}" for n, patch in enumerate(sorted({p.patch_size for p in pairs}))}
    marks = dict(zip(sorted({pair.codebook_size for pair in pairs}), "osD^v"))
    for axis, (name, of) in zip(figure.subplots(2, 2, sharex=True).flat, trends.items()):
        for pair in pairs:
            axis.plot(
                pair.place, pair.effect(name), marks[pair.codebook_size], color=colours[pair.patch_size],
                label=f"{pair.patch_size}×{pair.patch_size}, {pair.codebook_size} codes",
            )  # fmt: skip
        for ratio, effects in DIGITS:
            if name in effects:
                axis.plot(
                    math.log2(ratio), effects[name], "*", color="grey", markerfacecolor="none",
                    label="digits, 256 codes, not in the line",
                )  # fmt: skip
        ends = [min(pair.place for pair in pairs), max(pair.place for pair in pairs)]
        axis.plot(ends, [of.intercept + of.slope * end for end in ends], color="grey")
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_title(EFFECTS[name][0], fontsize=9)
        axis.grid(alpha=0.3)
    for axis in figure.axes[2:]:  # below
        axis.set_xlabel("log₂ (bits that a patch needs / bits of a code)")
    shown = [axis.get_legend_handles_labels() for axis in figure.axes]
    labels = {label: mark for marks, names in shown for mark, label in zip(marks, names)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5, fontsize=8)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.alignment.axis",
                    description="Fit the effect over the axis by codebook and patch.")  # fmt: skip
    parser.add_argument("output", type=as_path, help="the --output of the study")
    parser.add_argument("--known", type=as_path, metavar="FILE",
                        help="axis.json with pairs that were run elsewhere")  # fmt: skip
    args = parser.parse_args(argv)
    output = args.output
    pairs = joined(pairs_of(output), known_pairs(args.known) if args.known else [])
    kept = [pair for pair in pairs if not pair.on_plateau]
    places = [pair.place for pair in kept]
    trends = {name: trend(places, [pair.effect(name) for pair in kept]) for name in EFFECTS}
    text = f"{table(pairs)}\n\n{trend_table(trends)}\n\nbits per image of the causal row at equal PSNR: "
    content: dict[str, Any] = {
        "pairs": [asdict(pair) for pair in pairs],
        "trends": {name: asdict(of) for name, of in trends.items()},
    }
    try:
        more, low, high = bits_at_equal_psnr(kept)
        content["bits at equal PSNR"] = {"mean": more, "low": low, "high": high}
        text += f"{more:+.1f} ({low:+.1f} to {high:+.1f})\n"
    except InputError as e:
        text += f"not computed ({e})\n"
    write_whole(output / "axis.json", json.dumps(content, indent=1).encode())
    write_whole(output / "axis.md", text.encode())
    draw(output / "axis.png", lambda figure: panels(figure, kept, trends), (11, 8.5))
    print(text)


if __name__ == "__main__":
    run(main)
