"""Draw the curves of one or several runs: `python -m training.plot RUN_DIR… [--output FILE.png]`."""

import argparse
import json
from pathlib import Path

from runtime.errors import InputError
from runtime.program import run
from training.log import step_of


def read_records(folder: Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl; a line that a kill cut short is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"no metrics.jsonl in {folder}: pass the output_dir of a training run")
    return [json.loads(line) for line in path.read_text().splitlines() if step_of(line) < 1e18]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="output_dir of a run")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="(curves.png)")
    args = parser.parse_args(argv)
    runs = {str(folder): read_records(folder) for folder in args.runs}
    try:
        from matplotlib.figure import Figure  # draws without a display
    except ImportError as e:
        raise InputError("plots need matplotlib: pip install matplotlib") from e

    # One panel per quantity; validation is drawn into the panel of its training counterpart.
    names = {name for records in runs.values() for record in records for name in record}
    panels = sorted({name.removeprefix("val/") for name in names - {"step"}})
    if not panels:
        raise InputError(f"no records yet in {', '.join(runs)}")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        for number, records in enumerate(runs.values()):
            for name, style in ((panel, "-"), (f"val/{panel}", "--o")):
                points = [(r["step"], r[name]) for r in records if name in r]
                if points:
                    axis.plot(*zip(*points), style, color=f"C{number}", markersize=3)
        axis.set_title(panel)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    handles = [axes[0].plot([], [], "-", color=f"C{i}")[0] for i in range(len(runs))]
    dashed = axes[0].plot([], [], "--o", color="gray", markersize=3)[0]
    figure.legend([*handles, dashed], [*runs, "validation"], loc="outside upper center")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
