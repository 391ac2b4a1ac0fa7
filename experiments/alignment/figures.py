"""The figures of `inside.py`: a panel per row of the study, and one in which all rows are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from experiments.alignment.dependence import cut_lengths, earlier_changes, psnr
from experiments.alignment.neighbours import CONTEXTS
from modeling.tokenizer import TokenizerConfig

if TYPE_CHECKING:  # drawing alone needs it
    from matplotlib.figure import Figure

    from experiments.alignment.inside import Measures

STYLES = ("-", "--", ":")
SMALLEST_CHANGE = 1e-4  # of the colour scale: a fortieth of a grey level


def panels(count: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of `count` panels, at most three beside each other; sizes in inches per panel."""
    from matplotlib.figure import Figure  # draws without a display

    columns = min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes


def mark_codes(axis: Any, config: TokenizerConfig) -> None:
    """Lines between the prefix and the rows of codes, and the label of a horizontal axis of codes."""
    for position in range(config.num_prefix_tokens, config.num_tokens, config.grid):
        axis.axvline(position - 0.5, color="black", linewidth=0.4, alpha=0.5)
    axis.set_xlabel("code")


def encoder(measures: list[Measures]) -> Figure:
    """Which codes change when every row below one is replaced, by those of another image."""
    figure, axes = panels(len(measures) + 1, 5, 3.4)
    for number, (axis, of) in enumerate(zip(axes, measures)):
        changes, config = of.masked["another image"], of.tokenizer.config
        image = axis.imshow(changes.numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(f"{of.row.name}: share of codes changed")
        axis.set_ylabel("last row kept")
        axis.set_yticks(range(config.grid - 1), range(1, config.grid))
        mark_codes(axis, config)
        figure.colorbar(image, ax=axis)
        for (fill, changed), style in zip(of.masked.items(), STYLES):
            earlier = earlier_changes(changed, config)["earlier"].numpy()
            kept = range(1, config.grid)
            axes[len(measures)].plot(
                kept, earlier, style, color=f"C{number}", label=f"{of.row.name}, {fill}"
            )
    finish(axes[len(measures)], "codes of kept rows that change", "last row kept")
    return figure


def cut(measures: list[Measures]) -> Figure:
    """PSNR by image row from the first n codes, and of the whole image over n."""
    figure, axes = panels(len(measures) + 1, 5, 3.4)
    for number, (axis, of) in enumerate(zip(axes, measures)):
        config, lengths = of.tokenizer.config, cut_lengths(of.tokenizer.config)
        image = axis.imshow(psnr(of.errors).numpy(), aspect="auto", interpolation="nearest")
        axis.set_title(f"{of.row.name}: PSNR (dB)")
        axis.set_xlabel("image row")
        axis.set_xticks(range(config.grid), range(1, config.grid + 1))
        axis.set_ylabel("first codes known")
        axis.set_yticks(range(len(lengths)), lengths)
        figure.colorbar(image, ax=axis)
        whole = psnr(of.errors.mean(1)).numpy()
        axes[len(measures)].plot(lengths, whole, "o-", color=f"C{number}", label=of.row.name)
    finish(axes[len(measures)], "PSNR of the image (dB)", "first codes known")
    return figure


def decoder(measures: list[Measures]) -> Figure:
    """How much every image row changes when a code is replaced; white: less than the scale shows,
    or a code that all images share."""
    from matplotlib.colors import LogNorm

    figure, axes = panels(len(measures), 6, 3.4)
    largest = max(of.replaced.nan_to_num().max().item() for of in measures)
    norm = LogNorm(SMALLEST_CHANGE, max(largest, 2 * SMALLEST_CHANGE))
    for axis, of in zip(axes, measures):
        config = of.tokenizer.config
        seen = torch.where(of.replaced < SMALLEST_CHANGE, torch.nan, of.replaced)
        image = axis.imshow(seen.numpy(), norm=norm, aspect="auto", interpolation="nearest")
        axis.set_title(f"{of.row.name}: RMS change")
        axis.set_ylabel("image row")
        axis.set_yticks(range(config.grid), range(1, config.grid + 1))
        mark_codes(axis, config)
        figure.colorbar(image, ax=axis)
    return figure


def neighbours(measures: list[Measures]) -> Figure:
    """Bits per code given each context, and given all codes before it by the generator."""
    figure, axes = panels(2, 6, 4)
    width = 0.8 / len(measures)
    for number, of in enumerate(measures):
        bits, top1 = (dict(of.neighbours[kind]) for kind in ("bits", "top1"))
        if of.likelihood is not None:
            figures = of.likelihood.figures()
            bits["generator"], top1["generator"] = figures["bits"], figures["top1"]
        for axis, values in ((axes[0], bits), (axes[1], top1)):
            places = [place + number * width for place in range(len(values))]
            axis.bar(places, list(values.values()), width, color=f"C{number}", label=of.row.name)
    generators = any(of.likelihood is not None for of in measures)
    names = [*CONTEXTS, *["generator"] * generators]
    for axis, title in ((axes[0], "bits per code"), (axes[1], "top-1 accuracy")):
        places = [place + 0.4 - width / 2 for place in range(len(names))]
        axis.set_xticks(places, names, rotation=20)
        finish(axis, title, "known of the other codes")
    return figure


def finish(axis: Any, title: str, label: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
