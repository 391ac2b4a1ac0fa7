"""Train the rows of the ablation with the project's own commands, and tabulate them.

    python -m experiments.alignment.ablation                               6 rows x 3 seeds, about 90 minutes on two cores
    python -m experiments.alignment.ablation --fast                        2 rows, 1 seed, at most 10 minutes
    python -m experiments.alignment.ablation --vary position_init=normal   one thing varied, around two rows

The same command resumes; what is done is not done again. OUTPUT/table.md, results.json and *.png are the result.
"""

import argparse
import os
import signal
from pathlib import Path

from experiments.alignment.charts import need_matplotlib
from experiments.alignment.commands import Chain, Commands, Step
from experiments.alignment.results import folder_of
from experiments.alignment.rows import (
    DATA,
    FAST_ROWS,
    FAST_SEEDS,
    FAST_STEPS,
    GENERATOR,
    ROWS,
    SEEDS,
    STAGE1,
    STAGE2,
    VARIATIONS,
    Data,
    Overrides,
    Recipe,
    Row,
    recipe,
    varied,
)
from experiments.alignment.table import add_run, write_tables
from runtime.arguments import Parser, as_path, number
from runtime.errors import InputError
from runtime.files import lock_folder
from runtime.program import run

# Programs that load stage 1's tokenizer need a place for the running mean of its clustering.
OF_STAGE1 = "model.vq_model.clustering=true"


def parse(argv: list[str]) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = Parser(
        prog="python -m experiments.alignment.ablation",
        description="Train the rows of the ablation for several seeds, and tabulate them.",
        epilog="variations: " + "; ".join(
            f"{name}: {v.meaning} ({', '.join(v.examples)})" for name, v in VARIATIONS.items()
        ),
    )  # fmt: skip
    add = parser.add_argument
    names = [row.name for row in ROWS]
    add(
        "--rows",
        nargs="+",
        choices=names,
        metavar="ROW",
        help=f"rows to train, of {', '.join(names)}",
    )
    add("--seeds", nargs="+", type=number(0, 2**31 - 1), metavar="SEED",
        help=f"seeds to train ({' '.join(map(str, SEEDS))})")  # fmt: skip
    add("--vary", metavar="NAME=VALUE", help="vary one thing, or several separated by commas")
    add(
        "--fast", action="store_true", help="two rows, one seed, half the steps: a first impression"
    )
    add("--jobs", type=number(1, 256), default=cores, metavar="N",
        help=f"commands at once, each with its share of the cores ({cores})")  # fmt: skip
    add(
        "--output",
        type=as_path,
        default=Path("output/alignment"),
        help="folder of the study (output/alignment)",
    )
    return parser.parse_args(argv)


def steps_of(folder: Path, data: Path, kind: Data, seed: int, options: Recipe) -> list[Step]:
    """The commands that make one row with one seed: tokenizer, codes, generator, figures."""
    stage1, generator = folder / "stage1", folder / "generator"
    best = generator / "generator_best.bin"
    steps = [
        Step("stage1", [
            "-m", "train_tokenizer", f"config={STAGE1}", f"experiment.output_dir={stage1}",
            *images_of(data), f"training.seed={seed}", *options.stage1,
        ], [stage1 / "tokenizer.pth"])
    ]  # fmt: skip
    for split in ("train", "val"):
        cache = folder / f"cache_{split}"
        steps.append(Step(cache.name, [
            "pretokenization.py", *kind.views, "--data_path", str(data / split),
            "--cached_path", str(cache), "--tokenizer_checkpoint", str(stage1), "--num_workers", "0",
        ], [cache / "manifest.json"]))  # fmt: skip
    steps += [
        Step("generator", [
            "train_ar.py", f"config={GENERATOR}", f"experiment.output_dir={generator}",
            f"experiment.tokenizer_checkpoint={stage1}",
            f"dataset.params.pretokenization={folder / 'cache_train'}",
            f"dataset.params.val_pretokenization={folder / 'cache_val'}",
            f"training.seed={seed}", OF_STAGE1, *options.train,
        ], [generator / "generator.bin", best]),
        Step("likelihood", [
            "evaluate.py", "--generator", str(best), "--cache", str(folder / "cache_val"),
            "--picture", str(folder / "likelihood.png"), "--num_workers", "0",
        ], [], answer=folder / "likelihood.json"),
    ]  # fmt: skip
    drawn = [f"experiment.generator_checkpoint={best}", f"model.generator.seed={seed}", OF_STAGE1]
    for suffix, chosen in kind.samples.items():
        name = f"samples{suffix}"
        command = [*sampling(folder, name, stage1, options), *drawn, *chosen]
        steps.append(Step(name, command, [folder / f"{name}.npz"]))
    return [*steps, judging(folder, data, kind, "stage1")]


