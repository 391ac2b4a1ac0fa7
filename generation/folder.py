"""The files of a sampling job: chunks, which a killed run leaves for the next one, then one .npz.

OUTPUT/sampling.json     the settings; a run with other settings is refused
OUTPUT/chunks/           chunks of consecutive images and codes, until the end
OUTPUT/000000.png …      the images, if wanted
OUTPUT.npz               all images (N, S, S, 3), uint8; written last
OUTPUT_codes.npz         their codes (N, T), uint16
OUTPUT_grid.png          the first images as one picture, if wanted
"""

import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, Optional

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from data.identity import short_hash
from data.pictures import picture_grid, with_captions, write_png
from generation.images import ImageBatch, sample_images
from generation.job import Models, SamplingJob, in_options, largest_batch
from modeling.weights.metadata import UNSEEN
from runtime.errors import InputError
from runtime.files import lock_folder, whole_file
from runtime.parts import Parts, batches_of, check_settings
from runtime.processes import check_same, matmul_precision, on_main, progress

LARGEST_CHUNK = 1024  # images; every step reads the weights and starts its kernels once per chunk
SHARES = 8  # of which the number of chunks is a multiple, so that 1, 2, 4 or 8 processes have equally many
# Not "remove the folder": the generator's training run may be in it.
REMEDY = "use another experiment.output_dir, or remove what sampling left there"


