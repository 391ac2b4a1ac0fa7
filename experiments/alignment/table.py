"""What the study found: `python -m experiments.alignment.table OUTPUT` writes its tables and figures again.

OUTPUT/results.json, table.md, {rows,answer,curves}.png   the ablation
OUTPUT/vary/NAME=VALUE/…                                  the same of a variation, beside the ablation's own rows
OUTPUT/variations.md, variations.png                      what every variation does to the difference of two rows
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import processor
from experiments.alignment.charts import draw_rows, draw_variations
from experiments.alignment.commands import Commands
from experiments.alignment.results import (
    Difference,
    Group,
    Metric,
    collect,
    differences,
    folder_of,
    groups_of,
    mean_and_deviation,
    metrics_of,
    neighbours,
)
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.program import run


# ---------------------------------------------------------------------- as text
def table(groups: list[Group]) -> str:
    """Markdown: a line per row, mean ± standard deviation per metric; last, the validation images."""
    metrics = metrics_of(groups)
    real = groups[0].results[0].figures
    extra = [Metric("training loss", "training loss", ".3f")]
    if "copied" in real:
        extra.append(Metric("copied", "copies, %", ".1f", 100))
    heads = ["row", "seeds", "codes", *(m.title for m in (*metrics, *extra))]
    lines = [line_of(heads), line_of(["---"] * len(heads))]
    for group in groups:
        cells = [
            cell(metric, list(group.values(metric.name).values())) for metric in (*metrics, *extra)
        ]
        tokens = f"{group.results[0].figures['tokens']:.0f}"
        lines.append(line_of([group.title, str(len(group.results)), tokens, *cells]))
    # Of the images that are not generated: validation against training ones, or the other way round.
    title, known = (
        "validation images themselves",
        {"recognised": "recognised_val", "fid": "fid_val"},
    )
    if "fid_train" in real:
        title, known = "training images themselves", {"fid": "fid_train"}
    cells = [cell(m, [real[known[m.name]]]) if m.name in known else "" for m in metrics]
    lines.append(line_of([title, "", "", *cells, *[""] * len(extra)]))
    return "\n".join(lines)


def cell(metric: Metric, values: list[float]) -> str:
    found = mean_and_deviation([metric.scale * value for value in values])
    if found["deviation"] is None:
        return f"{found['mean']:{metric.form}}"
    return f"{found['mean']:{metric.form}} ± {found['deviation']:{metric.form}}"


def difference_table(pairs: list[tuple[Group, Group]]) -> str:
    """Markdown: a line per pair of rows, the mean difference with its p value per metric."""
    metrics = metrics_of([group for pair in pairs for group in pair])
    lines = [line_of(["from → to", *(metric.title for metric in metrics)])]
    lines.append(line_of(["---"] * (len(metrics) + 1)))
    for before, after in pairs:
        changes = {d.metric: d for d in differences(before, after)}
        cells = [change(m, changes[m.name]) for m in metrics]
        lines.append(line_of([f"{before.label} → {after.label}", *cells]))
    return "\n".join(lines)


def change(metric: Metric, found: Difference) -> str:
    if found.mean == 0 and found.p is None:
        return "same"
    p = "" if found.p is None else f" (p {found.p:.3f})" if found.p >= 0.001 else " (p < 0.001)"
    return f"{metric.scale * found.mean:+{metric.form}}{p}"


def line_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------- files
def add_run(root: Path, argv: list[str], commands: Commands) -> None:
    """Note one start of the study, if it ran any command: what it was and how long it took."""
    if not commands.ran:
        return
    file = root / "times.json"
    started = json.loads(file.read_text()) if file.exists() else []
    started.append({
        "command": " ".join(["python -m experiments.alignment.ablation", *argv]),
        "machine": f"{os.cpu_count()} cores of {processor()}, torch {torch.__version__}",
        "jobs": commands.jobs, "commands": commands.ran, "minutes": round(commands.minutes, 2),
        "processor minutes": round(commands.processor, 2),
    })  # fmt: skip
    write_whole(file, json.dumps(started, indent=1).encode())


def write_tables(output: Path, variation: str = "") -> None:
    """Write results.json, table.md and the figures of the ablation or of a variation of it."""
    root, results = folder_of(output, variation), collect(output, variation)
    if not results:
        raise InputError(f"no finished run in {root}")
    seen = {result.row.name for result in results}
    # Figures of other images say nothing about these.
    compares = variation and "data=" not in variation
    plain = [r for r in collect(output) if r.row.name in seen] if compares else []
    groups = groups_of([*plain, *results])
    pairs = neighbours(groups)
    file = root / "times.json"
    times = json.loads(file.read_text()) if file.exists() else []
    content = {
        "rows": [group.summary() for group in groups],
        "differences": [
            {"from": a.title, "to": b.title, "metrics": [asdict(d) for d in differences(a, b)]}
            for a, b in pairs
        ],
        "starts": times,
    }
    write_whole(root / "results.json", json.dumps(content, indent=1, ensure_ascii=False).encode())
    parts = [table(groups)]
    if pairs:
        parts.append(
            "Differences, mean over seeds, with p of a paired t test:\n\n" + difference_table(pairs)
        )
    parts.append("\n".join(map(describe_start, times)))
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_whole(root / "table.md", text.encode())
    print(text)
    draw_rows(groups, root)
    write_variations(output)


def describe_start(start: dict[str, Any]) -> str:
    return (
        f"`{start['command']}` on {start['machine']}: {start['minutes']:.1f} minutes, "
        f"{start['processor minutes']:.1f} of processor time, {start['jobs']} commands at once"
    )


def variations_of(output: Path) -> list[str]:
    """The variations of which runs are finished, and "" first for the ablation itself."""
    names = sorted(path.name for path in (output / "vary").glob("*"))
    return [name for name in ["", *names] if collect(output, name)]


def write_variations(output: Path) -> None:
    """Write what each variation does to the differences of neighbouring rows, if there is any."""
    names = variations_of(output)
    if not any(names):
        return
    pairs = [pair for name in names for pair in neighbours(groups_of(collect(output, name)))]
    kinds = {(a.row.name, b.row.name) for a, b in pairs if a.variation}
    pairs = [(a, b) for a, b in pairs if (a.row.name, b.row.name) in kinds]
    if not pairs:
        return
    write_whole(output / "variations.md", (difference_table(pairs) + "\n").encode())
    draw_variations(pairs, output)


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.alignment.table", description="Write the study's tables again."
    )
    parser.add_argument("output", type=as_path, help="the --output of the study")
    output = parser.parse_args(argv).output
    names = variations_of(output)
    if not names:
        raise InputError(f"no finished run in {output}: run experiments.alignment.ablation first")
    for name in names:
        write_tables(output, name)


if __name__ == "__main__":
    run(main)
