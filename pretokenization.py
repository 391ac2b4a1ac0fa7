"""Images to codes: encode an image folder once, into a packed token cache that training reads.

    python pretokenization.py --img_size 256 --batch_size 32 --ten_crop --data_path imagenet/train
    torchrun --nproc_per_node=8 pretokenization.py …            the same cache from 8 GPUs

Killed and started again it goes on, and the cache is the same bytes on any number of processes:
images are encoded in fixed batches of consecutive indices, whoever encodes them.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from accelerate import PartialState
from PIL import __version__ as pillow_version
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from configs.load import tokenizer_config
from data.images import VIEWS, CroppedImages, list_images, to_float
from data.tokens import MANIFEST, TokenWriter, fingerprint, open_tokens, write_manifest
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights import load_tensors
from runtime.errors import InputError
from runtime.files import lock_folder, sync_file, sync_folder, writing
from runtime.parts import Parts, check_settings, differing
from runtime.processes import set_matmul_precision, start_processes
from runtime.program import run
from training.checkpoint import read_weights

BATCHES_PER_PART = 16  # what a killed run loses at most, per process
COMPARED_BATCHES = 2  # encoded in float32 too, where another type was asked for
NAMED = 3  # unreadable images in a message


def at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value}: give {lowest} or more")
        return value

    return number


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data_path",
        required=True,
        help="image folder: one folder a class, or with --split above it",
    )
    parser.add_argument("--split", choices=["train", "val"], help="take DATA_PATH/SPLIT")
    parser.add_argument("--img_size", type=at_least(1), help="pixels a side (the config's, or 256)")
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, help="images encoded together (32)"
    )
    crops = parser.add_mutually_exclusive_group()
    crops.add_argument("--ten_crop", action="store_true", help="ten crops an image, with mirrors")
    crops.add_argument("--five_crop", action="store_true", help="the five crops without mirrors")
    parser.add_argument(
        "--flip_flag",
        action="store_true",
        help="store the codes of the mirrored views too: only --five_crop leaves them out otherwise",
    )
    parser.add_argument("--cached_path", default="cache_alitok", help="the cache to write")
    parser.add_argument(
        "--format",
        choices=["packed", "npz"],
        default="packed",
        help="a few large shards, or the published layout of one .npz an image (packed)",
    )
    parser.add_argument("--tokenizer_checkpoint", default="weights/AliTok.pth")
    parser.add_argument("--config", help="YAML whose model.vq_model describes another tokenizer")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "tf32", "bf16"],
        default="fp32",
        help="of the encoder: exact (fp32), or faster with a small share of other codes",
    )
    parser.add_argument(
        "--skip_unreadable",
        type=at_least(0),
        default=0,
        metavar="N",
        help="leave out up to N unreadable images, listed in the manifest, instead of stopping (0)",
    )
    parser.add_argument(
        "--num_workers", type=at_least(0), default=8, help="decoding processes, per GPU (8)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one")
    return parser.parse_args(argv)


def kind_of_crops(args: argparse.Namespace) -> str:
    """By `data.images.VIEWS`. The mirrored five crops are the ten crops."""
    if args.ten_crop or (args.five_crop and args.flip_flag):
        return "ten_crop"
    return "five_crop" if args.five_crop else "center_flip"


def image_folder(data_path: str, split: str | None) -> Path:
    """The folder of classes; a data set's root without a split is asked about, not guessed at."""
    root = Path(data_path)
    if split is None:
        if (root / "train").is_dir() and (root / "val").is_dir():
            raise InputError(f"{root} holds train/ and val/: say which with --split train or val")
        return root
    if not (root / split).is_dir():
        raise InputError(f"no folder {root / split}; give its parent, or no --split")
    return root / split


