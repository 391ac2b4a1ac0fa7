"""Guidance scale and power on a grid, each cell sampled and scored: `python -m evaluation.sweep`.

    python -m evaluation.sweep --reference VIRTUAL_imagenet256_labeled.npz --scales 8,12,16 \\
        --powers 1.0,1.4,1.8 --num_samples 10000 --output output/sweep \\
        config=configs/alitok_b.yaml experiment.generator_checkpoint=weights/alitok_b.bin

Options with `=` go to sample_imagenet.py. Started again it goes on; a cell's images are removed when
its result is written, and its codes stay.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image, ImageDraw, ImageFont

import sample_imagenet
from evaluation.compare import Evaluator
from evaluation.sources import open_images
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.parts import check_settings
from runtime.processes import start_processes
from runtime.program import run

CELL, MARGIN = (120, 60), 70  # pixels of the heat map
BEST, WORST = (38, 130, 142), (253, 231, 200)
REMEDY = "remove it, or give another --output"


def numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError as e:
        raise InputError(f"{text}: give numbers with commas between, for example 8,12,16") from e


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m evaluation.sweep", description=__doc__)
    parser.add_argument("--reference", required=True, help="as for evaluate.py")
    parser.add_argument("--scales", required=True, help="guidance scales, for example 8,12,16")
    parser.add_argument("--powers", required=True, help="guidance powers, for example 1.0,1.4,1.8")
    parser.add_argument("--num_samples", type=int, default=10_000, help="images a cell (10000)")
    parser.add_argument("--output", default="output/sweep", help="folder of the results")
    args, options = parser.parse_known_args(argv)
    args.scales, args.powers = numbers(args.scales), numbers(args.powers)
    mine = ("output_dir", "num_fid_samples", "save_png", "evaluate", "guidance_scale", "_pow")
    for option in options:
        if option.split("=")[0].endswith(mine):
            raise InputError(f"{option}: the sweep sets this itself; see --help")
    return args, options


def main(argv: list[str]) -> None:
    args, options = parse(argv)
    processes, folder = start_processes(), Path(args.output)
    evaluator = Evaluator.open(args.reference, processes)
    settings = {
        "num_samples": args.num_samples,
        "reference": evaluator.reference.hash,
        "features": evaluator.inception.identity,
        "options": sorted(options),
    }
    if processes.is_main_process:
        check_settings(folder / "sweep.json", settings, REMEDY)
    processes.wait_for_everyone()
    check_settings(folder / "sweep.json", settings, REMEDY)
    for scale in args.scales:
        for power in args.powers:
            if not cell_file(folder, scale, power).exists():
                score_cell(folder, scale, power, args.num_samples, options, evaluator, processes)
            elif processes.is_main_process:
                remove_images(folder, scale, power)  # of a run killed before it did
    if processes.is_main_process:
        grid = [[metrics_of(cell_file(folder, s, p)) for p in args.powers] for s in args.scales]
        print(table(grid, args.scales, args.powers))
        heat_map(grid, args.scales, args.powers).save(folder / "sweep.png")
        print(f"heat map of gFID: {folder / 'sweep.png'}")


def cell_file(folder: Path, scale: float, power: float) -> Path:
    return folder / f"scale{scale:g}_power{power:g}.json"


def metrics_of(cell: Path) -> dict[str, Any]:
    try:
        return json.loads(cell.read_text())["metrics"]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{cell} is damaged: remove it and give the same command again") from e


def score_cell(
    folder: Path, scale: float, power: float, count: int, options: list[str],
    evaluator: Evaluator, processes: PartialState,
) -> None:  # fmt: skip
    """Sample one cell's images, write its result, remove the images."""
    result_file = cell_file(folder, scale, power)
    samples = result_file.with_suffix("")
    processes.print(f"guidance scale {scale:g}, power {power:g}")
    sample_imagenet.main(
        [
            *options,
            f"experiment.output_dir={samples}",
            f"experiment.num_fid_samples={count}",
            "experiment.save_png=False",
            f"model.generator.guidance_scale={scale}",
            f"model.generator.guidance_scale_pow={power}",
        ]
    )
    images = samples.with_name(samples.name + ".npz")
    result = evaluator.evaluate(open_images(images), count)
    if processes.is_main_process:
        write_whole(result_file, json.dumps(result, indent=1, ensure_ascii=False).encode())
        remove_images(folder, scale, power)
    processes.wait_for_everyone()  # a file that exists is whole for all


def remove_images(folder: Path, scale: float, power: float) -> None:
    """A cell's images; its codes stay."""
    samples = cell_file(folder, scale, power).with_suffix("")
    samples.with_name(samples.name + ".npz").unlink(missing_ok=True)
    shutil.rmtree(samples, ignore_errors=True)


def table(grid: list[list[dict[str, Any]]], scales: list[float], powers: list[float]) -> str:
    """gFID / IS, a row a scale; the lowest gFID is marked."""
    best = min(cell["gFID"] for row in grid for cell in row)
    lines = [["scale \\ power", *(f"{power:g}" for power in powers)]]
    for scale, row in zip(scales, grid):
        marked = ["*" if cell["gFID"] == best else "" for cell in row]
        cells = [f"{c['gFID']:.2f} / {c['IS']:.1f}{mark}" for c, mark in zip(row, marked)]
        lines.append([f"{scale:g}", *cells])
    width = max(len(text) for line in lines for text in line)
    lines = ["  ".join(f"{text:>{width}}" for text in line) for line in lines]
    return "\n".join(["gFID / IS, * the lowest gFID", *lines])


def heat_map(
    grid: list[list[dict[str, Any]]], scales: list[float], powers: list[float]
) -> Image.Image:
    """gFID by colour, darkest the lowest, with gFID above IS in every cell."""
    low = min(cell["gFID"] for row in grid for cell in row)
    span = max(cell["gFID"] for row in grid for cell in row) - low or 1.0
    (width, height), font = CELL, ImageFont.load_default(15)
    size = (MARGIN + width * len(powers), MARGIN + height * len(scales))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((5, 5), "scale ↓ power →", "black", font)
    for j, power in enumerate(powers):
        centre = (MARGIN + (j + 0.5) * width, MARGIN - 15)
        draw.text(centre, f"{power:g}", "black", font, anchor="mm")
    for i, (scale, row) in enumerate(zip(scales, grid)):
        y = MARGIN + i * height
        draw.text((MARGIN / 2, y + height / 2), f"{scale:g}", "black", font, anchor="mm")
        for j, cell in enumerate(row):
            x, share = MARGIN + j * width, (cell["gFID"] - low) / span
            colour = tuple(round(b + share * (w - b)) for b, w in zip(BEST, WORST))
            draw.rectangle((x, y, x + width - 1, y + height - 1), colour)
            text = f"{cell['gFID']:.2f}\nIS {cell['IS']:.1f}"
            draw.text((x + width / 2, y + height / 2), text, "black", font, anchor="mm")
    return picture


if __name__ == "__main__":
    run(main)
