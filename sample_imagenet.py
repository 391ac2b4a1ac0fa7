"""Sample images for FID: `torchrun --nproc_per_node=8 sample_imagenet.py config=FILE option=value …`.

Image i has class i mod (number of classes) and randomness from (seed, i) alone. The work is cut
into fixed chunks of consecutive indices, so the images are the same on any number of processes.
Killed and started again it goes on; `OUTPUT_DIR.npz` appears when all images are there.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import configs.load
from configs.schema import GeneratorExperiment, GeneratorRun
from evaluation.compare import Evaluator, show
from evaluation.sources import open_images
from modeling.engine import DECODED_AT_ONCE, Engine, cache_bytes, decode_images
from modeling.generator import Generator, GeneratorConfig
from modeling.sampling import Sampling, check_classes
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights import load_tensors
from runtime.errors import InputError
from runtime.files import lock_folder, whole_file, writing
from runtime.parts import Parts, check_settings
from runtime.processes import compiles, set_matmul_precision, start_processes
from runtime.program import run
from runtime.randomness import image_uniforms
from training.checkpoint import read_weights

LARGEST_CHUNK = 256  # larger ones gain little and share out worse among processes
# Not "remove the folder": the run of a generator may be in it.
REMEDY = "give another experiment.output_dir, or remove what sampling left there"


def main(argv: list[str]) -> None:
    options = configs.load.load(GeneratorRun, argv, "sample_imagenet")
    experiment, sampler = options.experiment, options.model.generator
    classes = experiment.classes or range(sampler.condition_num_classes)
    check_classes(min(classes), max(classes), sampler.condition_num_classes)
    count, given = experiment.num_fid_samples, None
    generator_state = None
    if experiment.codes is not None:
        given = read_codes(experiment.codes, options.model.vq_model)
        count = len(given)
    elif experiment.generator_checkpoint is None:
        raise InputError(
            "give experiment.generator_checkpoint=FILE, for example weights/alitok_b.bin"
        )
    else:
        generator_state = read_weights(experiment.generator_checkpoint, "ema", "generator")
    tokenizer_state = read_weights(experiment.tokenizer_checkpoint, "tokenizer")
    processes = start_processes()
    # A mistake in the reference shows now, not after hours of sampling.
    evaluator = Evaluator.open(experiment.evaluate, processes) if experiment.evaluate else None
    device = processes.device
    tokenizer = Tokenizer(options.model.vq_model)
    load_tensors(tokenizer, tokenizer_state, experiment.tokenizer_checkpoint)
    tokenizer.to(device).eval()
    if generator_state is not None:
        generator = Generator(sampler)
        load_tensors(generator, generator_state, experiment.generator_checkpoint)
        generator.to(device).eval()
    precision, compiled = resolve(experiment, device)
    set_matmul_precision(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    output = Path(experiment.output_dir)
    final = output.with_name(output.name + ".npz")
    if final.exists() and not (output / "sampling.json").exists():
        raise InputError(f"{final} is in the way and none of ours: {REMEDY}")
    processes.wait_for_everyone()
    settings = {
        "images": count,
        "tokenizer": state_hash(tokenizer_state),
        "png": experiment.save_png,
        "grid": experiment.grid,
        "precision": precision,
    }
    if given is None:
        settings |= {
            "classes": list(classes) if experiment.classes else sampler.condition_num_classes,
            "guidance_scale": sampler.guidance_scale,
            "guidance_scale_pow": sampler.guidance_scale_pow,
            "guidance_schedule": sampler.guidance_schedule,
            "temperature": sampler.randomize_temperature,
            "top_k": sampler.top_k,
            "top_p": sampler.top_p,
            "seed": sampler.seed,
            "compile": compiled,
            "generator": state_hash(generator_state),
        }
    else:
        settings["codes"] = hashlib.sha256(given.tobytes()).hexdigest()[:16]
    config = None if given is not None else sampler
    most = largest_batch(options.model.vq_model, config, sampler.sampling, dtype, device)
    chunk = experiment.per_proc_batch_size or earlier_chunk(output)
    check_memory(chunk or 1, most, device)
    lock = None
    if processes.is_main_process:
        lock = lock_folder(output)  # held until this process ends, however it does
        chunk = chunk or min(most, LARGEST_CHUNK, count)
        check_settings(output / "sampling.json", {**settings, "chunk": chunk}, REMEDY)
    processes.wait_for_everyone()
    chunk = chunk or earlier_chunk(output)  # what the main process chose is everybody's
    check_settings(output / "sampling.json", {**settings, "chunk": chunk}, REMEDY)
    if final.exists():
        if processes.is_main_process:
            shutil.rmtree(output / "chunks", ignore_errors=True)  # of a run killed in cleaning up
        processes.print(f"{final} is complete: {count} images")
        if evaluator is not None:
            show(evaluator.evaluate(open_images(final), count))
        return
    check_memory(chunk, most, device)

    parts = Parts(output / "chunks", -(-count // chunk))
    mine = parts.missing(processes.process_index, processes.num_processes)
    processes.wait_for_everyone()  # before any rank adds a chunk that another still counts
    engine = None
    if given is None and mine:
        processes.print(f"sampling {chunk} images at once, {precision}, compile={compiled}")
        engine = Engine(generator, chunk, sampler.sampling, dtype, compiled)
        del generator

    def codes_of(indices: range) -> Tensor:
        if engine is None:
            return torch.from_numpy(given[indices.start : indices.stop].astype(np.int64)).to(device)
        labels = torch.tensor([classes[i % len(classes)] for i in indices])
        return engine.sample(labels, image_uniforms(sampler.seed, indices, sampler.image_seq_len))

    def write(number: int, indices: range, images: np.ndarray, codes: np.ndarray) -> None:
        with writing(output):
            if experiment.save_png:
                # Before the chunk: a chunk that exists has all its pictures.
                names = [output / f"{i:06d}.png" for i in indices]
                list(painters.map(write_png, images, names))
            parts.write(number, images=images, codes=codes.astype(np.uint16))
        bar.update(len(indices))

    indices_of = {n: range(n * chunk, min((n + 1) * chunk, count)) for n in mine}
    total = sum(map(len, indices_of.values()))
    bar = tqdm(total=total, unit="img", desc="sample", disable=not processes.is_main_process)
    written: deque[Future] = deque()
    with ThreadPoolExecutor() as painters, ThreadPoolExecutor(1) as writer:
        decoder = Decoder(tokenizer, dtype, device)
        waiting = None  # the chunk before, decoded while this one is sampled
        for number in [*mine, None]:
            started = None
            if number is not None:
                started = number, decoder.start(codes_of(indices_of[number]))
            if waiting is not None:
                before, decoded = waiting
                if len(written) == 2:  # no more than two chunks wait for the disk
                    written.popleft().result()
                written.append(writer.submit(write, before, indices_of[before], *decoded()))
            waiting = started
        for future in written:
            future.result()
    bar.close()
    processes.wait_for_everyone()
    if processes.is_main_process:
        size = options.model.vq_model.image_size
        with writing(output):
            codes_file = output.with_name(output.name + "_codes.npz")
            join(parts, codes_file, "codes", (count, sampler.image_seq_len), np.uint16)
            if experiment.grid:
                write_grid(parts, output.with_name(output.name + "_grid.png"), experiment.grid)
            join(parts, final, "images", (count, size, size, 3), np.uint8)
        shutil.rmtree(parts.folder)
        lock.close()
    processes.wait_for_everyone()
    processes.print(f"wrote {final}: {count} images")
    if evaluator is not None:
        show(evaluator.evaluate(open_images(final), count))


# ---------------------------------------------------------------------- what is asked for
def resolve(experiment: GeneratorExperiment, device: torch.device) -> tuple[str, bool]:
    """Precision and whether to compile; what auto stands for depends on the machine."""
    cuda = device.type == "cuda"
    precision = experiment.precision
    if precision == "auto":
        precision = "bf16" if cuda else "fp32"
    if precision == "tf32" and not cuda:
        raise InputError("experiment.precision=tf32 is of CUDA devices: choose fp32 or bf16")
    return precision, compiles(experiment.compile, "experiment.compile")


def read_codes(path: str, config: TokenizerConfig) -> np.ndarray:
    """Codes (N, T), uint16, of an .npz as `OUTPUT_DIR_codes.npz`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            codes = file["arr_0"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise InputError(
            f"experiment.codes={path} is no .npz of codes ({type(e).__name__}): give an "
            f"OUTPUT_DIR_codes.npz"
        ) from e
    fits = codes.ndim == 2 and codes.shape[1] == config.num_tokens and len(codes)
    if not fits or codes.dtype.kind not in "iu":
        raise InputError(
            f"experiment.codes={path} holds {codes.dtype} {codes.shape} instead of integers "
            f"(images, {config.num_tokens}): give the config of the run that made it"
        )
    if codes.min() < 0 or codes.max() >= config.codebook_size:
        raise InputError(
            f"experiment.codes={path} holds codes {codes.min()}…{codes.max()}, but this tokenizer "
            f"has 0…{config.codebook_size - 1}: give the config of the run that made it"
        )
    return codes.astype(np.uint16)


def largest_batch(
    tokenizer: TokenizerConfig,
    generator: GeneratorConfig | None,
    sampling: Sampling,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """How many images at once fit into free memory, by an estimate on the safe side.

    None for the generator: only decoding.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    # Of decoding: a few activations as wide as the MLP, and pixels in float32 and as bytes.
    tokens = tokenizer.num_tokens + tokenizer.num_buffer_tokens
    pixels = 3 * tokenizer.image_size**2
    shared = DECODED_AT_ONCE * 4 * (4 * 4 * tokens * tokenizer.decoder_width + 4 * pixels)
    image = 8 * pixels  # as bytes: on the device, pinned, and in the two chunks that are written
    if generator is not None:
        # The engine's weights, and sorted and summed logits in float64.
        shared += 4 * 12 * generator.num_hidden_layers * generator.hidden_size**2
        image += cache_bytes(generator, sampling, dtype) + 64 * generator.codebook_size
    return max(int(0.9 * free - shared) // image, 0)


def check_memory(chunk: int, most: int, device: torch.device) -> None:
    if chunk > most:
        remedy = f"give experiment.per_proc_batch_size={most}" if most else "free some"
        raise InputError(
            f"too little free memory on {device} for {chunk} images at once: {most} fit; {remedy}"
        )


# ---------------------------------------------------------------------- the output folder
def earlier_chunk(output: Path) -> int | None:
    """The chunk that a run before this one wrote down; None where there is none to read."""
    try:
        return int(json.loads((output / "sampling.json").read_text())["chunk"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # if it is damaged, check_settings says so


# ---------------------------------------------------------------------- images
class Decoder:
    """Codes to images beside the sampling of the next chunk: on CUDA on a stream of its own."""

    def __init__(self, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, codes: Tensor):
        """Codes (B, T); returns what waits for images (B, S, S, 3), uint8, and codes on the host."""
        if self.stream is None:
            images = decode_images(self.tokenizer, codes, self.dtype)
            return lambda: (images.numpy(), codes.numpy())
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            codes.record_stream(self.stream)
            images = decode_images(self.tokenizer, codes, self.dtype)
            on_host = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in (images, codes)
            ]
            done = torch.cuda.Event()
            done.record()

        def wait() -> tuple[np.ndarray, ...]:
            done.synchronize()
            return tuple(x.numpy() for x in on_host)

        return wait


def write_png(image: np.ndarray, path: Path) -> None:
    partial = path.with_suffix(".partial")
    Image.fromarray(image).save(partial, format="PNG")
    os.replace(partial, path)


def write_grid(parts: Parts, path: Path, columns: int) -> None:
    """The first columns x columns images, row after row, as one picture."""
    images, number = [], 0
    while number < parts.count and len(images) < columns**2:
        images.extend(parts.read(number, "images"))
        number += 1
    images = images[: columns**2]
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    picture = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * height, i % columns * width
        picture[y : y + height, x : x + width] = image
    write_png(picture, path)


def state_hash(state: dict[str, Tensor]) -> str:
    """16 hex digits of weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def join(parts: Parts, path: Path, name: str, shape: tuple[int, ...], dtype: type) -> None:
    """Stream one array of all parts into an .npz (key `arr_0`), a part in memory at a time."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        entry = zipfile.ZipInfo("arr_0.npy")  # a fixed date: the same images, the same bytes
        with archive.open(entry, "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for number in tqdm(range(parts.count), unit="chunk", desc=path.name):
                file.write(np.ascontiguousarray(parts.read(number, name)).data)


if __name__ == "__main__":
    run(main)
