"""Score images against a reference, a tokenizer by its reconstructions, or a generator by its loss.

python evaluate.py --samples output/alitok_b.npz --reference weights/VIRTUAL_imagenet256_labeled.npz
python evaluate.py --reference DIR --crop 256 --save_stats FILE.npz
python evaluate.py --reconstruction --tokenizer weights/AliTok.pth --data_path imagenet --split val
python evaluate.py --generator weights/alitok_b.bin --cache cache_alitok_val
python evaluate.py --generator weights/alitok_b.bin --cache cache_alitok_val --classify
python evaluate.py --selfcheck                       is the evaluator itself right?
torchrun --nproc_per_node=8 evaluate.py …            the same numbers from 8 GPUs
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

import argparse
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional, TypeVar

import torch
from accelerate import PartialState

from configs.sizes import tokenizer_of
from data.loader import worker_count
from evaluation.evaluator import NETWORKS, Evaluator
from evaluation.features import Inception
from evaluation.generator_scores import PRECISIONS, classify_cache, score_generator
from evaluation.likelihood import Share
from evaluation.lpips import LPIPS
from evaluation.reconstruction import draw_preview, score_tokenizer
from evaluation.report import print_result, show
from evaluation.selfcheck import selfcheck
from evaluation.sources import open_images
from evaluation.statistics import save_statistics
from runtime.arguments import Parser, new_file, number, path
from runtime.errors import InputError
from runtime.files import try_to_write
from runtime.processes import check_same, on_main, start_processes
from runtime.program import run
from runtime.published import WEIGHTS, MissingFile

T = TypeVar("T")


def parse(argv: list[str]) -> tuple["Task", argparse.Namespace]:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    add, picture = parser.add_argument, "output/reconstruction.png or output/generator.png"
    add("--samples", type=path, help="what to score: .npz (arr_0, uint8), or folder or tar of PNGs")
    add("--reference", type=path, help=".npz of images or statistics, or folder or tar of images")
    add("--crop", type=number(1, 8192), help="ADM centre crop of reference images, in pixels")
    add("--save_stats", type=new_file(".npz"), help="write the reference's statistics to this .npz")
    add("--num_samples", type=number(1, 10**9), default=50_000, help="images in --samples (50000)")
    add("--allow_partial", action="store_true", help="score fewer, and mark the result as partial")
    add("--half_manifold", action="store_true", help="precision and recall in float16, like ADM")
    spaces = "feature spaces, for example inception,dinov2 (inception)"
    add("--features", type=lambda text: text.split(","), default=["inception"], help=spaces)
    add("--reconstruction", action="store_true", help="score a tokenizer")
    add("--tokenizer", type=path, default="weights/AliTok.pth", help="weights or a run folder")
    add("--config", type=path, help="YAML whose model.vq_model describes another tokenizer")
    add("--data_path", type=path, help="folder or tar of images, with or without class folders")
    add("--split", default="", help="folder in data_path, for example val")
    add("--generator", type=path, help="score a generator's loss: weights or a run folder")
    add("--cache", type=path, help="token cache whose views --generator is scored on")
    runs = "runs to score at the same step"
    add("--compare", type=path, nargs="+", default=[], metavar="RUN_DIR", help=runs)
    precision = "for --generator; auto: bf16 on GPUs from Ampere on, else fp32"
    add("--classify", action="store_true", help="name images' classes by their codes' likelihood")
    add("--answers", type=new_file(".csv"), help="--classify: write all answers to this .csv")
    add("--precision", default="auto", choices=PRECISIONS, help=precision)
    add("--selfcheck", action="store_true", help="check the evaluator itself")
    add("--picture", type=new_file(".png"), help=f"PNG to draw ({picture})")
    add("--batch_size", type=number(1, 65_536), default=64, help="images per batch (64)")
    readers = "reading threads or workers per process (8, at most one per core)"
    add("--num_workers", type=number(0, 1024), default=worker_count(), help=readers)
    add("--device", choices=["cpu", "cuda"], help="by default CUDA if there is a GPU")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    return choose_task(args, given), args


def choose_task(args: argparse.Namespace, given: set[str]) -> "Task":
    """The task of the flags. Raises InputError if they make no task, or two."""
    task = next((task for task in TASKS if task.name in given), TASKS[-1])
    takes = {task.name} | task.needs | task.takes
    foreign, missing = given - takes - ALL_TAKE, task.needs - given
    if foreign:
        shown = ", ".join(f"--{name}" for name in sorted(takes))
        raise InputError(f"--{min(foreign)} does not go with {task}, which takes {shown}")
    if task.name == "samples" and not {"samples", "save_stats"} & given:
        missing = missing | {"samples (or --save_stats)"}
    if missing:
        raise InputError(
            f"{task} needs --{' and --'.join(sorted(missing))}; other tasks are "
            f"{', '.join(f'--{other.name}' for other in TASKS[:-1])}"
        )
    unknown = [name for name in args.features if name not in NETWORKS]
    if unknown or len(set(args.features)) < len(args.features):
        raise InputError(f"--features {','.join(args.features)}: choose from {', '.join(NETWORKS)}")
    if args.save_stats and len(args.features) > 1:
        raise InputError(
            "--save_stats writes statistics of one feature space: pass one to --features"
        )
    return task


def evaluate_samples(args: argparse.Namespace, processes: PartialState) -> None:
    images = size = None
    if args.samples:
        images = open_images(args.samples)  # checked before the reference takes minutes
        count, size, expected = images.shape[0], images.shape[1:3], args.num_samples
        if count > expected or (count < expected and not args.allow_partial):
            more = ", complete it, or pass --allow_partial" * (count < expected)
            raise InputError(
                f"{images.name} holds {count} images, {expected} are expected: pass --num_samples "
                f"{count} if these are all{more}"
            )
    if args.save_stats:
        on_main(lambda: try_to_write(args.save_stats))
    device, missing = torch.device(processes.device or "cpu"), []
    builds = {name: partial(NETWORKS[name], device, WEIGHTS) for name in args.features}
    found = [if_there(f"the space of {name} features", builds[name], missing) for name in builds]
    networks = [network for network in found if network is not None]
    check_same({"features": [network.identity for network in networks]}, "other networks")
    if not networks:
        raise InputError("; ".join(missing))
    evaluators = [  # of all spaces first, so that an unfit reference is refused at once
        Evaluator(
            args.reference, args.batch_size, args.num_workers, size, args.crop, args.half_manifold,
            network,
        )
        for network in networks
    ]  # fmt: skip
    results = []
    for evaluator in evaluators:
        if args.save_stats and processes.is_main_process:
            save_statistics(evaluator.reference, args.save_stats, evaluator.network.identity)
            processes.print(f"wrote {args.save_stats}: {evaluator.reference.images} images")
        if images is not None:
            results.append(evaluator.evaluate(images, args.num_samples))
    if images is not None:
        print_result(*results)
    processes.wait_for_everyone()  # if one fails, a launcher ends all: not before rank 0 is done
    if missing:
        raise InputError("; ".join(missing))


def evaluate_tokenizer(args: argparse.Namespace, processes: PartialState) -> None:
    device, missing = torch.device(processes.device or "cpu"), []
    tokenizer = tokenizer_of(args.tokenizer, args.config).to(device)
    network = if_there("rFID", lambda: Inception(device, WEIGHTS), missing)
    lpips = if_there("LPIPS", lambda: LPIPS(WEIGHTS).to(device), missing)
    there = {"rFID": network and network.identity, "LPIPS": lpips is not None}
    check_same(there, "other networks")
    if args.save_stats and network is None:
        raise InputError(f"--save_stats needs Inception's features; {missing[0]}")
    picture = Path(args.picture or "output/reconstruction.png")
    on_main(lambda: [try_to_write(file) for file in (picture, args.save_stats) if file])
    result, originals, preview = score_tokenizer(
        tokenizer, Path(args.data_path) / args.split, network, lpips, args.batch_size, args.num_workers,
        picture.parent,
    )  # fmt: skip
    if not result:
        return
    result |= {"picture": str(picture), "warnings": [*missing, *result["warnings"]]}
    print_result(result)
    if network is not None and args.save_stats and originals.parts:
        save_statistics(originals, args.save_stats, network.identity)
    draw_preview(preview, picture)


def if_there(figure: str, build: Callable[[], T], missing: list[str]) -> Optional[T]:
    """The network of a figure or space; None, and a line in `missing`, if one of its files is missing.
    Raises InputError for a wrong file."""
    try:
        return build()
    except MissingFile as e:
        missing.append(f"{figure} is left out: {e}")
        return None


def evaluate_generator(args: argparse.Namespace, processes: PartialState) -> None:
    picture = args.picture or "output/generator.png"
    on_main(lambda: try_to_write(picture))
    share = Share(args.batch_size, workers=args.num_workers)
    show(*score_generator(args.generator, args.compare, args.cache, picture, share, args.precision))


def classify(args: argparse.Namespace, processes: PartialState) -> None:
    if args.answers:
        on_main(lambda: try_to_write(args.answers))
    share = Share(args.batch_size, workers=args.num_workers)
    show(*classify_cache(args.generator, args.cache, args.answers, share, args.precision))


def check_evaluator(args: argparse.Namespace, processes: PartialState) -> None:
    if not selfcheck(args.batch_size, args.num_workers):
        raise SystemExit(1)


# ---------------------------------------------------------------------- the tasks
class Task(NamedTuple):
    """One task and the flags that it needs and takes; any other flag is refused."""

    name: str
    run: Callable[[argparse.Namespace, PartialState], None]
    needs: Set[str] = frozenset()
    takes: Set[str] = frozenset()

    def __str__(self) -> str:
        return "scoring samples" if self.name == "samples" else f"--{self.name}"


ALL_TAKE = {"batch_size", "num_workers", "device"}
TASKS = (
    Task("selfcheck", check_evaluator),
    Task("classify", classify, {"generator", "cache"}, {"answers", "precision"}),
    Task("generator", evaluate_generator, {"cache"}, {"compare", "precision", "picture"}),
    Task(
        "reconstruction", evaluate_tokenizer, {"data_path"},
        {"tokenizer", "config", "split", "save_stats", "picture"},
    ),
    Task(
        "samples", evaluate_samples, {"reference"},
        {"samples", "crop", "save_stats", "num_samples", "allow_partial", "half_manifold", "features"},
    ),
)  # fmt: skip


def main(argv: list[str]) -> None:
    task, args = parse(argv)
    task.run(args, start_processes(args.device))


if __name__ == "__main__":
    run(main)
