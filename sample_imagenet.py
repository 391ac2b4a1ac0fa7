"""Sample images for FID: `torchrun --nproc_per_node=8 sample_imagenet.py config=FILE option=value …`.

Image i has class i mod (number of classes) and randomness from (seed, i) alone. The work is cut
into fixed chunks of consecutive indices, so the images are the same on any number of processes.
Killed and started again it goes on; `OUTPUT_DIR.npz` appears when all images are there.
"""

import hashlib
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import configs.schema
from configs.schema import GeneratorRun
from data.parts import Parts, check_settings
from evaluation.compare import Evaluator, show
from evaluation.sources import open_images
from modeling.errors import InputError
from modeling.generator import Generator
from modeling.sampling import sample_codes
from modeling.tokenizer import Tokenizer
from modeling.weights import load_tensors
from training.checkpoint import read_weights
from training.randomness import image_uniforms
from training.runtime import run, start_processes


def main(argv: list[str]) -> None:
    options = configs.schema.load(GeneratorRun, argv)
    experiment, sampler = options.experiment, options.model.generator
    count, chunk = experiment.num_fid_samples, experiment.per_proc_batch_size
    if count < 1 or chunk < 1:
        raise InputError("experiment.num_fid_samples and per_proc_batch_size: give 1 or more")
    if experiment.generator_checkpoint is None:
        raise InputError(
            "give experiment.generator_checkpoint=FILE, for example weights/alitok_b.bin"
        )
    generator_state = read_weights(experiment.generator_checkpoint, "generator")
    tokenizer_state = read_weights(experiment.tokenizer_checkpoint, "tokenizer")
    processes = start_processes()
    # A mistake in the reference shows now, not after hours of sampling.
    evaluator = Evaluator.open(experiment.evaluate, processes) if experiment.evaluate else None
    generator, tokenizer = Generator(sampler), Tokenizer(options.model.vq_model)
    load_tensors(generator, generator_state, experiment.generator_checkpoint)
    load_tensors(tokenizer, tokenizer_state, experiment.tokenizer_checkpoint)
    generator.to(processes.device).eval()
    tokenizer.to(processes.device).eval()

    output = Path(experiment.output_dir)
    final = output.with_name(output.name + ".npz")
    settings = {
        "images": count,
        "chunk": chunk,
        "classes": sampler.condition_num_classes,
        "guidance_scale": sampler.guidance_scale,
        "guidance_scale_pow": sampler.guidance_scale_pow,
        "temperature": sampler.randomize_temperature,
        "seed": sampler.seed,
        "generator": state_hash(generator_state),
        "tokenizer": state_hash(tokenizer_state),
        "png": experiment.save_png,
    }
    remedy = "remove it, or give another experiment.output_dir"
    if final.exists() and not (output / "sampling.json").exists():
        raise InputError(f"{final} is in the way and none of ours: {remedy}")
    processes.wait_for_everyone()
    if processes.is_main_process:
        check_settings(output / "sampling.json", settings, remedy)
    processes.wait_for_everyone()
    check_settings(output / "sampling.json", settings, remedy)
    if final.exists():
        processes.print(f"{final} is complete: {count} images")
        if evaluator is not None:
            show(evaluator.evaluate(open_images(final), count))
        return

    parts = Parts(output / "chunks", -(-count // chunk))
    mine = parts.missing(processes.process_index, processes.num_processes)
    processes.wait_for_everyone()  # before any rank adds a chunk that another still counts
    indices_of = {n: range(n * chunk, min((n + 1) * chunk, count)) for n in mine}
    total = sum(map(len, indices_of.values()))
    bar = tqdm(total=total, unit="img", desc="sample", disable=not processes.is_main_process)
    with ThreadPoolExecutor() as pool:
        for number in mine:
            indices = indices_of[number]
            labels = torch.tensor([i % sampler.condition_num_classes for i in indices])
            uniforms = image_uniforms(sampler.seed, indices, sampler.image_seq_len)
            codes = sample_codes(
                generator,
                labels.to(processes.device),
                uniforms.to(processes.device),
                sampler.guidance_scale,
                sampler.guidance_scale_pow,
                sampler.randomize_temperature,
            )
            images = decode_uint8(tokenizer, codes).cpu().numpy()  # (n, S, S, 3)
            if experiment.save_png:
                # Before the chunk: a chunk that exists has all its pictures.
                list(pool.map(write_png, images, [output / f"{i:06d}.png" for i in indices]))
            parts.write(number, images=images, codes=codes.cpu().numpy().astype(np.uint16))
            bar.update(len(indices))
    bar.close()
    processes.wait_for_everyone()
    if processes.is_main_process:
        size = options.model.vq_model.image_size
        codes_file = output.with_name(output.name + "_codes.npz")
        join(parts, codes_file, "codes", (count, sampler.image_seq_len), np.uint16)
        join(parts, final, "images", (count, size, size, 3), np.uint8)
        shutil.rmtree(parts.folder)
    processes.wait_for_everyone()
    processes.print(f"wrote {final}: {count} images")
    if evaluator is not None:
        show(evaluator.evaluate(open_images(final), count))


@torch.inference_mode()
def decode_uint8(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Codes (B, T) -> images (B, S, S, 3), uint8, by ×255 and truncation as published."""
    return (tokenizer.decode(codes) * 255).to(torch.uint8).permute(0, 2, 3, 1)


def write_png(image: np.ndarray, path: Path) -> None:
    partial = path.with_suffix(".partial")
    Image.fromarray(image).save(partial, format="PNG")
    os.replace(partial, path)


def state_hash(state: dict[str, Tensor]) -> str:
    """16 hex digits of weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def join(parts: Parts, path: Path, name: str, shape: tuple[int, ...], dtype: type) -> None:
    """Stream one array of all parts into an .npz (key `arr_0`), a part in memory at a time."""
    partial = path.with_name(path.name + ".partial")
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    with zipfile.ZipFile(partial, "w") as archive:
        entry = zipfile.ZipInfo("arr_0.npy")  # a fixed date: the same images, the same bytes
        with archive.open(entry, "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for number in tqdm(range(parts.count), unit="chunk", desc=path.name):
                file.write(np.ascontiguousarray(parts.read(number, name)).tobytes())
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


if __name__ == "__main__":
    run(main)
