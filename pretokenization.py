"""Images to codes: encode an image folder once, into a packed token cache that training reads.

    python pretokenization.py --img_size 256 --batch_size 32 --ten_crop --data_path imagenet/train
    torchrun --nproc_per_node=8 pretokenization.py …            the same cache from 8 GPUs

Killed and started again it goes on, and the cache is the same bytes on any number of processes:
images are encoded in fixed batches of consecutive indices, whoever encodes them.
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torchvision
from accelerate import PartialState
from omegaconf import OmegaConf
from PIL import __version__ as pillow_version
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from configs.schema import GeneratorModels, check_names
from data.images import VIEWS, CroppedImages, list_images, to_float
from data.parts import Parts, check_settings, sync_folder
from data.tokens import MANIFEST, TokenStore, TokenWriter, fingerprint
from modeling.errors import InputError
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights import load_tensors, read_state_dict
from training.runtime import run, start_processes

BATCHES_PER_PART = 16  # what a killed run loses at most, per process


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="image folder: one folder a class")
    parser.add_argument("--img_size", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded together (32)")
    crops = parser.add_mutually_exclusive_group()
    crops.add_argument("--ten_crop", action="store_true", help="ten crops an image, with mirrors")
    crops.add_argument("--five_crop", action="store_true", help="the five crops without mirrors")
    parser.add_argument("--cached_path", default="cache_alitok", help="the cache to write")
    parser.add_argument("--tokenizer_checkpoint", default="weights/AliTok.pth")
    parser.add_argument("--config", help="YAML whose model.vq_model describes another tokenizer")
    parser.add_argument("--num_workers", type=int, default=8, help="decoding processes (8)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one")
    return parser.parse_args(argv)


def tokenizer_config(path: str | None, image_size: int) -> TokenizerConfig:
    """The published sizes, or those of `model.vq_model` in a config, for this image size."""
    options = OmegaConf.create({})
    if path is not None:
        if not Path(path).is_file():
            raise InputError(f"no config file {path}")
        options = OmegaConf.select(OmegaConf.load(path), "model.vq_model") or options
        check_names(TokenizerConfig, options, path, "model.vq_model.")
    schema = OmegaConf.structured(GeneratorModels).vq_model
    return OmegaConf.to_object(OmegaConf.merge(schema, options, {"image_size": image_size}))


def main(argv: list[str]) -> None:
    args = parse(argv)
    config = tokenizer_config(args.config, args.img_size)
    kind = "ten_crop" if args.ten_crop else "five_crop" if args.five_crop else "center_flip"
    samples, classes = list_images(args.data_path)
    root = Path(args.data_path)
    paths = [Path(path).relative_to(root).as_posix() for path, _ in samples]

    state = read_state_dict(args.tokenizer_checkpoint)
    processes = start_processes(args.device)
    with torch.device("meta"):
        tokenizer = Tokenizer(config, with_decoder=False)
    tokenizer.to_empty(device=processes.device)
    # Either stage's file will do: its decoder, and stage 1's clustering buffer, stay on disk.
    load_tensors(
        tokenizer,
        state,
        args.tokenizer_checkpoint,
        ignore=("decoder.", "quantize.embed_prob"),
        keep=("quantize.embed_prob",),
    )
    tokenizer.eval()

    settings = {
        "tokenizer": fingerprint(state),
        "image_size": args.img_size,
        "crops": kind,
        "batch_size": args.batch_size,
        "images": len(samples),
        "classes": len(classes),
        "paths": fingerprint_of_names(paths),
    }
    cache = Path(args.cached_path)
    if already_complete(cache, settings):
        processes.print(f"{cache} is complete: {len(samples)} images")
        return
    work = cache.with_name(cache.name + ".partial")
    remedy = "remove it, or give another --cached_path"
    if processes.is_main_process:
        check_settings(work / "settings.json", settings, remedy)
    processes.wait_for_everyone()
    check_settings(work / "settings.json", settings, remedy)

    per_part = BATCHES_PER_PART * args.batch_size
    parts = Parts(work / "parts", -(-len(samples) // per_part))
    mine = parts.missing(processes.process_index, processes.num_processes)
    processes.wait_for_everyone()  # before any rank adds a part that another still counts
    dataset = CroppedImages([path for path, _ in samples], args.img_size, kind)
    encode_parts(tokenizer, dataset, parts, mine, per_part, args, processes)
    processes.wait_for_everyone()

    if processes.is_main_process:
        about = {
            "image_size": args.img_size,
            "crops": kind,
            "batch_size": args.batch_size,
            "tokenizer": settings["tokenizer"],
            "path_names": settings["paths"],
            "software": {
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "pillow": pillow_version,
                "numpy": np.__version__,
            },
        }
        assemble(work, cache, parts, config, VIEWS[kind], samples, paths, classes, about)
    processes.wait_for_everyone()
    processes.print(f"wrote {cache}: {len(samples)} images x {VIEWS[kind]} views, {kind}")


def fingerprint_of_names(paths: list[str]) -> str:
    return fingerprint({"encoder." + "\n".join(paths): torch.zeros(0)})


def already_complete(cache: Path, settings: dict) -> bool:
    """Whether the cache is there with these settings; other contents are refused."""
    if not cache.exists():
        return False
    if not (cache / MANIFEST).is_file():
        raise InputError(f"{cache} is in the way and is no token cache: give another --cached_path")
    manifest = TokenStore(cache).manifest
    found = {
        **{key: manifest.get(key) for key in settings},
        "classes": len(manifest["classes"]),
        "paths": manifest.get("path_names"),
    }
    differing = [
        f"{k} ({found[k]} there, {settings[k]} now)" for k in settings if found[k] != settings[k]
    ]
    if differing:
        raise InputError(
            f"{cache} was made with other settings: {', '.join(differing)}; remove it or give "
            f"another --cached_path"
        )
    return True


@torch.inference_mode()
def encode_parts(
    tokenizer: Tokenizer,
    dataset: CroppedImages,
    parts: Parts,
    numbers: list[int],
    per_part: int,
    args: argparse.Namespace,
    processes: PartialState,
) -> None:
    """Encode the images of the given parts and write each part as soon as it is whole."""
    ranges = {n: range(n * per_part, min((n + 1) * per_part, len(dataset))) for n in numbers}
    loader = DataLoader(
        Subset(dataset, [i for n in numbers for i in ranges[n]]),
        batch_size=None,
        num_workers=args.num_workers,
        pin_memory=processes.device.type == "cuda",
        prefetch_factor=2 * args.batch_size if args.num_workers else None,
    )
    images = iter(loader)
    total = sum(map(len, ranges.values()))
    bar = tqdm(total=total, unit="img", desc="encode", disable=not processes.is_main_process)
    for number in numbers:
        codes = []
        # Batches never cross a part, so that what is encoded together is fixed by the index.
        for start in range(0, len(ranges[number]), args.batch_size):
            count = min(args.batch_size, len(ranges[number]) - start)
            views = torch.stack([next(images) for _ in range(count)])  # (n, V, 3, S, S) uint8
            views = views.to(processes.device, non_blocking=True)
            batch = tokenizer.encode(to_float(views.flatten(0, 1))).unflatten(0, views.shape[:2])
            codes.append(batch.to(torch.int32).cpu().numpy())
            bar.update(count)
        parts.write(number, codes=np.concatenate(codes).astype(np.uint16))
    bar.close()


def assemble(
    work: Path,
    cache: Path,
    parts: Parts,
    config: TokenizerConfig,
    views: int,
    samples: list[tuple[str, int]],
    paths: list[str],
    classes: list[str],
    about: dict,
) -> None:
    """Join the parts into shards, in order; the cache appears under its name when it is whole."""
    store = work / "store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    writer = TokenWriter(store, views, config.num_tokens, config.codebook_size)
    for number in tqdm(range(parts.count), unit="part", desc="join"):
        writer.append(parts.read(number, "codes"))
    writer.finish([label for _, label in samples], paths, classes, about)
    for file in store.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(store)
    os.rename(store, cache)
    sync_folder(cache.parent)
    shutil.rmtree(work)


if __name__ == "__main__":
    run(main)
