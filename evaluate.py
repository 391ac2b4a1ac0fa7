"""Score images against a reference, a tokenizer by its reconstructions, or a generator by its loss.

python evaluate.py --samples output/alitok_b.npz --reference VIRTUAL_imagenet256_labeled.npz
python evaluate.py --reference DIR --crop 256 --save_stats FILE.npz
python evaluate.py --reconstruction --tokenizer weights/AliTok.pth --data_path imagenet --split val
python evaluate.py --generator weights/alitok_b.bin --cache cache_alitok_val
python evaluate.py --selfcheck                       is the evaluator itself right?
torchrun --nproc_per_node=8 evaluate.py …            the same numbers from 8 GPUs
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Optional, TypeVar

from accelerate import PartialState

from evaluation.evaluator import (
    FEATURES,
    STANDARD_COUNT,
    Evaluator,
    check_count,
    open_network,
)
from evaluation.features import FeatureNetwork, Inception
from evaluation.generator_scores import PRECISIONS, score_generator, show_generator
from evaluation.lpips import LPIPS
from evaluation.references import save_statistics
from evaluation.report import print_result
from evaluation.selfcheck import selfcheck
from evaluation.sources import open_images
from evaluation.tokenizer_score import load_tokenizer, score_tokenizer
from runtime.arguments import Parser, new_file, number, path
from runtime.errors import InputError
from runtime.processes import start_processes
from runtime.program import run
from runtime.published import MissingFile

T = TypeVar("T")

WEIGHTS = Path("weights")  # the published files


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--samples", type=path, help="what to score: .npz (arr_0, uint8), or folder or tar of PNGs"
    )
    parser.add_argument(
        "--reference", type=path, help=".npz of images or statistics, or a folder or tar of images"
    )
    parser.add_argument(
        "--crop",
        type=number(1, 8192),
        help="ADM centre crop of a reference folder or tar, in pixels",
    )
    parser.add_argument(
        "--save_stats", type=new_file(".npz"), help="write the reference's statistics to this .npz"
    )
    parser.add_argument(
        "--num_samples",
        type=number(1, 10**9),
        default=STANDARD_COUNT,
        help="images expected (50000)",
    )
    parser.add_argument("--allow_partial", action="store_true", help="score fewer, and say so")
    parser.add_argument(
        "--half_manifold", action="store_true",
        help="precision and recall in float16, as ADM's script computes them",
    )  # fmt: skip
    parser.add_argument(
        "--features", type=lambda text: text.split(","), default=["inception"],
        help="feature spaces, for example inception,dinov2 (inception)",
    )  # fmt: skip
    parser.add_argument("--reconstruction", action="store_true", help="score a tokenizer")
    parser.add_argument(
        "--tokenizer", type=path, default="weights/AliTok.pth", help="weights or a run folder"
    )
    parser.add_argument(
        "--config", type=path, help="YAML whose model.vq_model describes another tokenizer"
    )
    parser.add_argument(
        "--data_path", type=path, help="folder or tar of images, of one folder per class or of none"
    )
    parser.add_argument("--split", default="", help="folder in data_path, for example val")
    parser.add_argument(
        "--generator", type=path, help="score a generator's loss: weights or a run folder"
    )
    parser.add_argument(
        "--cache", type=path, help="token cache on whose every view to score --generator"
    )
    parser.add_argument(
        "--compare",
        type=path,
        nargs="+",
        default=[],
        metavar="RUN_DIR",
        help="runs to score at the same step",
    )
    parser.add_argument(
        "--precision", default="auto", choices=PRECISIONS,
        help="of --generator: auto is bf16 on CUDA, fp32 on a CPU, as in training",
    )  # fmt: skip
    parser.add_argument("--selfcheck", action="store_true", help="check the evaluator itself")
    parser.add_argument(
        "--picture",
        type=new_file(".png"),
        help="PNG to draw (output/reconstruction.png or output/generator.png)",
    )
    parser.add_argument(
        "--batch_size", type=number(1, 65_536), default=64, help="images per batch (64)"
    )
    parser.add_argument(
        "--num_workers", type=number(0, 1024), default=8, help="reading threads per process (8)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that make no task."""
    if args.generator or args.cache or args.compare:
        others = args.reconstruction or args.selfcheck or of_images(args)
        if not (args.generator and args.cache) or others:
            raise InputError("--generator and --cache go together, alone or with --compare")
    elif args.selfcheck:
        if args.reconstruction or of_images(args):
            raise InputError("--selfcheck takes no images: it finds ADM's in weights/")
    else:
        check_images(args)


def of_images(args: argparse.Namespace) -> bool:
    """Whether any option is set that only images are scored with."""
    named = (args.samples, args.reference, args.save_stats, args.crop, args.half_manifold)
    return any(named) or args.features != ["inception"]


