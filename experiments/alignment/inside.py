"""Look inside tokenizers: what their codes depend on, and what predicts them.

    python -m experiments.alignment.inside --tokenizer causal=output/a/stage1 both=output/b/stage1 \\
        --images output/data/val --train_images output/data/train \\
        --generator causal=output/a/generator both=output/b/generator \\
        --cache causal=output/a/cache_val both=output/b/cache_val --output output/inside

Every row is one tokenizer, [NAME=]FILE or run folder; a generator and the cache of its codes belong to the
tokenizer of the same name. Writes inside.json and one PNG per question, all rows in it:

    loss.png        the generator's loss by position of the code
    encoder.png     which codes change when the image below a row is replaced (dependence.masked_changes):
                    by the mean colour of the images, and by the same rows of another image
    cut.png         PSNR by image row, decoded from the first n codes alone (dependence.cut_errors)
    decoder.png     how much every image row changes when a code is replaced (dependence.replaced_changes)
    neighbours.png  bits per code given its neighbours, from tables of counts (neighbours.code_dependence)
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.sizes import tokenizer_of
from data.images import ImagePath, scan_images
from data.tokens import open_tokens
from evaluation.generator_scores import open_generator, plot_positions
from evaluation.likelihood import Likelihood, Share, likelihood_sums
from evaluation.report import table_of
from experiments.alignment import figures
from experiments.alignment.dependence import (
    BATCH,
    change_shares,
    cut_errors,
    cut_lengths,
    earlier_changes,
    encode,
    encode_files,
    evenly,
    masked_changes,
    psnr,
    read_images,
    replaced_changes,
)
from experiments.alignment.neighbours import NEIGHBOURS, code_dependence
from modeling.devices import find_device
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import GENERATOR
from modeling.weights.opened import open_weights
from modeling.weights.tensors import fingerprint
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.files import write_whole, writing
from runtime.processes import matmul_precision, start_processes
from runtime.program import run

UNNAMED = "tokenizer"
# Images at most for masking and cutting: each is encoded 2g - 1 times, decoded g + 2 times.
MASKED = 256
REPLACED = 32  # images at most for replacing codes: each is decoded 1 + T times


@dataclass
class Row:
    """One tokenizer of the study, with its generator and the cache of its codes if it has them."""

    name: str
    tokenizer: str
    generator: str | None = None
    cache: str | None = None


@dataclass
class Measures:
    """What one row's models show; `dependence` and `neighbours` document the tensors."""

    row: Row
    tokenizer: Tokenizer
    masked: dict[str, Tensor]  # by what the rows were replaced with: (g - 1, T)
    errors: Tensor  # (numbers of codes, g)
    replaced: Tensor  # (g, T)
    neighbours: dict[str, Any]
    likelihood: Likelihood | None

    def result(self) -> dict[str, Any]:
        """All figures, for JSON; None stands for NaN."""
        config = self.tokenizer.config
        by_rows, whole = psnr(self.errors), psnr(self.errors.mean(1))
        return {
            **vars(self.row),
            "codes_per_image": config.num_tokens,
            "prefix_codes": config.num_prefix_tokens,
            "codebook_size": config.codebook_size,
            "causal_decoder": config.causal,
            "masked": {
                fill: {
                    "share_changed": plain(changes),
                    **{k: plain(v) for k, v in earlier_changes(changes, config).items()},
                }
                for fill, changes in self.masked.items()
            },
            "cut": {
                "codes": cut_lengths(config), "psnr": plain(whole), "psnr_by_row": plain(by_rows),
            },
            "replaced": {
                "rms_change": plain(self.replaced), "shares": change_shares(self.replaced, config),
            },
            "neighbours": self.neighbours,
            "generator_loss": None if self.likelihood is None else self.likelihood.result(),
        }  # fmt: skip


