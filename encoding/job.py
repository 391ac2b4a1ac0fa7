"""Images to codes: the job of pretokenization, resumable and on any number of processes.

Batches are fixed ranges of consecutive indices, so the bytes of a cache depend neither on the number of
processes nor on interruptions.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset

from data.cache import MANIFEST
from data.classes import first_names
from data.identity import hash_of_texts, short_hash, size_and_time, sizes_and_times
from data.images import VIEWS, ImageListing, ImagePath, source_size, views_of
from data.loader import batch_loader
from data.npz import write_npz_files, write_npz_manifest
from data.tokens import open_tokens, write_packed_store
from modeling.photos import center_crop, load_photo, to_uint8
from modeling.pixels import to_float
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights.tensors import fingerprint
from runtime.errors import InputError
from runtime.files import lock_folder, sync_folder, writing
from runtime.parts import Parts, batches_of, check_settings, differing
from runtime.processes import check_same, matmul_precision, on_main, progress

BATCHES_PER_PART = 16  # a killed run loses at most this many per process
COMPARED_BATCHES = 2  # also encoded in float32, to report how often another precision agrees
# Largest activation in bytes when a CPU encodes images: glibc returns blocks over 32 MiB to the system,
# which clears each page at the next use. Another value rounds differently.
CPU_ACTIVATION = 24 * 2**20
# An image's facts, int64: 0 or 1, 0 or 1 (by EXIF), bytes, time of the last change in seconds.
READABLE, ROTATED, SIZE, TIME = range(4)


@dataclasses.dataclass(frozen=True)
class EncodingPlan:
    """How images become a cache. All but the last two fields determine its bytes."""

    image_size: int  # pixels per side of a view
    crops: str  # a key of `data.images.VIEWS`
    dtype: str = "fp32"  # of the encoder: fp32, tf32 or bf16
    batch_size: int = 32  # images encoded together (on a CPU, in parts)
    layout: str = "packed"  # or npz, the published layout
    skip_unreadable: int = 0  # images that may be left out
    num_workers: int = 8  # decoding processes per rank


# ---------------------------------------------------------------------- the job
class WorkFolder:
    """CACHE.partial: settings, finished parts and finally the store of one cache."""

    def __init__(
        self, images: ImageListing, plan: EncodingPlan, settings: dict[str, Any], cache: Path
    ):
        self.images, self.plan, self.settings, self.cache = images, plan, settings, cache
        self.paths = images.names
        self.folder = cache.with_name(cache.name + ".partial")
        self.store = self.folder / "store"
        part = BATCHES_PER_PART * plan.batch_size  # images
        self.ranges = batches_of(len(self.paths), part)  # of the images of every part
        self.parts = Parts(self.folder / "parts", len(self.ranges))

    def is_complete(self) -> bool:
        """Whether the cache exists with these settings. Raises InputError if it has others."""
        cache = self.cache
        if not cache.exists():
            return False
        if not (cache / MANIFEST).is_file():
            raise InputError(
                f"{cache} exists, but is not a token cache: choose another --cached_path"
            )
        manifest = open_tokens(cache).manifest

        def refuse_others(now: dict[str, Any]) -> None:
            changed = differing({key: manifest.get(key) for key in now}, now)
            if changed:
                raise InputError(
                    f"{cache} was made with other settings or images: {changed}; remove it or choose "
                    f"another --cached_path"
                )

        refuse_others(self.settings)
        stats = sizes_and_times(self.images.paths)  # minutes on a network file system
        refuse_others({"image_sizes": short_hash(stats[:, 0].tobytes())})
        newer = np.flatnonzero(stats[:, 1] > (cache / MANIFEST).stat().st_mtime)
        if len(newer):
            print(
                f"warning: {len(newer)} images were changed after {cache} was made "
                f"({first_names([self.paths[i] for i in newer])}): remove it to encode them again"
            )
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run killed while it cleaned up
        return True

    def claim(self) -> list[int]:
        """Lock the folder until `release`, check that its settings and images are the same, and return the
        numbers of the parts that are missing."""
        self._lock = lock_folder(self.folder)
        with writing(self.folder):
            settings = self.folder / "settings.json"
            if not settings.exists():  # of no known settings
                for folder in (self.parts.folder, self.store):
                    shutil.rmtree(folder, ignore_errors=True)
            check_settings(settings, self.settings, "remove it, or choose another --cached_path")
            if self.plan.layout == "npz" and not self.store.exists():
                shutil.rmtree(self.parts.folder, ignore_errors=True)  # their files are gone
                self.store.mkdir()
        self.refuse_edited()
        return self.parts.missing()

    def release(self) -> None:
        """Remove the folder and its lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # NFS keeps a folder with an open file

    def write_part(self, number: int, codes: np.ndarray, facts: np.ndarray) -> None:
        """Write the codes (N, V, T) of a part's readable images, and the facts (N, 4) of all."""
        indices, readable = np.array(self.ranges[number]), facts[:, READABLE] == 1
        codes = codes[readable]
        with writing(self.folder):
            if self.plan.layout == "npz":
                for i in indices[~readable]:  # an earlier run may have been able to read them
                    (self.store / f"{self.paths[i]}.npz").unlink(missing_ok=True)
                write_npz_files(self.store, [self.paths[i] for i in indices[readable]], codes)
                codes = codes[:0]  # the part records only that these files are whole
            self.parts.write(number, codes=codes, facts=facts)

    def refuse_edited(self) -> None:
        """Raise InputError if images changed after they were encoded.

        Parts with unreadable images are removed, to be made again: the images may have been repaired, or
        their file system may have failed for a moment.
        """
        done = [n for n in range(self.parts.count) if self.parts.path(n).exists()]
        if not done:
            return
        indices = np.concatenate([self.ranges[n] for n in done])
        facts = np.concatenate([self.parts.read(n, "facts") for n in done])
        now = sizes_and_times([self.images.paths[i] for i in indices])
        changed, readable = (facts[:, [SIZE, TIME]] != now).any(1), facts[:, READABLE] == 1
        edited = indices[changed & readable]
        if len(edited):
            raise InputError(
                f"{len(edited)} images were changed after they were encoded "
                f"({first_names([self.paths[i] for i in edited])}): restore them with their times "
                f"(cp -p, rsync -t), or remove {self.folder} and start anew"
            )
        for number in {i // (BATCHES_PER_PART * self.plan.batch_size) for i in indices[~readable]}:
            self.parts.path(number).unlink()

    def describe_skipped(self, skipped: list[int]) -> str:
        names = first_names([self.paths[i] for i in sorted(skipped)])
        return f"{len(skipped)} unreadable image{'s' * (len(skipped) > 1)}: {names}"

    def refuse_too_many(self, skipped: list[int]) -> None:
        limit = self.plan.skip_unreadable
        if len(skipped) > limit:
            raise InputError(
                f"more than --skip_unreadable {limit}: {self.describe_skipped(skipped)}; repair them or "
                f"allow more (deleting them changes the listing, so encoding starts over)"
            )


def encode_folder(
    images: ImageListing, encoder: Tokenizer, plan: EncodingPlan, cache: Path
) -> None:
    """Encode the images of a folder or tar into the token cache `cache`; all processes call this.

    `encoder` is in eval mode and may lack its decoder. Parts that an interrupted call finished are reused.
    Raises InputError for a cache with other settings, or more than `plan.skip_unreadable` unreadable images.
    """
    paths, processes = images.names, PartialState()
    settings = {
        **dataclasses.asdict(plan),
        "tokenizer": fingerprint(encoder.state_dict()),
        "encoder_heads": encoder.config.encoder_heads,
        "listed_images": len(paths),
        "listing": hash_of_texts(paths),
    }
    del settings["skip_unreadable"], settings["num_workers"]  # they change no bytes
    check_same(settings, "other images or weights")
    if cache.is_symlink() and not cache.exists():  # a folder cannot be renamed to a link
        cache = cache.resolve()
    work = WorkFolder(images, plan, settings, cache)
    if on_main(work.is_complete):
        processes.print(f"{cache} is complete: {len(paths)} images are listed")
        return
    # As the main process sees them: a network file system may show others an older state.
    missing = on_main(work.claim)[processes.process_index :: processes.num_processes]
    skipped: list[int] = []
    source = ReadableCrops(images.paths, plan)
    if plan.dtype != "fp32" and processes.is_main_process:
        print_agreement(encoder, source, plan)
    with ThreadPoolExecutor(1) as writer:  # writes a part while the next is encoded
        written = writer.submit(lambda: None)
        ranges = [work.ranges[number] for number in missing]
        for (codes, facts), number in zip(encode_parts(encoder, source, plan, ranges), missing):
            written.result()
            skipped += np.array(work.ranges[number])[facts[:, READABLE] == 0].tolist()
            work.refuse_too_many(skipped)
            written = writer.submit(work.write_part, number, codes, facts)
        written.result()
    processes.wait_for_everyone()

    on_main(lambda: publish(work, encoder.config))


def publish(work: WorkFolder, config: TokenizerConfig) -> None:
    """Make the cache from the finished parts, move it into place and remove the work folder."""
    plan, images, paths = work.plan, work.images, work.paths
    if work.parts.missing():  # a part that a process made does not show yet, or was removed
        raise InputError(f"{work.folder} lacks parts: run the same command again")
    facts = np.concatenate([work.parts.read(n, "facts") for n in range(work.parts.count)])
    skipped = np.flatnonzero(facts[:, READABLE] == 0).tolist()
    work.refuse_too_many(skipped)
    kept = np.flatnonzero(facts[:, READABLE]).tolist()
    if not kept:
        raise InputError(f"none of the images under {images.root} is readable")
    views, rotated = VIEWS[plan.crops], int(facts[:, ROTATED].sum())
    about = {
        "images": len(kept),
        "views": views,
        "tokens": config.num_tokens,
        "codebook_size": config.codebook_size,
        **{key: value for key, value in work.settings.items() if key != "layout"},
        "preprocessing": (
            f"8-bit RGB (16-bit grey scaled, transparent pixels on white), EXIF rotation ignored; ADM "
            f"centre crop to {source_size(plan.image_size, plan.crops)} px (BOX halvings, then BICUBIC); "
            f"{plan.crops} of {plan.image_size} px; values / 255"
        ),
        "skipped": [paths[i] for i in skipped],
        "rotated": rotated,
        "image_sizes": short_hash(facts[:, SIZE].tobytes()),
        "software": {name: version(name) for name in ("torch", "torchvision", "pillow", "numpy")},
        "classes": images.classes,
    }
    with writing(work.folder):
        if plan.layout == "npz":
            write_npz_manifest(work.store, about)
        else:
            labels, names = images.labels[kept].tolist(), [paths[i] for i in kept]
            count = work.parts.count
            numbers = progress(count, "part", "pack", range(count))
            blocks = (work.parts.read(number, "codes") for number in numbers)
            write_packed_store(work.store, blocks, labels, names, about)
        os.rename(work.store, work.cache)
        sync_folder(work.cache.parent)
    work.release()
    if skipped:
        print(f"skipped {work.describe_skipped(skipped)}; the manifest lists them")
    if rotated:
        print(
            f"warning: {rotated} images carry an EXIF rotation, which the cache ignores, as the published "
            f"program does: rotate the files if their pixels lie sideways"
        )
    print(f"wrote {work.cache}: {len(kept)} images x {views} views, {plan.crops}, {plan.dtype}")


# ---------------------------------------------------------------------- encoding
class ReadableCrops(Dataset):
    """(source crop (3, L, L), facts (4,), int64) of image i.

    With `skip_unreadable`, an unreadable image is black, so that batches stay the same.
    """

    def __init__(self, paths: Sequence[ImagePath], plan: EncodingPlan):
        self.paths, self.side = paths, source_size(plan.image_size, plan.crops)
        self.skip = plan.skip_unreadable > 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        stat = size_and_time(self.paths[index])
        try:
            image, turn = load_photo(self.paths[index])
            crop, found = to_uint8(center_crop(image, self.side)), (1, turn is not None)
        except InputError as e:
            if not self.skip:
                raise InputError(f"{e}, or set --skip_unreadable N to leave out at most N") from e
            crop, found = torch.zeros(3, self.side, self.side, dtype=torch.uint8), (0, 0)
        return crop, torch.tensor([*found, *stat])


def encode_parts(
    encoder: Tokenizer, source: ReadableCrops, plan: EncodingPlan, ranges: list[range]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of the images of every range: codes (N, V, T), uint16, which are meaningless for unreadable images, and
    facts (N, 4). No batch spans two ranges. Views are cut on the device."""
    device, processes = encoder.latent_tokens.device, PartialState()
    size, total = plan.batch_size, sum(map(len, ranges))
    batches = [[part[i : i + size] for i in range(0, len(part), size)] for part in ranges]
    arriving = iter(batch_loader(source, [*chain(*batches)], plan.num_workers, device))
    share = f" (1 of {processes.num_processes})" if processes.num_processes > 1 else ""
    with progress(total, "img", f"encode{share}") as bar:
        for part in batches:
            codes, facts = [], []
            for crops, known in islice(arriving, len(part)):  # (n, 3, L, L) uint8, (n, 4) int64
                crops = crops.to(device, non_blocking=True)
                codes.append(encode_views(encoder, crops, plan, plan.dtype).int())
                facts.append(known)
                bar.update(len(crops))
            # The only place that waits for the device, once per part.
            yield torch.cat(codes).cpu().numpy().astype(np.uint16), torch.cat(facts).numpy()


def encode_views(encoder: Tokenizer, crops: Tensor, plan: EncodingPlan, dtype: str) -> Tensor:
    """Source crops (n, 3, L, L), uint8, on the encoder's device -> codes (n, V, T), int64."""
    views = torch.stack(views_of(crops, plan.image_size, plan.crops), 1)  # (n, V, 3, S, S)
    codes = encode(encoder, to_float(views.flatten(0, 1)), dtype)
    return codes.unflatten(0, views.shape[:2])


@torch.inference_mode()
def encode(tokenizer: Tokenizer, images: Tensor, dtype: str) -> Tensor:
    """Images (B, 3, S, S), float32 in [0, 1] -> codes (B, T), int64.

    `dtype` is the precision of the encoder: fp32, tf32 (matrix products and convolutions on CUDA) or
    bf16 (autocast). The nearest code is always found in full float32.
    """
    bf16 = torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bf16")
    codes = []
    for part in images.split(encoded_at_once(tokenizer, images)):
        with matmul_precision("tf32" if dtype == "tf32" else "fp32"), bf16:
            latents = tokenizer.encoder(part, tokenizer.latent_tokens)
        with matmul_precision("fp32"):
            codes.append(tokenizer.quantize.encode(latents))
    return torch.cat(codes)


def encoded_at_once(tokenizer: Tokenizer, images: Tensor) -> int:
    """How many of the images are encoded together: all on a GPU, a few on a CPU."""
    if images.device.type != "cpu":
        return len(images)
    config = tokenizer.config
    tokens = config.grid**2 + config.num_tokens
    hidden = tokens * 4 * config.encoder_width * images.element_size()  # of the MLP, per image
    return max(CPU_ACTIVATION // hidden, 1)


def print_agreement(encoder: Tokenizer, source: ReadableCrops, plan: EncodingPlan) -> None:
    """Print how many codes of the first batches equal those of float32."""
    equal = []
    for batch in batches_of(len(source.paths), plan.batch_size)[:COMPARED_BATCHES]:
        crops = torch.stack([source[i][0] for i in batch]).to(encoder.latent_tokens.device)
        exact = encode_views(encoder, crops, plan, "fp32")
        equal.append(encode_views(encoder, crops, plan, plan.dtype) == exact)
    codes = torch.cat(equal).float()
    print(
        f"{plan.dtype} agrees with fp32 on {codes.mean().item():.3%} of the {codes.numel()} codes of "
        f"the first batches"
    )
