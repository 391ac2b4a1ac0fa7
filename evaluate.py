"""Score images against a reference, or a tokenizer against the images that it reconstructs.

python evaluate.py --samples output/alitok_b.npz --reference VIRTUAL_imagenet256_labeled.npz
python evaluate.py --reference DIR --save_stats FILE.npz
python evaluate.py --reconstruction --tokenizer weights/AliTok.pth --data_path imagenet --split val
python evaluate.py --generator weights/alitok_b.bin --cache cache_val
torchrun --nproc_per_node=8 evaluate.py …            the same numbers from 8 GPUs
"""

import argparse
from pathlib import Path

from accelerate import PartialState

from evaluation.compare import STANDARD, Evaluator, check_count, save_side, show
from evaluation.features import Inception
from evaluation.generator_scores import PRECISIONS, score_generator, show_generator
from evaluation.sources import open_images
from evaluation.tokenizer import evaluate_tokenizer, load_tokenizer
from runtime.errors import InputError
from runtime.processes import start_processes
from runtime.program import run


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", help="what to score: .npz (arr_0, uint8) or folder of PNGs")
    parser.add_argument("--reference", help=".npz of images or statistics, or a folder of images")
    parser.add_argument("--save_stats", help="write the reference's statistics to this .npz")
    parser.add_argument(
        "--num_samples", type=int, default=STANDARD, help="images asked for (50000)"
    )
    parser.add_argument("--allow_partial", action="store_true", help="score fewer, and say so")
    parser.add_argument("--reconstruction", action="store_true", help="score a tokenizer")
    parser.add_argument("--tokenizer", default="weights/AliTok.pth", help="weights or a run folder")
    parser.add_argument("--config", help="YAML whose model.vq_model describes another tokenizer")
    parser.add_argument("--generator", help="score a generator's loss: weights or a run folder")
    parser.add_argument("--cache", help="token cache on whose every view to score --generator")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN_DIR", help="runs to score at the same step"
    )
    parser.add_argument(
        "--precision", default="auto", choices=PRECISIONS,
        help="of --generator: auto is bf16 on CUDA, fp32 on a CPU, as in training",
    )  # fmt: skip
    parser.add_argument("--data_path", help="where the image folder is: one folder a class")
    parser.add_argument("--split", default="", help="folder in data_path, for example val")
    parser.add_argument(
        "--picture", help="PNG to draw (output/reconstruction.png or generator.png)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (64)")
    parser.add_argument("--num_workers", type=int, default=8, help="reading threads a process (8)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.num_samples < 1:
        raise InputError("--batch_size and --num_samples: give 1 or more")
    if args.generator or args.cache or args.compare:
        if not (args.generator and args.cache) or args.reconstruction or args.samples:
            raise InputError("--generator and --cache go together, alone or with --compare")
        return args
    if args.reconstruction and (args.samples or args.reference or not args.data_path):
        raise InputError("--reconstruction takes --tokenizer and --data_path, no other images")
    if not args.reconstruction and not (args.reference and (args.samples or args.save_stats)):
        raise InputError(
            "nothing to do: give --samples and --reference, --reference and --save_stats, "
            "--reconstruction with --tokenizer and --data_path, or --generator and --cache"
        )
    if args.save_stats and Path(args.save_stats).suffix != ".npz":
        raise InputError(f"--save_stats {args.save_stats}: give a name that ends in .npz")
    return args


def score_samples(args: argparse.Namespace, processes: PartialState) -> None:
    images = None
    if args.samples:
        # Before the reference costs minutes.
        images = open_images(args.samples)
        check_count(images.shape[0], args.num_samples, images.name, args.allow_partial)
    evaluator = Evaluator.open(args.reference, processes, args.batch_size, args.num_workers)
    if args.save_stats and processes.is_main_process:
        save_side(evaluator.reference, args.save_stats, evaluator.inception.identity)
        processes.print(f"wrote {args.save_stats}: {evaluator.reference.images} images")
    if images is not None:
        show(evaluator.evaluate(images, args.num_samples, args.allow_partial))


def score_tokenizer(args: argparse.Namespace, processes: PartialState) -> None:
    tokenizer = load_tokenizer(args.tokenizer, args.config).to(processes.device)
    inception = Inception(processes.device)
    result, originals = evaluate_tokenizer(
        tokenizer, Path(args.data_path) / args.split, inception, processes, args.batch_size,
        args.num_workers, args.picture or "output/reconstruction.png",
    )  # fmt: skip
    if args.save_stats and processes.is_main_process:
        save_side(originals, args.save_stats, inception.identity)
    show(result)


def score_loss(args: argparse.Namespace, processes: PartialState) -> None:
    result = score_generator(
        args.generator, args.compare, args.cache, args.picture or "output/generator.png", processes,
        args.batch_size, args.num_workers, args.precision,
    )  # fmt: skip
    show_generator(result)


def main(argv: list[str]) -> None:
    args = parse(argv)
    processes = start_processes(args.device)
    if args.generator:
        score_loss(args, processes)
    else:
        (score_tokenizer if args.reconstruction else score_samples)(args, processes)


if __name__ == "__main__":
    run(main)