def main(argv: list[str]) -> None:
    args = parse(argv)
    size = {} if args.img_size is None else {"image_size": args.img_size}
    config = tokenizer_config(args.config, **size)
    args.img_size = config.image_size
    kind = kind_of_crops(args)
    root = image_folder(args.data_path, args.split)
    samples, classes = list_images(root)
    files = [path for path, _ in samples]
    paths = [os.path.relpath(path, root) for path in files]

    state = read_weights(args.tokenizer_checkpoint, "tokenizer")
    processes = start_processes(args.device)
    if args.dtype == "tf32" and processes.device.type != "cuda":
        raise InputError("--dtype tf32 is a mode of CUDA devices: choose fp32 or bf16 on a CPU")
    tokenizer = load_encoder(config, state, args.tokenizer_checkpoint, processes.device)

    settings = {
        "layout": args.format,
        "tokenizer": fingerprint(state),
        "image_size": args.img_size,
        "crops": kind,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "listed_images": len(samples),
        "listing": fingerprint_of_names(paths),
    }
    cache = Path(args.cached_path)
    work = cache.with_name(cache.name + ".partial")
    if already_complete(cache, settings):
        if processes.is_main_process:
            shutil.rmtree(work, ignore_errors=True)  # of a run killed while it cleaned up
        processes.print(f"{cache} is complete: {len(samples)} images")
        return
    store = work / "store"
    remedy = "remove it, or give another --cached_path"
    if processes.is_main_process:
        lock = lock_folder(work)  # held until this process ends, however it does
        with writing(work):
            check_settings(work / "settings.json", settings, remedy)
            if args.format == "npz" and not store.exists():
                shutil.rmtree(work / "parts", ignore_errors=True)  # their files are not there
                store.mkdir()
    processes.wait_for_everyone()
    check_settings(work / "settings.json", settings, remedy)

    per_part = BATCHES_PER_PART * args.batch_size
    parts = Parts(work / "parts", -(-len(samples) // per_part))
    mine = parts.missing(processes.process_index, processes.num_processes)
    skipped = skipped_images(parts)
    processes.wait_for_everyone()  # before any rank adds a part that another still counts
    refuse_too_many(skipped, paths, args.skip_unreadable)
    images = Readable(CroppedImages(files, args.img_size, kind), skip=args.skip_unreadable > 0)
    if args.dtype != "fp32" and processes.is_main_process:
        print_agreement(tokenizer, images, args, processes.device)

    def write(number: int, indices: np.ndarray, codes: np.ndarray, left_out: np.ndarray) -> None:
        with writing(work):
            if args.format == "npz":
                write_images(store, [paths[i] for i in indices], codes)
                codes = codes[:0]  # they are in their files; the part tells that these are whole
            parts.write(number, codes=codes, skipped=left_out)

    with ThreadPoolExecutor(1) as writer:  # writes a part while the next is encoded
        written = None
        for number, indices, codes, readable in encode_parts(
            tokenizer, images, mine, args, processes
        ):
            if written is not None:
                written.result()
            skipped += indices[~readable].tolist()
            refuse_too_many(skipped, paths, args.skip_unreadable)
            written = writer.submit(
                write, number, indices[readable], codes[readable], indices[~readable]
            )
        if written is not None:
            written.result()
    processes.wait_for_everyone()

    if processes.is_main_process:
        skipped = skipped_images(parts)
        refuse_too_many(skipped, paths, args.skip_unreadable)
        left_out = set(skipped)
        kept = [i for i in range(len(samples)) if i not in left_out]
        if not kept:
            raise InputError(f"none of the images under {root} is readable")
        about = {
            **{key: value for key, value in settings.items() if key != "layout"},
            "preprocessing": preprocessing(kind, args.img_size),
            "skipped": [paths[i] for i in sorted(skipped)],
            "software": {
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "pillow": pillow_version,
                "numpy": np.__version__,
            },
        }
        with writing(work):
            if args.format == "npz":
                finish_images(store, len(kept), VIEWS[kind], config, classes, about)
            else:
                labels = [samples[i][1] for i in kept]
                join(
                    store,
                    parts,
                    VIEWS[kind],
                    config,
                    labels,
                    [paths[i] for i in kept],
                    classes,
                    about,
                )
            os.rename(store, cache)
            sync_folder(cache.parent)
        shutil.rmtree(work, ignore_errors=True)
        lock.close()
        shutil.rmtree(work, ignore_errors=True)  # NFS keeps a folder with an open file
        if skipped:
            print(f"skipped {listed(skipped, paths)}; the manifest lists them")
        print(f"wrote {cache}: {len(kept)} images x {VIEWS[kind]} views, {kind}, {args.dtype}")
    processes.wait_for_everyone()


def load_encoder(
    config: TokenizerConfig, state: dict[str, Tensor], path: str, device: torch.device
) -> Tokenizer:
    with torch.device("meta"):
        tokenizer = Tokenizer(config, with_decoder=False)
    tokenizer.to_empty(device=device)
    # Either stage's file will do: its decoder, and stage 1's clustering buffer, stay on disk.
    ignore, keep = ("decoder.", "quantize.embed_prob"), ("quantize.embed_prob",)
    load_tensors(tokenizer, state, path, ignore=ignore, keep=keep)
    return tokenizer.eval()


def fingerprint_of_names(paths: list[str]) -> str:
    return fingerprint({"encoder." + "\n".join(paths): torch.zeros(0)})


def preprocessing(kind: str, size: int) -> str:
    side = size if kind == "center_flip" else int(size * 1.1)
    return (
        f"8-bit RGB, EXIF rotation ignored; ADM centre crop to {side} px (BOX halvings, then "
        f"BICUBIC); {kind} of {size} px; values / 255"
    )


def already_complete(cache: Path, settings: dict[str, Any]) -> bool:
    """Whether the cache is there with these settings; other contents are refused."""
    if not cache.exists():
        return False
    if not (cache / MANIFEST).is_file():
        raise InputError(f"{cache} is in the way and is no token cache: give another --cached_path")
    manifest = open_tokens(cache).manifest
    changed = differing({key: manifest.get(key) for key in settings}, settings)
    if changed:
        raise InputError(
            f"{cache} was made with other settings: {changed}; remove it or give another "
            f"--cached_path"
        )
    return True


# ---------------------------------------------------------------------- unreadable images
class Readable(Dataset):
    """(views, True) of an image. With `skip`, an unreadable one gives (black views, False).

    It keeps its place in its batch, so that what is encoded together does not depend on it.
    """

    def __init__(self, images: CroppedImages, skip: bool):
        self.images, self.skip = images, skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        try:
            return self.images[index], True
        except InputError:
            if not self.skip:
                raise
            size = self.images.size
            return torch.zeros(VIEWS[self.images.kind], 3, size, size, dtype=torch.uint8), False


def skipped_images(parts: Parts) -> list[int]:
    """Indices of the images that the finished parts leave out."""
    finished = (n for n in range(parts.count) if parts.path(n).exists())
    return [i for n in finished for i in parts.read(n, "skipped").tolist()]


def listed(indices: list[int], paths: list[str]) -> str:
    names = [paths[i] for i in sorted(indices)[:NAMED]] + ["…"] * (len(indices) > NAMED)
    return f"{len(indices)} unreadable image{'s' * (len(indices) > 1)}: {', '.join(names)}"


def refuse_too_many(skipped: list[int], paths: list[str], limit: int) -> None:
    if len(skipped) > limit:
        raise InputError(
            f"more than --skip_unreadable {limit}: {listed(skipped, paths)}; repair or remove them, "
            f"or allow more"
        )


# ---------------------------------------------------------------------- encoding
@torch.inference_mode()
def encode(tokenizer: Tokenizer, images: Tensor, dtype: str) -> Tensor:
    """Images (B, 3, S, S), float32 in [0, 1] -> codes (B, T), int64.

    dtype is that of the encoder: fp32 (exact), tf32 (CUDA's matrix products alone) or bf16 (autocast,
    attention included). The nearest code is chosen in float32 always.
    """
    for block in tokenizer.encoder.transformer:
        block.attn.exact = dtype != "bf16"
    set_matmul_precision("tf32" if dtype == "tf32" else "fp32")
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        latents = tokenizer.encoder(images, tokenizer.latent_tokens)
    set_matmul_precision("fp32")
    return tokenizer.quantize.nearest(latents)


def print_agreement(
    tokenizer: Tokenizer, images: Readable, args: argparse.Namespace, device: torch.device
) -> None:
    """How many codes of the first batches are those of exact float32."""
    same = []
    for start in range(0, min(len(images), COMPARED_BATCHES * args.batch_size), args.batch_size):
        batch = [images[i][0] for i in range(start, min(start + args.batch_size, len(images)))]
        pixels = to_float(torch.cat(batch).to(device))
        same.append(encode(tokenizer, pixels, args.dtype) == encode(tokenizer, pixels, "fp32"))
    agreeing = torch.cat(same).float().mean().item()
    print(
        f"{args.dtype} agrees with fp32 on {agreeing:.3%} of the {torch.cat(same).numel()} codes of "
        f"the first batches"
    )


def on_device(batches: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with their first tensor on the device, copied while earlier ones are computed.

    The copies run on a stream of their own, from pinned memory; the caller is ahead of the device
    as long as it asks nothing back of it.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies, compute = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for views, readable in batches:
        with torch.cuda.stream(copies):
            views = views.to(device, non_blocking=True)
        compute.wait_stream(copies)
        views.record_stream(compute)  # its memory is not given to a later copy before then
        yield views, readable


def encode_parts(
    tokenizer: Tokenizer,
    images: Dataset,
    numbers: list[int],
    args: argparse.Namespace,
    processes: PartialState,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(number, indices (n,), codes (n, V, T) uint16, readable (n,) bool) of the given parts."""
    per_part = BATCHES_PER_PART * args.batch_size
    ranges = {n: range(n * per_part, min((n + 1) * per_part, len(images))) for n in numbers}
    # Batches never cross a part, so that what is encoded together is fixed by the index.
    batches = {
        n: [r[i : i + args.batch_size] for i in range(0, len(r), args.batch_size)]
        for n, r in ranges.items()
    }
    loader = DataLoader(
        images,
        batch_sampler=[batch for n in numbers for batch in batches[n]],
        num_workers=args.num_workers,
        pin_memory=processes.device.type == "cuda",
    )
    arriving = on_device(loader, processes.device)
    total = sum(map(len, ranges.values()))
    share = f" (1 of {processes.num_processes})" if processes.num_processes > 1 else ""
    with tqdm(
        total=total, unit="img", desc=f"encode{share}", disable=not processes.is_main_process
    ) as bar:
        for number in numbers:
            codes, readable = [], []
            for _ in batches[number]:
                views, whole = next(arriving)  # (n, V, 3, S, S) uint8, (n,) bool
                batch = encode(tokenizer, to_float(views.flatten(0, 1)), args.dtype)
                codes.append(batch.unflatten(0, views.shape[:2]).int())
                readable.append(whole)
                bar.update(len(views))
            # The one place that waits for the device, once a part.
            whole = torch.cat(codes).cpu().numpy().astype(np.uint16)
            yield number, np.array(ranges[number]), whole, torch.cat(readable).numpy()


# ---------------------------------------------------------------------- writing
def write_images(store: Path, paths: list[str], codes: np.ndarray) -> None:
    """The published layout: codes (n, V, T) as one file an image, durable when this returns."""
    for path, image in zip(paths, codes):
        file = store / f"{path}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, codes=image.astype(np.int64))
    os.sync()  # once for all of them: an fsync a file takes ten times as long


def finish_images(
    store: Path,
    images: int,
    views: int,
    config: TokenizerConfig,
    classes: list[str],
    about: dict[str, Any],
) -> None:
    """The manifest that the published layout lacks, beside its folders."""
    for name in classes:
        (store / name).mkdir(exist_ok=True)  # a class keeps its rank where no image is readable
        sync_folder(store / name)
    shape = {"images": images, "views": views, "tokens": config.num_tokens}
    size = {"codebook_size": config.codebook_size}
    write_manifest(store, {"layout": "npz", **shape, **size, **about, "classes": classes})
    sync_file(store / MANIFEST)
    sync_folder(store)


def join(
    store: Path,
    parts: Parts,
    views: int,
    config: TokenizerConfig,
    labels: list[int],
    paths: list[str],
    classes: list[str],
    about: dict[str, Any],
) -> None:
    """The parts as shards, in order, with a manifest."""
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    writer = TokenWriter(store, views, config.num_tokens, config.codebook_size)
    for number in tqdm(range(parts.count), unit="part", desc="join"):
        writer.append(parts.read(number, "codes"))
    writer.finish(labels, paths, classes, about)
    for file in store.iterdir():
        sync_file(file)
    sync_folder(store)


if __name__ == "__main__":
    run(main)
