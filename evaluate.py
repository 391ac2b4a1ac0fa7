"""Score images against a reference, or a tokenizer by the images that it reconstructs.

python evaluate.py --samples output/alitok_b.npz --reference VIRTUAL_imagenet256_labeled.npz
python evaluate.py --reference DIR --crop 256 --save_stats FILE.npz
python evaluate.py --reconstruction --tokenizer weights/AliTok.pth --data_path imagenet --split val
torchrun --nproc_per_node=8 evaluate.py …            the same numbers from 8 GPUs
"""

import argparse
from pathlib import Path

from accelerate import PartialState

from evaluation.evaluator import STANDARD_COUNT, Evaluator, check_count
from evaluation.features import Inception
from evaluation.lpips import LPIPS
from evaluation.references import save_statistics
from evaluation.report import print_result
from evaluation.sources import open_images
from evaluation.tokenizer_score import load_tokenizer, score_tokenizer
from runtime.errors import InputError
from runtime.processes import start_processes
from runtime.program import run

WEIGHTS = Path("weights")  # the published files


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", help="what to score: .npz (arr_0, uint8) or folder of PNGs")
    parser.add_argument("--reference", help=".npz of images or statistics, or a folder of images")
    parser.add_argument("--crop", type=int, help="ADM centre crop of a reference folder, in pixels")
    parser.add_argument("--save_stats", help="write the reference's statistics to this .npz")
    parser.add_argument(
        "--num_samples", type=int, default=STANDARD_COUNT, help="images expected (50000)"
    )
    parser.add_argument("--allow_partial", action="store_true", help="score fewer, and say so")
    parser.add_argument(
        "--half_manifold", action="store_true",
        help="precision and recall in float16, as ADM's script computes them",
    )  # fmt: skip
    parser.add_argument("--reconstruction", action="store_true", help="score a tokenizer")
    parser.add_argument("--tokenizer", default="weights/AliTok.pth", help="weights or a run folder")
    parser.add_argument("--config", help="YAML whose model.vq_model describes another tokenizer")
    parser.add_argument("--data_path", help="image folder: one folder per class")
    parser.add_argument("--split", default="", help="folder in data_path, for example val")
    parser.add_argument("--picture", default="output/reconstruction.png", help="what to draw")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (64)")
    parser.add_argument(
        "--num_workers", type=int, default=8, help="reading threads per process (8)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that make no task."""
    if args.batch_size < 1 or args.num_samples < 1 or (args.crop is not None and args.crop < 1):
        raise InputError("--batch_size, --num_samples and --crop: use 1 or more")
    if args.num_workers < 0:
        raise InputError(f"--num_workers {args.num_workers}: use 0 or more")
    if args.reconstruction and (args.samples or args.reference or not args.data_path):
        raise InputError("--reconstruction takes --tokenizer and --data_path, no other images")
    if args.reconstruction and (args.crop or args.half_manifold):
        raise InputError("--reconstruction takes neither --crop nor --half_manifold")
    if not args.reconstruction and not (args.reference and (args.samples or args.save_stats)):
        raise InputError(
            "nothing to do: pass --samples and --reference, --reference and --save_stats, or "
            "--reconstruction with --tokenizer and --data_path"
        )
    if args.save_stats and Path(args.save_stats).suffix != ".npz":
        raise InputError(f"--save_stats {args.save_stats}: use a name that ends in .npz")


def evaluate_samples(args: argparse.Namespace, processes: PartialState) -> None:
    images = size = None
    if args.samples:
        # Before minutes go into the reference.
        images = open_images(args.samples)
        check_count(images.shape[0], args.num_samples, images.name, args.allow_partial)
        size = images.shape[1:3]
    evaluator = Evaluator.open(
        args.reference, processes, WEIGHTS, args.batch_size, args.num_workers, size, args.crop,
        args.half_manifold,
    )  # fmt: skip
    if args.save_stats and processes.is_main_process:
        save_statistics(evaluator.reference, args.save_stats, evaluator.network.identity)
        processes.print(f"wrote {args.save_stats}: {evaluator.reference.images} images")
    if images is not None:
        print_result(evaluator.evaluate(images, args.num_samples, args.allow_partial))


def evaluate_tokenizer(args: argparse.Namespace, processes: PartialState) -> None:
    assert processes.device is not None  # accelerate's type hint allows it
    tokenizer = load_tokenizer(args.tokenizer, args.config).to(processes.device)
    network = Inception(processes.device, WEIGHTS)
    lpips = LPIPS(WEIGHTS).to(processes.device)
    result, originals = score_tokenizer(
        tokenizer, Path(args.data_path) / args.split, network, lpips, processes, args.batch_size,
        args.num_workers, Path(args.picture),
    )  # fmt: skip
    if args.save_stats and processes.is_main_process:
        save_statistics(originals, args.save_stats, network.identity)
    print_result(result)


def main(argv: list[str]) -> None:
    args = parse(argv)
    processes = start_processes(args.device)
    (evaluate_tokenizer if args.reconstruction else evaluate_samples)(args, processes)


if __name__ == "__main__":
    run(main)
