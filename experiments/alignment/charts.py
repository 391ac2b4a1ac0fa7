"""The study's figures: rows seed by seed, training curves, effects of the variations. They need matplotlib."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.alignment.results import Group, Metric, differences, metrics_of
from runtime.errors import InputError
from runtime.files import whole_file
from training.plot import curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = (  # part of a run, quantity, title
    ("stage1", "val/psnr", "stage 1: PSNR of validation images, dB"),
    ("generator", "loss", "generator: training loss, nats per code"),
    ("generator", "val/loss", "generator: validation loss, nats per code"),
)


def need_matplotlib() -> None:
    """Raise InputError if nothing can be drawn."""
    if find_spec("matplotlib") is None:
        raise InputError("the figures need matplotlib: pip install matplotlib")


def draw(path: Path, make: Callable[["Figure"], None], size: tuple[float, float]) -> None:
    """Draw one figure into a PNG. Raises InputError without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure  # draws without a display

    figure = Figure(figsize=size, layout="constrained")
    make(figure)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    print(f"wrote {path}")


# The answer at a glance: how good are generated images, how predictable the codes, and how local?
ANSWER = ("fid", "fid_decoded", "top1", "psnr", "changed", "later")


def draw_rows(groups: list[Group], root: Path) -> None:
    """rows.png: every metric by row, a line per seed; answer.png: those of ANSWER. curves.png: how the rows
    got there."""
    every = metrics_of(groups)
    for name, metrics in (("rows", every), ("answer", [m for m in every if m.name in ANSWER])):
        columns = -(-len(metrics) // 2)
        draw(
            root / f"{name}.png",
            partial(rows_panels, groups=groups, metrics=metrics),
            (4 * columns, 7),
        )
    width = 5 * len(CURVES)
    draw(root / "curves.png", lambda figure: curve_panels(figure, groups), (width, 4.5))


def rows_panels(figure: Any, groups: list[Group], metrics: list[Metric]) -> None:
    axes = figure.subplots(2, -(-len(metrics) // 2)).flatten()
    alike = len({group.variation for group in groups}) == 1  # then it needs no saying
    labels = [group.row.name if alike else group.label.replace(", ", "\n", 1) for group in groups]
    seeds = sorted({seed for group in groups for seed in group.values("nats")})
    for axis, metric in zip(axes, metrics):
        for seed in seeds:
            values = [group.values(metric.name).get(seed, float("nan")) for group in groups]
            scaled = [metric.scale * value for value in values]
            axis.plot(
                range(len(groups)), scaled, "o-", markersize=4, linewidth=0.6, label=f"seed {seed}"
            )
        axis.set_xticks(range(len(groups)), labels, rotation=30, ha="right", fontsize=8)
        axis.set_title(metric.title)
        axis.grid(alpha=0.3)
    for axis in axes[len(metrics) :]:
        axis.axis("off")
    axes[0].legend(fontsize=8)


def curve_panels(figure: Any, groups: list[Group]) -> None:
    """A colour per row that was trained, a thin line per seed."""
    trained = [group for group in groups if not group.row.run]
    for axis, (part, quantity, title) in zip(figure.subplots(1, len(CURVES)), CURVES):
        for number, group in enumerate(trained):
            for index, result in enumerate(group.results):
                points = curve(result.records(part), quantity)
                label = group.title if index == 0 else None
                axis.plot(
                    list(points),
                    list(points.values()),
                    color=f"C{number}",
                    linewidth=0.8,
                    label=label,
                )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )


def draw_variations(pairs: list[tuple[Group, Group]], output: Path) -> None:
    """variations.png: the difference of two neighbouring rows under every variation, with its interval."""
    height = 1.5 + 0.3 * len(pairs)
    width = 3 * len(metrics_of([group for pair in pairs for group in pair])) + 3
    draw(output / "variations.png", lambda figure: variation_panels(figure, pairs), (width, height))


def variation_panels(figure: Any, pairs: list[tuple[Group, Group]]) -> None:
    labels = [f"{a.row.name} → {b.row.name}, {a.variation or 'ablation'}" for a, b in pairs]
    metrics = metrics_of([group for pair in pairs for group in pair])
    axes = figure.subplots(1, len(metrics), sharey=True)
    found = [{d.metric: d for d in differences(a, b)} for a, b in pairs]
    for axis, metric in zip(axes, metrics):
        for place, changes in enumerate(found):
            d = changes[metric.name]
            if d.low is not None and d.high is not None:
                axis.plot([metric.scale * d.low, metric.scale * d.high], [place, place], "C0-")
            axis.plot([metric.scale * d.mean], [place], "C0o")
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(f"Δ {metric.title}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(pairs)), labels, fontsize=8)
    axes[0].invert_yaxis()
