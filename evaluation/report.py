"""Prints results: the figures of one set, or several results in one table.

    python -m evaluation.report A.json B.json …

A file holds one result of `evaluate.py` or of the sweep: the JSON alone, or the program's whole output.
Results of different protocols are refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.parts import differing
from runtime.program import run


def show(result: dict[str, Any], *paragraphs: str) -> None:
    """Print the warnings, the paragraphs and, as the last line, JSON; nothing for an empty result."""
    if not result:
        return
    spaces = (result, *result.get("other_features", []))
    warnings = [f"warning: {warning}" for one in spaces for warning in one["warnings"]]
    tqdm.write("\n".join([*warnings, *paragraphs, json.dumps(result, ensure_ascii=False)]))


def print_result(result: dict[str, Any], *others: dict[str, Any]) -> None:
    """`show` the figures of a set of images; `others` are those in other feature spaces."""
    tables = [figures_table(one) for one in (result, *others) if one]
    show({**result, "other_features": list(others)} if result and others else result, *tables)


def figures_table(result: dict[str, Any]) -> str:
    samples, reference = result["samples"], result["reference"]
    unknown = "unknown: the reference lacks its statistics"
    rows = [
        ("samples", describe_set(samples)),
        ("reference", describe_set(reference)),
        *((name, unknown if x is None else f"{x:.4f}") for name, x in result["metrics"].items()),
    ]
    if result["partial"]:
        rows.insert(0, ("PARTIAL", f"{samples['images']} of {result['images_asked']} images"))
    return table_of(rows, align="left")


def table_of(
    rows: Sequence[Sequence[str]], headers: Sequence[str] = (), align: str = "right"
) -> str:
    """Rows of text as aligned columns, without lines around them."""
    return tabulate(rows, headers, "plain", stralign=align, disable_numparse=True)


def describe_set(summary: dict[str, Any]) -> str:
    count = f"{summary['images']} images" if summary["images"] else "statistics"
    return f"{summary['path']}: {count}, {summary['hash']}"


# ---------------------------------------------------------------------- several results
def read_result(path: Path) -> dict[str, Any]:
    """The result in a file's whole content or last line."""
    try:
        text = path.read_text().strip()
        try:
            result = json.loads(text)
        except ValueError:
            result = json.loads(text.splitlines()[-1])
        if "generator" in result:
            raise InputError(f"{path} is a generator's loss: pass scores of images")
        for one in (result, *result.get("other_features", [])):
            figures = one["metrics"].values()
            if not all(isinstance(figure, (int, float, type(None))) for figure in figures):
                raise TypeError("figures that are not numbers")
            if not (isinstance(one["protocol"], dict) and isinstance(one["samples"], dict)):
                raise TypeError("no protocol or samples")
    except FileNotFoundError as e:
        raise InputError(f"no file {path}: save the output of evaluate.py there") from e
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is not a result of evaluate.py: save its last line again") from e
    return result


Columns = dict[str, dict[Path, tuple[Any, dict[str, Any]]]]


def columns_of(results: dict[Path, dict[str, Any]]) -> Columns:
    """By metric and file, its value and its protocol."""
    columns: Columns = {}
    for path, result in results.items():
        for one in (result, *result.get("other_features", [])):
            for name, value in one["metrics"].items():
                columns.setdefault(name, {})[path] = (value, one["protocol"])
    return columns


def check_protocols(columns: Columns) -> None:
    """Refuse a column of figures with different protocols, naming the differences."""
    for cells in columns.values():
        (first, (_, ours)), *others = cells.items()
        for path, (_, theirs) in others:
            differences = differing(ours, theirs, places=(f"in {first}", f"in {path}"))
            if differences:
                raise InputError(
                    f"the results are not comparable, their protocols differ: {differences}; evaluate "
                    f"them the same way, or report them separately"
                )


def results_table(files: list[Path], columns: Columns) -> str:
    """The protocols, then a row per file and a column per metric; a dash for a missing metric."""
    rows = []
    for path in files:
        values = (cells.get(path, (None,))[0] for cells in columns.values())
        rows.append([str(path), *("-" if v is None else f"{v:.4f}" for v in values)])
    firsts = [next(iter(cells.values()))[1] for cells in columns.values()]
    terms = [", ".join(f"{key} {value}" for key, value in first.items()) for first in firsts]
    protocols = [f"protocol: {each}" for each in dict.fromkeys(terms)]
    return "\n".join([*protocols, table_of(rows, ["", *columns])])


def main(argv: list[str]) -> None:
    description = "Results of evaluate.py in one table."
    parser = Parser(prog="python -m evaluation.report", description=description)
    parser.add_argument("files", nargs="+", type=as_path, help="results of one protocol, as JSON")
    args = parser.parse_args(argv)
    results = {path: read_result(path) for path in args.files}
    columns = columns_of(results)
    check_protocols(columns)
    print(results_table(args.files, columns))


if __name__ == "__main__":
    run(main)
