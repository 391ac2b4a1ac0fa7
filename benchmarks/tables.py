"""Cells of the tables in a Markdown file, by the words that stand around them."""

from pathlib import Path

# (section or sentence before the table, start of the row's first cell, column, value). The column
# counts from the first cell, 0. An empty value was not measured and leaves the cell as it is.
Cell = tuple[str, str, int, str]


def fill(path: Path, cells: list[Cell]) -> list[str]:
    """Write cells into a file, all or none; returns the row and column of those without a value.

    Raises LookupError for a cell that the file does not have.
    """
    lines = path.read_text().splitlines(keepends=True)
    missing = []
    for section, row, column, value in cells:
        at = locate(lines, section, row)
        parts = lines[at].rstrip("\n").split("|")  # an empty part before the first cell
        if column + 1 >= len(parts) - 1:
            raise LookupError(f"{path}: row {row!r} of {section!r} has no column {column}")
        if value == "":
            missing.append(f"{row}, column {column}")
            continue
        parts[column + 1] = f" {value} "
        lines[at] = "|".join(parts) + "\n"
    path.write_text("".join(lines))
    return missing


def locate(lines: list[str], section: str, row: str) -> int:
    """The number of the first row that begins with `row`, below the line that has `section`."""
    below = [i for i, line in enumerate(lines) if section in line and not line.startswith("|")]
    for start in below:
        for i in range(start, len(lines)):
            if lines[i].startswith("|") and lines[i].split("|")[1].strip().startswith(row):
                return i
            if i > start and lines[i].startswith("## "):
                break
    raise LookupError(f"no row {row!r} below {section!r}")
