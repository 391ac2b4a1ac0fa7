"""How much too small is a code for its patch? `python -m experiments.alignment.needed_bits FOLDER SIZE PATCH … --codes K …`.

Prints, per size of patches, the bits that a patch of a Gaussian source with the patches' covariance needs for 30 dB (the
rate-distortion function by reverse water-filling: Cover and Thomas, Elements of Information Theory, section 10.3.3), and per
size of the codebook their ratio to the bits of a code, the PSNR of K patches of k-means, which is what codes reach without
sharing anything, and that of patches of one colour each, of K colours of k-means: the plateau on which a tokenizer's training
may stop. The former is of the pooled error, the latter the mean over images, as validation reports a tokenizer's.
"""

import numpy as np
from scipy.optimize import brentq
from sklearn.cluster import MiniBatchKMeans

from experiments.alignment.photo_score import crops
from runtime.arguments import Parser, as_path, number
from runtime.errors import InputError
from runtime.program import run

IMAGES = 1000


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


def means_of(vectors: np.ndarray, codes: int) -> np.ndarray:
    """Every vector's nearest among `codes` means of k-means, (N, D)."""
    means = MiniBatchKMeans(codes, random_state=0, n_init="auto", batch_size=4096, max_iter=20)
    nearest = means.fit_predict(vectors)
    return np.asarray(means.cluster_centers_)[nearest]


def means_psnr(vectors: np.ndarray, codes: int) -> float:
    return float(-10 * np.log10(np.square(vectors - means_of(vectors, codes)).mean()))


def flat_psnr(vectors: np.ndarray, codes: int, images: int) -> float:
    """PSNR in dB, the mean over images, if every patch (N, side² · 3) has one of `codes` colours."""
    pixels = vectors.reshape(len(vectors), -1, 3)
    errors = pixels - means_of(pixels.mean(1), codes)[:, None]
    return float(-10 * np.log10(np.square(errors).reshape(images, -1).mean(1)).mean())


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.alignment.needed_bits",
                    description="Compare the bits that a patch needs with those of a code.")  # fmt: skip
    parser.add_argument("folder", type=as_path, help="images: one folder per class")
    parser.add_argument("size", type=number(8, 4096), help="side of the centre crops in pixels")
    parser.add_argument("patch", type=number(1, 512), nargs="+", help="sides of patches in pixels")
    parser.add_argument("--codes", type=number(2, 1 << 16), nargs="+", default=[256],
                        help="sizes of the codebook (256)")  # fmt: skip
    args = parser.parse_args(argv)
    for side in args.patch:
        if args.size % side:
            raise InputError(f"{side}: choose a patch whose side divides {args.size} pixels")
    images = crops(args.folder, args.size, IMAGES)
    print("| patch | bits needed for 30 dB | codes | over a code's | PSNR of means | of colours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for side in args.patch:
        vectors = patches(images, side)
        needed = needed_bits(vectors)
        for codes in args.codes:
            means, colours = means_psnr(vectors, codes), flat_psnr(vectors, codes, len(images))
            print(
                f"| {side} × {side} | {needed:.1f} | {codes} | {needed / np.log2(codes):.1f} "
                f"| {means:.1f} | {colours:.1f} |"
            )


if __name__ == "__main__":
    run(main)