def plain(values: Tensor) -> Any:
    """Nested lists, with None for NaN, which JSON lacks."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(part) for part in value]
        return None if math.isnan(value) else value

    return convert(values.tolist())


# ---------------------------------------------------------------------- arguments
def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.alignment.inside",
                    description=(__doc__ or "").split("\n")[0])  # fmt: skip
    named = {"nargs": "+", "default": [], "metavar": "[NAME=]PATH"}
    parser.add_argument("--tokenizer", required=True, **named, help="weights file or run folder")
    parser.add_argument(
        "--images", type=as_path, required=True, help="image folder, unseen in training"
    )
    parser.add_argument(
        "--train_images", type=as_path,
        help="image folder whose codes the tables of neighbours count; by default nine tenths of --images",
    )  # fmt: skip
    parser.add_argument("--generator", **named, help="weights file or run folder")
    parser.add_argument("--cache", **named, help="token cache to compute the generator's loss on")
    parser.add_argument("--output", type=as_path, required=True, help="folder to write to")
    return parser.parse_args(argv)


def named_paths(given: list[str], option: str) -> dict[str, str]:
    """Paths by name, of NAME=PATH each; a path alone has the name UNNAMED."""
    paths: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals else (UNNAMED, text)
        if not name or not path:
            raise InputError(f"--{option} {text}: write NAME=PATH, or a path")
        if name in paths:
            raise InputError(
                f"--{option} has two paths named {name}: write NAME=PATH, each with its own name"
            )
        paths[name] = path
    return paths


def study_rows(args: argparse.Namespace) -> list[Row]:
    """The rows in the order of --tokenizer. Raises InputError for names that do not belong together."""
    tokenizers = named_paths(args.tokenizer, "tokenizer")
    generators, caches = (
        named_paths(getattr(args, option), option) for option in ("generator", "cache")
    )
    if generators.keys() != caches.keys():
        raise InputError(
            f"--generator and --cache go together, under the same names: there are "
            f"{', '.join(generators) or 'none'} and {', '.join(caches) or 'none'}"
        )
    for name in generators:
        if name not in tokenizers:
            raise InputError(
                f"--generator {name} has no tokenizer: there are {', '.join(tokenizers)}"
            )
    return [
        Row(name, path, generators.get(name), caches.get(name)) for name, path in tokenizers.items()
    ]


def image_paths(folder: Path, at_least: int) -> list[ImagePath]:
    paths = scan_images(folder).paths
    if len(paths) < at_least:
        raise InputError(f"{folder} holds too few images, {len(paths)}: pass {at_least} or more")
    return paths


def open_tokenizer(path: str) -> Tokenizer:
    """A tokenizer in eval mode. Raises InputError if the grid has only one row."""
    tokenizer = tokenizer_of(path)
    if tokenizer.config.grid < 2:
        raise InputError(
            f"{path} has one row of patches, and so no rows that could depend on others"
        )
    return tokenizer


# ---------------------------------------------------------------------- measuring
def measure(
    row: Row, tokenizer: Tokenizer, paths: list[ImagePath], counted: list[ImagePath]
) -> Measures:
    """All measures of one row; `counted` are the images that the tables count; if empty, folds of `paths`."""
    likelihood = generator_loss(row, tokenizer)  # first: it refuses files that do not fit
    codes = encode_files(tokenizer, paths).numpy()
    training = encode_files(tokenizer, counted).numpy() if counted else None
    images = read_images(tokenizer, evenly(paths, MASKED))
    fills = {
        "mean colour": images.mean((0, 2, 3)).view(1, 3, 1, 1),
        "another image": images.roll(1, 0),
    }
    few = encode(tokenizer, read_images(tokenizer, evenly(paths, REPLACED)))
    return Measures(
        row, tokenizer,
        masked={name: masked_changes(tokenizer, images, fill) for name, fill in fills.items()},
        errors=cut_errors(tokenizer, images),
        replaced=replaced_changes(tokenizer, few),
        neighbours=code_dependence(codes, tokenizer.config, training),
        likelihood=likelihood,
    )  # fmt: skip


def generator_loss(row: Row, tokenizer: Tokenizer) -> Likelihood | None:
    """The loss of the row's generator by position, on every view of its cache."""
    if row.generator is None or row.cache is None:
        return None
    config, store = tokenizer.config, open_tokens(row.cache)
    store.check(
        config.codebook_size, config.num_tokens, fingerprint(tokenizer.state_dict()),
        config.encoder_heads,
    )  # fmt: skip
    generator = open_generator(open_weights(row.generator, GENERATOR), store)
    device = tokenizer.latent_tokens.device
    sums = likelihood_sums(generator.to(device), store, Share(BATCH))
    return Likelihood(sums.cpu(), store.images * store.views)


def table(results: list[dict[str, Any]]) -> str:
    """One line per row of the study, of the figures that sum up each question."""
    lines = []
    for result in results:
        loss, bits = result["generator_loss"], result["neighbours"]["bits"]
        changed = [
            sum(of["earlier"]) / len(of["earlier"])
            for of in result["masked"].values()
            if of["earlier"]
        ]
        lines.append([
            result["name"], str(result["codes_per_image"]),
            "—" if loss is None else f"{loss['metrics']['nats_per_code']:.3f}",
            " | ".join(f"{share:.1%}" for share in changed),
            " | ".join(f"{share:.1%}" for share in result["replaced"]["shares"].values()),
            f"{bits['nothing']:.2f} | {min(bits[name] for name in NEIGHBOURS):.2f}",
        ])  # fmt: skip
    heads = ["row", "codes", "nats/code", "earlier codes changed", "change of earlier | own | later rows",
             "bits/code alone | by neighbours"]  # fmt: skip
    return table_of(lines, heads)


def draw(measures: list[Measures], output: Path) -> None:
    """Write the figures. Raises InputError without matplotlib; the numbers are written by then."""
    pictures: dict[str, Callable[[list[Measures]], Any]] = {
        "encoder.png": figures.encoder,
        "cut.png": figures.cut,
        "decoder.png": figures.decoder,
        "neighbours.png": figures.neighbours,
    }
    try:
        for name, picture in pictures.items():
            with writing(output / name):
                picture(measures).savefig(output / name, dpi=110)
    except ImportError as e:
        raise InputError(
            f"the figures need matplotlib (pip install matplotlib); {output}/inside.json is written"
        ) from e
    losses = {m.row.name: m.likelihood for m in measures if m.likelihood is not None}
    if losses:
        plot_positions(losses, str(output / "loss.png"))


def main(argv: list[str]) -> None:
    args = parse(argv)
    start_processes()
    rows, device = study_rows(args), find_device()
    paths = image_paths(args.images, 2)
    counted = image_paths(args.train_images, 1) if args.train_images else []
    tokenizers = [open_tokenizer(row.tokenizer).to(device) for row in rows]
    with matmul_precision("fp32"):
        measures = [measure(row, t, paths, counted) for row, t in zip(rows, tokenizers)]
    results = [of.result() for of in measures]
    about = {
        "images": {"path": str(args.images), "encoded": len(paths), "masked": min(MASKED, len(paths)),
                   "replaced": min(REPLACED, len(paths))},
        "tables": str(args.train_images) if counted else "ten folds of the images",
        "rows": results,
    }  # fmt: skip
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "inside.json", json.dumps(about, ensure_ascii=False).encode())
    print(table(results))
    draw(measures, args.output)
    print(f"wrote {args.output}/inside.json and the figures beside it")


if __name__ == "__main__":
    run(main)
