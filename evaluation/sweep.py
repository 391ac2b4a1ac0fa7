"""Samples and scores a grid of guidance scales and powers: `python -m evaluation.sweep`.

    python -m evaluation.sweep --reference weights/VIRTUAL_imagenet256_labeled.npz --scales 8,12,16 \\
        --powers 1.0,1.4,1.8 --num_samples 10000 --output output/sweep \\
        config=configs/alitok_b.yaml experiment.generator_checkpoint=weights/alitok_b.bin

Options with `=` are those of sample_imagenet.py. The same command resumes a stopped sweep. A cell's result
replaces its images; its codes stay.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

import argparse
import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import configs.load
from configs.schema import GeneratorRun
from evaluation.evaluator import Evaluator
from evaluation.metrics import NEIGHBOURS
from evaluation.report import read_result, table_of
from evaluation.sources import open_images
from generation.folder import SampleFolder
from generation.job import open_job
from runtime.arguments import Parser, number, path
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.parts import check_settings
from runtime.processes import on_main, start_processes
from runtime.program import run

REMEDY = "remove it, or use another --output"
# Options that the sweep sets for each cell.
PER_CELL = (
    "experiment.output_dir", "experiment.num_fid_samples", "experiment.save_png",
    "experiment.fid_reference", "model.generator.guidance_scale", "model.generator.guidance_scale_pow",
)  # fmt: skip


def numbers(text: str) -> list[float]:
    """An argparse type: numbers separated by commas, rounded to six digits as in the names of cells, without
    duplicates. `modeling.sampling.Sampling` declares their range."""
    return list(dict.fromkeys(float(f"{float(each):g}") for each in text.split(",")))


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own arguments, and the options of the sampling."""
    parser = Parser(prog="python -m evaluation.sweep", description=__doc__)
    add = parser.add_argument
    add("--reference", type=path, required=True, help="as for evaluate.py")
    add("--scales", type=numbers, required=True, help="guidance scales, such as 8,12,16")
    add("--powers", type=numbers, required=True, help="guidance powers, such as 1.0,1.4,1.8")
    count = "images per cell (10000)"
    add("--num_samples", type=number(NEIGHBOURS + 1, 10**9), default=10_000, help=count)
    add("--output", type=path, default="output/sweep", help="folder of the results")
    args, options = parser.parse_known_args(argv)
    for option in options:
        if option.lstrip("-").split("=")[0] in PER_CELL:
            raise InputError(f"{option}: the sweep sets this itself; see --help")
    return args, options


def main(argv: list[str]) -> None:
    args, arguments = parse(argv)
    options = configs.load.load(GeneratorRun, arguments, "sample_imagenet")
    experiment = options.experiment
    for name in ("codes", "prefix", "edit"):
        if getattr(experiment, name) is not None:
            raise InputError(
                f"experiment.{name}={getattr(experiment, name)}: the sweep samples new codes; leave "
                f"it out"
            )
    sampling = options.model.generator.sampling
    try:
        cells = {
            (scale, power): replace(sampling, guidance_scale=scale, guidance_scale_pow=power)
            for scale, power in product(args.scales, args.powers)
        }
    except InputError as e:  # a number out of range
        raise InputError(f"--scales, --powers: {e}") from e
    processes, output = start_processes(), Path(args.output)
    job, models = open_job(options)
    side = models.tokenizer.config.image_size
    evaluator = Evaluator(args.reference, size=(side, side))
    folders = {}
    for cell, sampling in cells.items():
        cell_job = replace(job, count=args.num_samples, sampling=sampling)
        folder = cell_file(output, *cell).with_suffix("")
        folders[cell] = SampleFolder(folder, cell_job, models, grid=experiment.grid)
    shared = next(iter(folders.values())).settings()
    settings = {
        "reference": evaluator.reference.hash,
        "features": evaluator.network.identity,
        "options": sorted(arguments),
        **{name: shared[name] for name in shared.keys() - {"guidance_scale", "guidance_scale_pow"}},
    }
    on_main(lambda: check_settings(output / "sweep.json", settings, REMEDY))
    for (scale, power), folder in folders.items():
        file = cell_file(output, scale, power)
        if not on_main(file.exists):
            processes.print(f"guidance scale {scale:g}, power {power:g}")
            result = evaluator.evaluate(open_images(folder.fill()), args.num_samples)
            if result:
                shown = {**result, "weights": models.hashes}
                text = json.dumps(shown, indent=1, ensure_ascii=False)
                write_whole(file, text.encode())
        if processes.is_main_process:  # a killed run may have left images; their codes stay
            folder.images_file.unlink(missing_ok=True)
            shutil.rmtree(folder.output, ignore_errors=True)
    if processes.is_main_process:
        remedy = "remove it and run the same command again"
        found = {cell: read_result(cell_file(output, *cell), remedy)["metrics"] for cell in cells}
        print(table(found))


def cell_file(output: Path, scale: float, power: float) -> Path:
    return output / f"scale{scale:g}_power{power:g}.json"


def table(cells: dict[tuple[float, float], dict[str, float]]) -> str:
    """gFID / IS of all scales and powers, one row per scale; the lowest gFID is marked."""
    best = min(cell["gFID"] for cell in cells.values())
    rows = {scale: [f"{scale:g}"] for scale, _ in cells}
    for (scale, _), cell in cells.items():
        mark = "*" if cell["gFID"] == best else ""
        rows[scale].append(f"{cell['gFID']:.2f} / {cell['IS']:.1f}{mark}")
    headers = ["scale \\ power", *dict.fromkeys(f"{power:g}" for _, power in cells)]
    return f"gFID / IS, * the lowest gFID\n{table_of([*rows.values()], headers)}"


if __name__ == "__main__":
    run(main)
