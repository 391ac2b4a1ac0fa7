"""Results for readers: a set's figures on screen, and several results in one table.

    python -m evaluation.report A.json B.json …

A file holds one result of `evaluate.py` or of the sweep: the JSON alone, or all that the program
printed. Results of different protocols are not put into one table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from runtime.errors import InputError
from runtime.program import run

# Why a metric is None, by its name.
UNKNOWN = {
    "sFID": "the reference holds no spatial statistics",
    "precision": "the reference holds no images",
    "recall": "the reference holds no images",
}


def print_result(result: dict[str, Any]) -> None:
    """Warnings, a table and, as the last line, JSON; nothing for the empty result of other ranks."""
    if not result:
        return
    for warning in result["warnings"]:
        tqdm.write(f"warning: {warning}")
    samples, reference = result["samples"], result["reference"]
    rows = [
        ("samples", describe_set(samples)),
        ("reference", describe_set(reference)),
        *((name, format_metric(name, value)) for name, value in result["metrics"].items()),
    ]
    if result["partial"]:
        rows.insert(0, ("PARTIAL", f"{samples['images']} of {result['images_asked']} images"))
    width = max(len(name) for name, _ in rows)
    tqdm.write("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    tqdm.write(json.dumps(result, ensure_ascii=False))


def describe_set(summary: dict[str, Any]) -> str:
    count = f"{summary['images']} images" if summary["images"] else "statistics"
    return f"{summary['path']}: {count}, {summary['hash']}"


def format_metric(name: str, value: Optional[float]) -> str:
    return f"not known: {UNKNOWN[name]}" if value is None else f"{value:.4f}"


# ---------------------------------------------------------------------- several results
def read_result(path: Path) -> dict[str, Any]:
    """The result in a file: its whole content, or its last line."""
    try:
        text = path.read_text().strip()
        try:
            result = json.loads(text)
        except ValueError:
            result = json.loads(text.splitlines()[-1])
        if not isinstance(result["metrics"], dict) or not isinstance(result["samples"], dict):
            raise TypeError("no metrics")
    except FileNotFoundError as e:
        raise InputError(f"no file {path}: save the output of evaluate.py there") from e
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise InputError(f"{path} is not a result of evaluate.py: save its last line again") from e
    if not isinstance(result.get("protocol"), dict):
        raise InputError(f"{path} names no protocol (an earlier version wrote it): evaluate again")
    return result


def check_protocols(results: dict[Path, dict[str, Any]]) -> None:
    """Refuse results that were not measured the same way, naming what differs."""
    (first, reference), *others = results.items()
    for path, result in others:
        ours, theirs = reference["protocol"], result["protocol"]
        differences = [
            f"{key} ({ours.get(key)} in {first}, {theirs.get(key)} in {path})"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if differences:
            raise InputError(
                f"the results are not comparable, their protocols differ: "
                f"{', '.join(differences)}; evaluate them the same way, or report them apart"
            )


def results_table(results: dict[Path, dict[str, Any]]) -> str:
    """One row per file and one column per metric; a dash is a metric that a result lacks."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["metrics"]))
    lines = [["", *names]]
    for path, result in results.items():
        values = (result["metrics"].get(name) for name in names)
        lines.append([str(path), *("-" if v is None else f"{v:.4f}" for v in values)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
    rows = ["  ".join(f"{text:>{w}}" for text, w in zip(line, widths)).rstrip() for line in lines]
    (first, *_) = results.values()
    terms = ", ".join(f"{key} {value}" for key, value in first["protocol"].items())
    return "\n".join([f"protocol: {terms}", *rows])


def main(argv: list[str]) -> None:
    description = "Results of evaluate.py in one table."
    parser = argparse.ArgumentParser(prog="python -m evaluation.report", description=description)
    parser.add_argument("files", nargs="+", type=Path, help="results of one protocol, as JSON")
    args = parser.parse_args(argv)
    results = {path: read_result(path) for path in args.files}
    check_protocols(results)
    print(results_table(results))


if __name__ == "__main__":
    run(main, sys.argv[1:])
