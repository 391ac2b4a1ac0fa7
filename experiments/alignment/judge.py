"""Judge the images of one decoder of a run: `python -m experiments.alignment.judge RUN DATA stage1`.

Its last line is a JSON object: the Fréchet distance and the share read as asked, by the quickstart's classifier, the
same of the validation images, and the share of samples whose codes repeat a training view's.
"""

import json
from pathlib import Path

import numpy as np

from modeling.weights.tensors import fingerprint, read_state_dict
from quickstart.report import Judge, copied_share
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.program import run

SAMPLES = {"stage1": "samples.npz", "stage2": "samples_stage2.npz"}


def check_codes_are_shared(folder: Path) -> None:
    """Raise InputError unless stage 2 kept encoder and codebook: only then are stage 1's codes also its own."""
    first, second = (
        fingerprint(read_state_dict(folder / stage / "tokenizer.pth")) for stage in SAMPLES
    )
    if first != second:
        raise InputError(
            f"{folder}: stage 2 changed the encoder or the codebook: remove {folder / 'stage2'}"
        )


def load_samples(file: Path) -> np.ndarray:
    """uint8 images (N, S, S, 3)."""
    if not file.is_file():
        raise InputError(f"no {file}: pass a run of the study that has been sampled")
    return np.load(file)["arr_0"]


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.alignment.judge", description="Judge a run's images."
    )
    parser.add_argument("run", type=as_path, help="folder of a row and seed of the study")
    parser.add_argument("data", type=as_path, help="its images: train/ and val/")
    parser.add_argument("decoder", choices=SAMPLES, help="the stage whose decoder made the images")
    args = parser.parse_args(argv)
    if args.decoder == "stage2":
        check_codes_are_shared(args.run)
    images = load_samples(args.run / SAMPLES[args.decoder])
    judge = Judge(args.data, images.shape[1])
    found = {**judge.of_samples(images), **judge.of_validation(), "copied": copied_share(args.run)}
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
