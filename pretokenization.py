"""Encode an image folder or tar once, into a packed token cache that training reads.

    python pretokenization.py --img_size 256 --batch_size 32 --ten_crop --data_path imagenet/train
    python pretokenization.py … --data_path ILSVRC2012_img_train.tar     as downloaded, not unpacked
    torchrun --nproc_per_node=8 pretokenization.py …            the same cache from 8 GPUs

The same command resumes an interrupted run, and the cache is the same bytes on any number of processes.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

import argparse
import os
from pathlib import Path

from configs.sizes import tokenizer_of
from data.classes import misnumbered, printable
from data.images import scan_images
from data.loader import worker_count
from data.tree import is_image
from data.walk import is_hidden
from encoding.job import EncodingPlan, encode_folder
from runtime.arguments import Parser, as_path, number, path
from runtime.errors import InputError
from runtime.processes import start_processes
from runtime.program import run

# Folders beside train/ in common data sets that are not classes.
SPLITS = {"train", "val", "valid", "validation", "test", "devkit", "ILSVRC2012_devkit_t12"}
# Flags of the published program that have no effect here, with a value or without.
WITHOUT_EFFECT = (
    "--seed", "--pin_mem", "--no_pin_mem", "--world_size", "--local_rank", "--dist_url", "--dist_on_itp",
)  # fmt: skip


def main(argv: list[str]) -> None:
    args = parse(argv)
    size = {} if args.img_size is None else {"image_size": args.img_size}
    folder, choice = image_folder(args.data_path, args.split)
    processes = start_processes(args.device)
    assert processes.device is not None  # accelerate's type hint allows it
    if args.dtype == "tf32" and processes.device.type != "cuda":
        raise InputError("--dtype tf32 exists only on CUDA: choose fp32 or bf16 on a CPU")
    checkpoint = args.tokenizer_checkpoint
    encoder = tokenizer_of(checkpoint, args.config, with_decoder=False, **size).to(processes.device)
    images = scan_images(folder, args.labels, args.cached_path.parent)  # takes minutes for a tar
    processes.print(printable(f"{choice}{folder}: {images.describe()}"))
    if processes.is_main_process and (doubt := misnumbered(images.classes)):
        print(f"warning: {doubt}")
    ignored = [flag for flag in WITHOUT_EFFECT if hasattr(args, flag[2:])]
    if ignored:
        processes.print(f"without effect here: {', '.join(ignored)}")
    plan = EncodingPlan(
        encoder.config.image_size, kind_of_crops(args), args.dtype, args.batch_size, args.format,
        args.skip_unreadable, args.num_workers,
    )  # fmt: skip
    encode_folder(images, encoder, plan, args.cached_path)


def cache_path(text: str) -> Path:
    if as_path(text).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text} is not the name of a new folder")
    return as_path(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Encode an image folder or tar into a token cache.")
    add = parser.add_argument
    # fmt: off
    add("--data_path", type=path, required=True, metavar="DIR",
        help="image folder with one subfolder per class, or none for a single class; or the folder that "
             "holds train/; or a tar with one folder or tar per class")
    add("--labels", type=path, metavar="FILE",
        help="classes of images that lie in no class folders: one class per line, in the order of "
             "the images' names, or a CSV of file,class")
    add("--split", choices=["train", "val"], help="read DATA_PATH/SPLIT")
    add("--img_size", type=number(1, 4096), metavar="N",
        help="pixels per side (default: the config's, or 256)")
    add("--batch_size", type=number(1, 65_536), default=32, metavar="N",
        help="images per batch (default: 32)")
    crops = parser.add_mutually_exclusive_group()
    crops.add_argument("--ten_crop", action="store_true", help="ten views per image, with mirrors")
    crops.add_argument("--five_crop", action="store_true", help="the five views without mirrors")
    add("--flip_flag", action="store_true",
        help="store the codes of the mirrored views too; only --five_crop omits them by default")
    add("--cached_path", type=cache_path, default="cache_alitok", metavar="DIR",
        help="cache to write (default: cache_alitok)")
    add("--format", choices=["packed", "npz"], default="packed",
        help="a few large shards, or the published layout of one .npz per image (default: packed)")
    add("--tokenizer_checkpoint", type=path, default="weights/AliTok.pth", metavar="PATH",
        help="weights or a run folder (default: weights/AliTok.pth)")
    add("--config", type=path, metavar="YAML", help="its model.vq_model has the sizes that the weights do not show (heads)")
    add("--dtype", choices=["fp32", "tf32", "bf16"], default="fp32",
        help="precision of the encoder: exact (fp32), or faster with a few codes changed "
             "(default: fp32)")
    add("--skip_unreadable", type=number(0, 10**9), default=0, metavar="N",
        help="leave out at most N unreadable images, listed in the manifest (default: 0)")
    add("--num_workers", type=number(0, 1024), default=worker_count(), metavar="N",
        help="decoding processes per GPU (default: 8, at most one per core)")
    add("--device", choices=["cpu", "cuda", "cuda:0"],
        help="default: CUDA if there is a GPU; CUDA_VISIBLE_DEVICES selects which")
    for flag in WITHOUT_EFFECT:
        add(flag, nargs="?", default=argparse.SUPPRESS, metavar="X",
            help="published flag, without effect here")
    # fmt: on
    return parser.parse_args(argv)


def kind_of_crops(args: argparse.Namespace) -> str:
    """A key of `data.images.VIEWS`; five crops with their mirror images are the ten crops."""
    if args.ten_crop or (args.five_crop and args.flip_flag):
        return "ten_crop"
    return "five_crop" if args.five_crop else "center_flip"


def image_folder(data_path: str, split: str | None) -> tuple[Path, str]:
    """The folder of classes or the tar and, if the program chose it, words for the log.

    Like the published program, this one reads DATA_PATH/train if it exists and no split is set, unless
    `train` is itself a class: it holds images and has other classes beside it. Raises InputError if it
    also has other splits beside it.
    """
    root = Path(data_path)
    if split is not None:
        return root / split, ""
    train = root / "train"
    if not train.is_dir():
        return root, ""
    folders = {e.name for e in os.scandir(root) if e.is_dir() and not is_hidden(e.name)}
    splits, classes = sorted(folders & SPLITS - {"train"}), sorted(folders - SPLITS)
    if classes and any(is_image(e.name) and not is_hidden(e.name) for e in os.scandir(train)):
        if splits:
            raise InputError(
                f"{root} holds images in train/ beside {splits[0]}/ and {classes[0]}/, so train may be a split or "
                f"a class: pass --split train, or a folder of classes alone"
            )
        return root, ""
    return train, f"--data_path {root} holds train/ and --split is not set: reading "


if __name__ == "__main__":
    run(main)
