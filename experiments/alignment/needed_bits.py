"""How much too small is a code for its patch? `python -m experiments.alignment.needed_bits FOLDER SIZE PATCH …`.

Prints, per size of patches, the bits that a patch of a Gaussian source with the patches' covariance needs for 30 dB (the
rate-distortion function by reverse water-filling: Cover and Thomas, Elements of Information Theory, section 10.3.3), and
the PSNR of 256 patches of k-means, which is what codes of 8 bits reach without sharing anything.
"""

import numpy as np
from scipy.optimize import brentq
from sklearn.cluster import MiniBatchKMeans

from experiments.alignment.photo_score import crops
from runtime.arguments import Parser, as_path, number
from runtime.errors import InputError
from runtime.program import run

IMAGES, CODES = 1000, 256


def patches(images: np.ndarray, side: int) -> np.ndarray:
    """(N, S, S, 3), uint8 -> (N · (S/side)², side² · 3), in [0, 1]."""
    n, s, _, colours = images.shape
    cut = images.reshape(n, s // side, side, s // side, side, colours).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(-1, side * side * colours) / np.float32(255)


def needed_bits(vectors: np.ndarray, psnr: float = 30.0) -> float:
    """Bits per vector (N, D) of a Gaussian source with their covariance at this PSNR (peak 1)."""
    variances = np.linalg.eigvalsh(np.cov(vectors.T)).clip(0)
    allowed = vectors.shape[1] * 10 ** (-psnr / 10)
    if variances.sum() <= allowed:
        return 0.0
    # The water level at which the squared errors add up to what is allowed.
    level = brentq(lambda x: np.minimum(variances, x).sum() - allowed, 0, variances.max())
    above = variances[variances > level]
    return float(0.5 * np.log2(above / level).sum())


def means_psnr(vectors: np.ndarray) -> float:
    """PSNR in dB of every vector's nearest among CODES means of k-means."""
    means = MiniBatchKMeans(CODES, random_state=0, n_init="auto", batch_size=4096, max_iter=20)
    found = means.fit_predict(vectors)
    return float(-10 * np.log10(np.square(vectors - means.cluster_centers_[found]).mean()))


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.alignment.needed_bits",
                    description="Compare the bits that a patch needs with those of a code.")  # fmt: skip
    parser.add_argument("folder", type=as_path, help="images: one folder per class")
    parser.add_argument("size", type=number(8, 4096), help="side of the centre crops in pixels")
    parser.add_argument("patch", type=number(1, 512), nargs="+", help="sides of patches in pixels")
    args = parser.parse_args(argv)
    for side in args.patch:
        if args.size % side:
            raise InputError(f"{side}: choose a patch whose side divides {args.size} pixels")
    images = crops(args.folder, args.size, IMAGES)
    print("| patch | bits needed for 30 dB | PSNR of 256 means, dB |\n| --- | --- | --- |")
    for side in args.patch:
        vectors = patches(images, side)
        print(f"| {side} × {side} | {needed_bits(vectors):.1f} | {means_psnr(vectors):.1f} |")


if __name__ == "__main__":
    run(main)
