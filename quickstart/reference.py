"""Reference curves: the quickstart's losses, smoothed, with the range that its seeds span.

    python -m quickstart.reference output/quickstart [output/quickstart_seed1 …]

writes quickstart/reference/NAME.jsonl for every run folder NAME in the first of these folders. A file has one record per
line of the run's metrics.jsonl: the step, the number of folders ("runs") and, per quantity, its smoothed value, and
under low/QUANTITY and high/QUANTITY the smallest and largest of the smoothed values of all folders. Speeds and times
are left out.
`python -m training.plot RUN_DIR --reference FILE` draws a run over such a file.
"""

import json
from pathlib import Path

from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.program import run
from training.plot import Records, curve, run_records

REFERENCE = Path(__file__).parent / "reference"  # a folder
WINDOW = 5  # records in a mean of a training quantity
DIGITS = 5
LARGEST = 50_000  # bytes of all files
# Prefixes of the names of quantities that are not learnt.
NOT_LEARNT = ("images/s", "data wait", "hours left", "mfu", "memory", "phase", "runs")


def quantities(records: Records) -> set[str]:
    """Names of what a run learns, without its speed and the number of its phase."""
    names = {name for record in records for name in record} - {"step"}
    return {name for name in names if not name.startswith(NOT_LEARNT)}


def smoothed(values: dict[float, float]) -> dict[float, float]:
    """The mean of the up to `WINDOW` records around each record."""
    steps, found = sorted(values), {}
    for i, step in enumerate(steps):
        near = steps[max(0, i - WINDOW // 2) : i + WINDOW // 2 + 1]
        found[step] = sum(values[s] for s in near) / len(near)
    return found


def smooth(records: Records) -> dict[str, dict[float, float]]:
    """Every quantity's curve, smoothed except for validation, free of batch noise, and the learning rate."""
    curves = {}
    for name in quantities(records):
        values = curve(records, name)
        curves[name] = (
            values if name.startswith("val/") or name.endswith("lr") else smoothed(values)
        )
    return curves


def reference_of(runs: list[Records]) -> Records:
    """The smoothed first run and, at each of its steps, the range of all runs.

    Raises InputError if the runs do not have the same steps.
    """
    first, *others = map(smooth, runs)
    by_step: dict[float, dict[str, float]] = {}
    for name, values in sorted(first.items()):
        for step, value in values.items():
            all_values = [value, *(curves.get(name, {}).get(step) for curves in others)]
            known = [v for v in all_values if v is not None]
            if len(known) < len(all_values):
                raise InputError(f"not all runs have {name} at step {step:g}: pass finished runs")
            record = by_step.setdefault(step, {"step": step, "runs": len(runs)})
            record[name] = shortened(value)
            if others and not name.endswith("lr"):
                record[f"low/{name}"] = shortened(min(known))
                record[f"high/{name}"] = shortened(max(known))
    return [by_step[step] for step in sorted(by_step)]


def shortened(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def outside(records: Records, reference: Records, name: str) -> list[float]:
    """Steps at which a run's smoothed quantity leaves the reference's range by more than its width.

    The range of a few seeds is too narrow for the next one, hence the margin on either side.
    """
    low, high = curve(reference, f"low/{name}"), curve(reference, f"high/{name}")
    if not low:
        raise InputError(f"the reference has no range of {name}: make it from several seeds")
    values = smooth(records).get(name, {})
    missing = [step for step in low if step not in values]
    if missing:
        raise InputError(f"the run has no {name} at step {missing[0]:g}: is it finished?")
    return [
        step
        for step in low
        if not abs(values[step] - (low[step] + high[step]) / 2) <= 1.5 * (high[step] - low[step])
    ]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m quickstart.reference", description="Make the reference curves.")
    parser.add_argument("folders", nargs="+", type=as_path, help="output of a quickstart per seed")
    parser.add_argument(
        "--output",
        type=as_path,
        default=REFERENCE,
        help="folder of the curves (quickstart/reference)",
    )
    args = parser.parse_args(argv)
    names = sorted(path.parent.name for path in args.folders[0].glob("*/metrics.jsonl"))
    if not names:
        raise InputError(f"no run folders in {args.folders[0]}: pass the output of quickstart.sh")
    files = {}
    for name in names:
        records = reference_of([run_records(folder / name) for folder in args.folders])
        files[name] = "".join(json.dumps(record) + "\n" for record in records).encode()
    size = sum(map(len, files.values()))
    if size > LARGEST:
        raise InputError(f"the references take {size} bytes, more than {LARGEST}: log less often")
    for name, content in files.items():
        path = args.output / f"{name}.jsonl"
        write_whole(path, content)
        print(f"wrote {path}: {len(content)} bytes")


if __name__ == "__main__":
    run(main)