class SampleFolder:
    """The output of one sampling job, written by all processes together.

    Without a generator, `job.prefix` holds the codes to decode. `png` also writes every image as a file, `grid`
    the first grid x grid images as one picture with class names.
    """

    def __init__(
        self, output: Path, job: SamplingJob, models: Models, png: bool = False, grid: int = 0
    ):
        self.output, self.job, self.models, self.processes = output, job, models, PartialState()
        self.png, self.grid, self.count = png, grid, job.count
        self.images_file = output.with_name(output.name + ".npz")
        self.codes_file = output.with_name(output.name + "_codes.npz")
        self.settings_file = output / "sampling.json"

    def settings(self) -> dict[str, Any]:
        """Everything that determines the files, except the chunk size."""
        job, models = self.job, self.models
        unseen = {name: getattr(models.tokenizer.config, name) for name in UNSEEN}
        settings = {
            "images": self.count, "png": self.png, "grid": self.grid, "precision": job.precision,
            **models.hashes, **unseen,
        }  # fmt: skip
        codes = None if job.prefix is None else job.prefix.numpy()
        if models.generator is None:
            assert codes is not None, "without a generator there are codes to decode"
            return {**settings, "codes": short_hash(codes.astype("<u2").tobytes())}
        known, prefix = models.generator.config.condition_num_classes, None
        if codes is not None:
            prefix = short_hash(f"{codes.shape[1]} ".encode() + codes.astype("<i8").tobytes())
        return {
            **settings,
            **asdict(job.sampling),
            "engine": job.engine,  # another one rounds differently
            "classes": known if job.classes == tuple(range(known)) else in_options(job.classes),
            "prefix": prefix,
            "seed": job.seed,
            "compile": job.compiled,
            "cache": job.cache,
        }

    def fill(self) -> Path:
        """Make all missing images and return the path of the .npz; all processes call this.

        Raises InputError if the folder is in use or has other settings, or if memory or disk space is
        too small; finished chunks stay.
        """
        check_same(self.settings(), "other weights or options")
        # Of all processes: the chunk must fit where memory is smallest.
        most = min(gather_object([largest_batch(self.models, self.job)]))
        chunk, finished = on_main(lambda: self._claim(most))
        # As the main process sees it: a network file system may show others an older state.
        if finished:
            self.processes.print(f"{self.images_file} is complete: {self.count} images")
            return self.images_file
        parts = Parts(self.output / "chunks", -(-self.count // chunk))
        rank, world = self.processes.process_index, self.processes.num_processes
        numbers = on_main(parts.missing)[rank::world]
        if numbers:
            self._write_chunks(parts, chunk, numbers)
        self.processes.wait_for_everyone()
        on_main(lambda: self._assemble(parts))
        self.processes.print(f"wrote {self.images_file}: {self.count} images")
        return self.images_file

    # ------------------------------------------------------------------ claiming
    def _claim(self, most: int) -> tuple[int, bool]:
        """Lock the folder until all is written, or this process ends, compare settings, and return the chunk
        size and whether the images are complete.

        An unfinished job is refused before anything is written if its chunk has more than the `most` images
        that fit into memory.
        """
        finished = self.images_file.exists()
        if finished and not self.settings_file.exists():
            raise InputError(
                f"{self.images_file} exists, but sampling did not write it: move it away, or use another "
                f"experiment.output_dir"
            )
        fitting = even_chunk(self.count, max(min(most, LARGEST_CHUNK), 1))
        chunk = self.job.chunk or self._earlier_chunk() or fitting
        if not finished and chunk > most:
            smaller = (
                f", or set experiment.per_proc_batch_size={most}, with another experiment.output_dir if this "
                f"one holds images"
            )
            raise InputError(
                f"too little free memory on {self.models.device} for {chunk} images at once: {most} "
                f"fit; free some{smaller * bool(most)}"
            )
        self._lock = lock_folder(self.output)
        if not self.settings_file.exists():
            for left in (self.output / "chunks").glob("[0-9]" * 6 + ".npz"):  # of no known settings
                left.unlink()
        check_settings(self.settings_file, {**self.settings(), "chunk": chunk}, REMEDY)
        if finished:
            shutil.rmtree(self.output / "chunks", ignore_errors=True)  # of a killed clean-up
            self._lock.close()
        return chunk, finished

    def _earlier_chunk(self) -> Optional[int]:
        """The chunk size of an earlier run, if readable."""
        try:
            return int(json.loads(self.settings_file.read_text())["chunk"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # check_settings reports damage

    # ------------------------------------------------------------------ writing
    def _write_chunks(self, parts: Parts, chunk: int, numbers: list[int]) -> None:
        """Make this process's chunks; threads write one while the next is made."""
        job, models, engine = self.job, self.models, None
        chunks = batches_of(self.count, chunk)
        ranges = [chunks[number] for number in numbers]
        with (
            matmul_precision(job.precision),
            progress(sum(map(len, ranges)), "img", "sample") as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            if models.generator is not None:
                self.processes.print(
                    f"sampling {chunk} images at once, {job.precision}, compile={job.compiled}"
                )
                engine = job.sampler(models.generator, chunk)
            batches = sample_images(engine, models.tokenizer, job, ranges)
            written = writer.submit(lambda: None)
            for number, batch in zip(numbers, batches):
                written.result()  # of the chunk before
                written = writer.submit(self._write_chunk, parts, number, batch, bar)
            written.result()

    def _write_chunk(self, parts: Parts, number: int, batch: ImageBatch, bar: tqdm) -> None:
        if self.png:
            # Before the chunk, which implies that its pictures exist.
            names = [self.output / f"{i:06d}.png" for i in batch.indices]
            with ThreadPoolExecutor() as painters:
                list(painters.map(write_png, batch.images, names))
            os.sync()  # once for all of them
        parts.write(number, images=batch.images, codes=batch.codes.astype(np.uint16))
        bar.update(len(batch.indices))

    def _assemble(self, parts: Parts) -> None:
        """Make the final files of all chunks, the images last, and remove the chunks."""
        concatenate_parts(parts, self.codes_file, "codes", self.count)
        if self.grid:
            stored = (parts.read(number, "images") for number in range(parts.count))
            images = np.stack(list(islice(chain.from_iterable(stored), self.grid**2)))
            path = self.output.with_name(self.output.name + "_grid.png")
            names = self.models.names
            if names is not None:
                labels = self.job.labels(range(len(images))).tolist()
                images = with_captions(images, [names.caption(label) for label in labels])
            write_png(picture_grid(images, self.grid), path)
        concatenate_parts(parts, self.images_file, "images", self.count)
        shutil.rmtree(parts.folder, ignore_errors=True)
        self._lock.close()


def concatenate_parts(parts: Parts, path: Path, name: str, count: int) -> None:
    """Stream one array of all parts, with `count` rows, into an .npz (key `arr_0`), part by part."""
    first = parts.read(0, name)
    shape = (count, *first.shape[1:])
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        entry = zipfile.ZipInfo("arr_0.npy")  # a fixed date: the same images, the same bytes
        with archive.open(entry, "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for number in tqdm(range(parts.count), unit="chunk", desc=path.name, disable=None):
                file.write(np.ascontiguousarray(parts.read(number, name)).data)


def even_chunk(count: int, most: int) -> int:
    """The size of chunks of at most `most` images; more than one come in multiples of `SHARES`.

    It must not depend on the number of processes, because another size rounds differently.
    """
    chunks = -(-count // most)
    if chunks > 1:
        chunks = -(-chunks // SHARES) * SHARES
    return -(-count // chunks)
