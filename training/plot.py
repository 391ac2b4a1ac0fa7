"""Draw the curves of one or several runs: `python -m training.plot RUN_DIR… [--reference FILE]`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import Parser, as_path, new_file
from runtime.errors import InputError
from runtime.files import whole_file
from runtime.program import run
from training.log import Records, read_records

if TYPE_CHECKING:  # not needed by anything but plots
    from matplotlib.figure import Figure


FORMATS = (".png", ".pdf", ".svg", ".jpg")


def run_records(folder: Path) -> Records:
    """The records of a run. Raises InputError if its folder has none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"no metrics.jsonl in {folder}: pass the output_dir of a training run")
    return read_records(path)


def curve(records: Records, name: str) -> dict[float, float]:
    """Step -> value of one quantity."""
    return {record["step"]: record[name] for record in records if name in record}


def main(argv: list[str]) -> None:
    parser = Parser(description="Draw the curves of one or several runs.")
    add, file = parser.add_argument, "quickstart/reference/NAME.jsonl"
    add("runs", nargs="+", type=as_path, help="output_dir of a run")
    add("--reference", type=as_path, help=f"draw over the curves and ranges of this file ({file})")
    shown = "file to draw (curves.png)"
    add("--output", type=new_file(*FORMATS), default="curves.png", help=shown)
    args = parser.parse_args(argv)
    runs = {str(folder): run_records(folder) for folder in args.runs}
    reference = None if args.reference is None else read_records(args.reference)
    if reference == []:
        raise InputError(
            f"{args.reference} is missing or holds no records: pass a file of quickstart/reference"
        )
    try:
        figure = plot_curves(runs, reference)
    except ImportError as e:
        raise InputError("plots need matplotlib: pip install matplotlib") from e
    with whole_file(args.output) as partial:
        figure.savefig(partial, dpi=110, format=Path(args.output).suffix[1:])
    print(f"wrote {args.output}")


def plot_curves(runs: dict[str, Records], reference: Records | None = None) -> "Figure":
    """One panel per quantity, with training and validation curves. Raises InputError if there is none."""
    from matplotlib.figure import Figure  # draws without a display

    names = {name for records in runs.values() for record in records for name in record}
    panels = sorted({name.removeprefix("val/") for name in names - {"step"}})
    if not panels:
        raise InputError(f"no records yet in {', '.join(runs)}")
    # By label, the reference behind the runs.
    shown: dict[str, tuple[Records, Any]] = {}
    if reference is not None:
        shown["the reference"] = reference, (0, 0, 0, 0.4)
    shown |= {run: (records, f"C{i}") for i, (run, records) in enumerate(runs.items())}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        for name, style in ((panel, "-"), (f"val/{panel}", "--o")):
            for records, colour in shown.values():
                draw(axis, records, name, style, colour)
        axis.set_title(panel)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    handles = [axes[0].plot([], [], "-", color=colour)[0] for _, colour in shown.values()]
    handles += axes[0].plot([], [], "--o", color="gray", markersize=3)
    figure.legend(handles, [*shown, "validation"], loc="outside upper center")
    return figure


def draw(axis: Any, records: Records, name: str, style: str, colour: Any) -> None:
    """The curve of one quantity and, if known, as of a reference, the range of its seeds."""
    points = curve(records, name)
    axis.plot(list(points), list(points.values()), style, color=colour, markersize=3)
    low, high = curve(records, f"low/{name}"), curve(records, f"high/{name}")
    if low:
        band = (list(low), list(low.values()), list(high.values()))
        axis.fill_between(*band, color="black", alpha=0.1)


if __name__ == "__main__":
    run(main)
