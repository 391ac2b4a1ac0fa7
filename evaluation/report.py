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
    warnings = [f"warning: {text}" for one in spaces_of(result) for text in one.get("warnings", [])]
    tqdm.write("\n".join([*warnings, *paragraphs, json.dumps(result, ensure_ascii=False)]))


def spaces_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The result, and those in its other feature spaces."""
    return [result, *result.get("other_features", [])]


def print_result(result: dict[str, Any], *others: dict[str, Any]) -> None:
    """`show` the figures of a set of images; `others` are those in other feature spaces."""
    tables = [figures_table(one) for one in (result, *others) if one]
    show({**result, "other_features": list(others)} if result and others else result, *tables)


def figures_table(result: dict[str, Any]) -> str:
    rows = []
    if result["partial"]:
        count = f"{result['samples']['images']} of {result['images_asked']} images"
        rows.append(("PARTIAL", count))
    for side in ("samples", "reference"):
        images = result[side]["images"]
        count = f"{images} images" if images else "statistics"
        rows.append((side, f"{result[side]['path']}: {count}, {result[side]['hash']}"))
    unknown = "unknown: the reference lacks its statistics"
    rows += [(name, unknown if x is None else f"{x:.4f}") for name, x in result["metrics"].items()]
    return table_of(rows, align="left")


def table_of(
    rows: Sequence[Sequence[str]], headers: Sequence[str] = (), align: str = "right"
) -> str:
    """Rows of text as aligned columns, without lines around them."""
    return tabulate(rows, headers, "plain", stralign=align, disable_numparse=True)


# ---------------------------------------------------------------------- several results
def read_result(
    path: Path, remedy: str = "save the last line of evaluate.py there"
) -> dict[str, Any]:
    """The result in a file's whole content or last line. Raises InputError, with the remedy, if there is none."""
    try:
        text = path.read_text().strip()
        try:
            result = json.loads(text)
        except ValueError:
            result = json.loads(text.splitlines()[-1])
        for one in spaces_of(result):
            figures = one["metrics"].values()
            if not all(isinstance(figure, (int, float, type(None))) for figure in figures):
                raise TypeError("figures that are not numbers")
            if not isinstance(one["protocol"], dict):
                raise TypeError("no protocol")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise InputError(f"{path} does not hold scores of images ({e!r}): {remedy}") from e
    return result


def results_table(results: dict[Path, dict[str, Any]]) -> str:
    """The protocols, then a row per file and a column per metric; a dash for a missing metric.

    Raises InputError for a column of figures with different protocols, naming the differences.
    """
    firsts: dict[str, tuple[Path, dict[str, Any]]] = {}  # by metric: a file and its protocol
    cells: dict[Path, dict[str, str]] = {}  # by file and metric
    for path, result in results.items():
        cells[path] = {}
        for one in spaces_of(result):
            for name, value in one["metrics"].items():
                cells[path][name] = "-" if value is None else f"{value:.4f}"
                first, protocol = firsts.setdefault(name, (path, one["protocol"]))
                differences = differing(protocol, one["protocol"], (f"in {first}", f"in {path}"))
                if differences:
                    raise InputError(
                        f"the results are not comparable, their protocols differ: {differences}; evaluate "
                        f"them the same way, or report them separately"
                    )
    rows = [[str(path), *(of.get(name, "-") for name in firsts)] for path, of in cells.items()]
    terms = [", ".join(f"{k} {v}" for k, v in protocol.items()) for _, protocol in firsts.values()]
    shown = [f"protocol: {each}" for each in dict.fromkeys(terms)]
    return "\n".join([*shown, table_of(rows, ["", *firsts])])


def main(argv: list[str]) -> None:
    description = "Results of evaluate.py in one table."
    parser = Parser(prog="python -m evaluation.report", description=description)
    parser.add_argument("files", nargs="+", type=as_path, help="results of one protocol, as JSON")
    args = parser.parse_args(argv)
    print(results_table({path: read_result(path) for path in args.files}))


if __name__ == "__main__":
    run(main)