def stage2_steps(folder: Path, data: Path, kind: Data, seed: int, options: Recipe) -> list[Step]:
    """What stage 2 adds: its decoder, which shows the codes that stage 1's generator sampled.

    Encoder and codebook are frozen in stage 2, so its codes and their generator are those of stage 1.
    """
    stage2 = folder / "stage2"
    return [
        Step("stage2", [
            "-m", "train_tokenizer", f"config={STAGE2}", f"experiment.output_dir={stage2}",
            f"experiment.stage1_checkpoint={folder / 'stage1'}",
            *images_of(data), f"training.seed={seed}", *options.stage2,
        ], [stage2 / "tokenizer.pth"]),
        *(Step(f"samples_stage2{of}", [
            *sampling(folder, f"samples_stage2{of}", stage2, options),
            f"experiment.codes={folder / f'samples{of}_codes.npz'}",
        ], [folder / f"samples_stage2{of}.npz"]) for of in kind.samples),
        judging(folder, data, kind, "stage2"),
    ]  # fmt: skip


def images_of(data: Path) -> list[str]:
    return [f"dataset.params.train_dir={data / 'train'}", f"dataset.params.val_dir={data / 'val'}"]


def sampling(folder: Path, name: str, tokenizer: Path, options: Recipe) -> list[str]:
    return [
        "sample_imagenet.py", f"config={GENERATOR}", f"experiment.output_dir={folder / name}",
        f"experiment.tokenizer_checkpoint={tokenizer}", "experiment.save_png=false", *options.sample,
    ]  # fmt: skip


def judging(folder: Path, data: Path, kind: Data, decoder: str) -> Step:
    command = ["-m", kind.judge, str(folder), str(data), decoder]
    return Step(f"judge_{decoder}", command, [], answer=folder / f"scores_{decoder}.json")


def chains_of(
    root: Path, data: Path, rows: list[Row], seeds: list[int], overrides: Overrides
) -> list[Chain]:
    """One chain per seed and trained row; a row that shares another one's codes is part of its chain."""
    chains, kind = [], DATA.get(overrides.data or "digits", Data())
    for seed in seeds:  # a seed's rows beside each other, so that a study that is stopped has pairs
        for folder in dict.fromkeys(row.folder for row in rows):
            trained = next(row for row in ROWS if row.name == folder)
            options = recipe(trained, overrides)
            second = any(row.folder == folder and row.decoder == "stage2" for row in rows)
            place = root / f"seed_{seed}" / folder
            steps = steps_of(place, data, kind, seed, options)
            if second:
                steps += stage2_steps(place, data, kind, seed, options)
            chains.append(Chain(f"seed {seed} {folder}", place, steps))
    return chains


def looks_inside(root: Path, data: Path, rows: list[Row], seeds: list[int]) -> list[Chain]:
    """One look per seed into what was trained, all rows in the same figures."""
    chains = []
    for seed in seeds:
        folder, runs = root / f"inside/seed_{seed}", {}
        for row in rows:
            runs[row.folder] = root / f"seed_{seed}" / row.folder
        tokenizers, generators, caches = (
            [f"{name}={run / part}" for name, run in runs.items()]
            for part in ("stage1", "generator/generator_best.bin", "cache_val")
        )
        command = [
            "-m", "experiments.alignment.inside", "--images", str(data / "val"),
            "--train_images", str(data / "train"), "--tokenizer", *tokenizers,
            "--generator", *generators, "--cache", *caches, "--output", str(folder),
        ]  # fmt: skip
        step = Step("inside", command, [folder / "inside.json"], again=True)
        chains.append(Chain(f"seed {seed}", folder, [step]))
    return chains


def write_data(commands: Commands, output: Path, name: str) -> Path:
    """The folder of a data set, written if it is one of ours. Raises InputError for a folder without its parts."""
    if name not in DATA:
        missing = [part for part in ("train", "val") if not (Path(name) / part).is_dir()]
        if missing:
            raise InputError(
                f"no {missing[0]}/ in {name}: pass a folder that holds train/ and val/"
            )
        return Path(name)
    folder = output / "data" / name
    command = ["-m", DATA[name].module, str(folder)]
    step = Step(name, command, [folder / "train", folder / "val"])
    commands.run([Chain("data", output / "data", [step])])
    return folder


def stop_on_signals() -> None:
    """Let SIGTERM do what ^C does: stop the commands, which save, and end."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.default_int_handler)


def main(argv: list[str]) -> None:
    args = parse(argv)
    need_matplotlib()  # now, not after an hour of training
    stop_on_signals()
    output = args.output / "fast" if args.fast else args.output
    overrides, names = Overrides(), tuple(row.name for row in ROWS)
    if args.fast:
        overrides, names = varied(FAST_STEPS)[0], FAST_ROWS
    if args.vary:
        over, names = varied(args.vary)
        overrides += over
    names = args.rows or names
    rows = [row for row in ROWS if row.name in names]
    seeds = sorted(set(args.seeds or (FAST_SEEDS if args.fast else SEEDS)))
    root = folder_of(output, args.vary or "")
    lock = lock_folder(output)

    commands = Commands(args.jobs)
    try:
        data = write_data(commands, output, overrides.data or "digits")
        chains = chains_of(root, data, rows, seeds, overrides)
        print(f"{len(chains)} runs, {commands.jobs} at once, into {root}", flush=True)
        commands.run(chains)
        commands.run(looks_inside(root, data, rows, seeds))
    finally:
        lock.close()
        add_run(root, argv, commands)
    write_tables(output, args.vary or "")
    print(
        f"{commands.ran} commands in {commands.minutes:.1f} min, {commands.processor:.1f} min of "
        f"processor time; {commands.skipped} were done before"
    )


if __name__ == "__main__":
    run(main)