def check_images(args: argparse.Namespace) -> None:
    """Refuse arguments that name no images to score, or others than they can go with."""
    if args.reconstruction and (args.samples or args.reference or not args.data_path):
        raise InputError("--reconstruction takes --tokenizer and --data_path, no other images")
    unknown = [name for name in args.features if name not in FEATURES]
    if unknown or len(set(args.features)) < len(args.features):
        raise InputError(f"--features {','.join(args.features)}: choose of {', '.join(FEATURES)}")
    if args.save_stats and len(args.features) > 1:
        raise InputError("--save_stats writes the statistics of one feature space: pass --features")
    if args.reconstruction and args.features != ["inception"]:
        raise InputError("--reconstruction measures rFID: it takes --features inception only")
    if args.reconstruction and (args.crop or args.half_manifold):
        raise InputError("--reconstruction takes neither --crop nor --half_manifold")
    if not args.reconstruction and not (args.reference and (args.samples or args.save_stats)):
        raise InputError(
            "nothing to do: pass --samples and --reference, --reference and --save_stats, "
            "--reconstruction with --tokenizer and --data_path, --generator and --cache, or --selfcheck"
        )


def evaluate_samples(args: argparse.Namespace, processes: PartialState) -> None:
    images = size = None
    if args.samples:
        # Before minutes go into the reference.
        images = open_images(args.samples)
        check_count(images.shape[0], args.num_samples, images.name, args.allow_partial)
        size = images.shape[1:3]
    networks, missing = open_networks(args.features, processes)
    evaluators = [  # of all spaces first: a reference that does not serve one is refused at once
        Evaluator.open(
            args.reference, processes, WEIGHTS, args.batch_size, args.num_workers, size, args.crop,
            args.half_manifold, network,
        )
        for network in networks
    ]  # fmt: skip
    results = []
    for evaluator, network in zip(evaluators, networks):
        if args.save_stats and processes.is_main_process:
            save_statistics(evaluator.reference, args.save_stats, network.identity)
            processes.print(f"wrote {args.save_stats}: {evaluator.reference.images} images")
        if images is not None:
            results.append(evaluator.evaluate(images, args.num_samples, args.allow_partial))
    if images is not None:
        print_result(*results)
    processes.wait_for_everyone()  # a launcher ends all when one fails, so not before rank 0 is done
    if missing:
        raise InputError("; ".join(missing))


def open_networks(
    features: list[str], processes: PartialState
) -> tuple[list[FeatureNetwork], list[str]]:
    """The networks of these feature spaces, and why others of them are left out.

    Raises InputError where none is there.
    """
    assert processes.device is not None  # accelerate's type hint allows it
    networks, missing = [], []
    for name in features:
        try:
            networks.append(open_network(name, processes.device, WEIGHTS))
        except InputError as e:
            missing.append(f"features {name} were not computed: {e}")
    if not networks:
        raise InputError("; ".join(missing))
    return networks, missing


def evaluate_tokenizer(args: argparse.Namespace, processes: PartialState) -> None:
    assert processes.device is not None  # accelerate's type hint allows it
    tokenizer = load_tokenizer(args.tokenizer, args.config).to(processes.device)
    device, missing = processes.device, []
    network = if_there("rFID", lambda: Inception(device, WEIGHTS), missing)
    lpips = if_there("LPIPS", lambda: LPIPS(WEIGHTS).to(device), missing)
    if args.save_stats and network is None:
        raise InputError(f"--save_stats writes the features of Inception: {missing[0]}")
    result, originals = score_tokenizer(
        tokenizer, Path(args.data_path) / args.split, network, lpips, processes, args.batch_size,
        args.num_workers, Path(args.picture or "output/reconstruction.png"),
    )  # fmt: skip
    if result:
        result["warnings"] = [*missing, *result["warnings"]]
    if network is not None and args.save_stats and processes.is_main_process:
        save_statistics(originals, args.save_stats, network.identity)
    print_result(result)


def if_there(figure: str, build: Callable[[], T], missing: list[str]) -> Optional[T]:
    """The network of a figure; None, and a line in `missing`, where a file of its is not there.

    A file that is there and is not right is refused.
    """
    try:
        return build()
    except MissingFile as e:
        missing.append(f"{figure} is left out: {e}")
        return None


def evaluate_generator(args: argparse.Namespace, processes: PartialState) -> None:
    result = score_generator(
        args.generator, args.compare, args.cache, args.picture or "output/generator.png", processes,
        args.batch_size, args.num_workers, args.precision,
    )  # fmt: skip
    show_generator(result)


def main(argv: list[str]) -> None:
    args = parse(argv)
    processes = start_processes(args.device)
    if args.selfcheck:
        if not selfcheck(WEIGHTS, processes, args.batch_size, args.num_workers):
            raise SystemExit(1)
    elif args.generator:
        evaluate_generator(args, processes)
    elif args.reconstruction:
        evaluate_tokenizer(args, processes)
    else:
        evaluate_samples(args, processes)


if __name__ == "__main__":
    run(main)
