"""The rows of the ablation and the variations, as what they set over the quickstart's three configs.

Everything that a row does not set is the quickstart's own: encoder, codebook, steps, generator, data. The rows
`prefix` and `quickstart` set nothing: together their run is a quickstart.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from configs.load import load_sizes
from runtime.errors import InputError

STAGE1 = "configs/digits_stage1.yaml"
STAGE2 = "configs/digits_stage2.yaml"
GENERATOR = "configs/digits_generator.yaml"


@dataclass(frozen=True)
class Overrides:
    """`section.option=value` over the configs; `sizes` are the tokenizer's, of all programs alike."""

    sizes: dict[str, int] = field(default_factory=dict)  # option of model.vq_model -> value
    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()
    generator: tuple[str, ...] = ()  # of train_ar.py alone: sampling reads the trained sizes
    data: str | None = None
    # Of the phases: "steps" times the config's, for both stages; the rates and the tail are those of stage 1.
    phases: dict[str, float] = field(default_factory=dict)

    def __add__(self, over: "Overrides") -> "Overrides":
        return Overrides(
            self.sizes | over.sizes,
            self.stage1 + over.stage1,
            self.stage2 + over.stage2,
            self.generator + over.generator,
            over.data or self.data,
            self.phases | over.phases,
        )


# ---------------------------------------------------------------------- the ablation
@dataclass(frozen=True)
class Row:
    """One row: a tokenizer's stage 1, or the decoder that stage 2 trains for the codes of another row."""

    name: str
    title: str
    stage1: tuple[str, ...] = ()
    prefix: bool = True  # whether there are prefix tokens: T = g² + g + 1 instead of g²
    run: str = ""  # name of the row whose codes and generator it shares; its own by default
    decoder: str = "stage1"

    @property
    def folder(self) -> str:
        return self.run or self.name


BIDIRECTIONAL = "model.vq_model.causal=false"
# The strip's published weight, 10, costs 2 dB here: K / g² is twice as large as on ImageNet's grid.
STRIP = ("model.vq_model.prefix_head=true", "losses.aux_weight=3")

ROWS = (
    Row("bidirectional", "bidirectional decoder, no prefix", (BIDIRECTIONAL,), prefix=False),
    Row("causal", "causal decoder, no prefix", prefix=False),
    Row("prefix", "+ prefix tokens (the quickstart's stage 1)"),
    Row("aux", "+ aux loss", STRIP),
    Row("stage2", "+ stage 2", run="aux", decoder="stage2"),
    Row("quickstart", "prefix tokens, stage 2 (the quickstart)", run="prefix", decoder="stage2"),
)  # fmt: skip
FAST_ROWS, FAST_SEEDS, FAST_STEPS = ("bidirectional", "causal"), (42,), "steps=0.5"
SEEDS = (42, 43, 44)  # 42 is the quickstart's own


# ---------------------------------------------------------------------- the data sets
@dataclass(frozen=True)
class Data:
    """`python -m MODULE FOLDER` writes FOLDER/train and FOLDER/val, one folder per class."""

    module: str = ""  # none: the folder is the user's
    overrides: Overrides = Overrides()
    views: tuple[str, ...] = ("--five_crop",)  # of an image in a cache; none: the centre crop
    judge: str = "experiments.alignment.judge"  # module that scores the samples
    # Suffix of a set of samples -> options of sample_imagenet.py.
    samples: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})


def image_size(value: str) -> Overrides:
    """Images of this side, of crops an eighth larger, as all of the photographs are."""
    resize = f"dataset.params.resize={round(int(value) * 9 / 8)}"
    return Overrides({"image_size": int(value)}, stage1=(resize,), stage2=(resize,))


def mixed_precision(value: str) -> Overrides:
    option = (f"training.mixed_precision={value}",)
    return Overrides(stage1=option, stage2=option, generator=option)


# Scales of guidance at which the photographs are sampled; 1 is none.
GUIDANCE = ("1", "2", "4")
WARMUP = "optimizer.params.warmup_steps=1000"
PHOTOGRAPHS = Data(
    "experiments.alignment.photographs",
    image_size("64")
    + mixed_precision("bf16")  # half the time, where the processor has bf16 products
    + Overrides(
        sizes={"patch_size": 8},
        stage1=(WARMUP,),
        # At the digits' 1.5e-3 and their short warm-up, the latents forget the images within 200 steps.
        # The rate stays at its highest until the tail: lower ones get stuck at patches of one colour.
        phases={"learning_rate": 1e-3, "end_lr": 1e-3, "tail": 0.6, "tail_lr": 3e-5},
    ),
    views=(),
    judge="experiments.alignment.photo_score",
    # As many images as are held out, without top-p.
    samples={
        f"_{scale}": (
            "experiment.num_fid_samples=1050", "model.generator.top_p=1",
            f"model.generator.guidance_scale={scale}",
        )
        for scale in GUIDANCE
    },
)  # fmt: skip
DATA = {"digits": Data("quickstart.digits"), "photographs": PHOTOGRAPHS}


# ---------------------------------------------------------------------- the variations
@dataclass(frozen=True)
class Variation:
    """One thing that is varied around rows of the ablation."""

    meaning: str
    examples: tuple[str, ...]
    overrides: Callable[[str], Overrides]  # of a value; ValueError for one that makes no sense
    rows: tuple[str, ...] = ("bidirectional", "causal")


def size(name: str) -> Callable[[str], Overrides]:
    return lambda value: Overrides(sizes={name: int(value)})


def stage1(option: str) -> Callable[[str], Overrides]:
    return lambda value: Overrides(stage1=(f"{option}={value}",))


def tokenizer_steps(value: str) -> Overrides:
    """The phases of both stages, `value` times as long."""
    return Overrides(phases={"steps": factor(value)})


def generator_steps(value: str) -> Overrides:
    steps = OmegaConf.load(GENERATOR).training.max_train_steps
    return Overrides(generator=(f"training.max_train_steps={scaled(steps, factor(value))}",))


def factor(text: str) -> float:
    number = float(text)
    if not 0 < number < 1000:
        raise ValueError(text)
    return number


def scaled(steps: int, by: float) -> int:
    return max(round(steps * by), 1)


def phases(
    config: str, steps: float = 1, tail: float = 0, tail_lr: float = 0, **others: float
) -> list[str]:
    """The option that makes a config's phases longer, or sets others of their values; none for no change.

    `tail` above 0 adds a last phase at the rate `tail_lr`, `tail` times as long as the phase before it.
    """
    if steps == 1 and not tail and not others:
        return []
    found: Any = OmegaConf.to_container(OmegaConf.load(config).phases)
    changed = [{**phase, **others, "steps": scaled(phase["steps"], steps)} for phase in found]
    if tail:
        last, rates = changed[-1], {"learning_rate": tail_lr, "end_lr": tail_lr}
        changed.append({**last, **rates, "name": "tail", "steps": scaled(last["steps"], tail)})
    return [f"phases={json.dumps(changed)}"]


VARIATIONS = {
    "position_init": Variation(
        "initialisation of the encoder's positions", ("normal",), stage1("model.vq_model.position_init")
    ),
    "tokenizer_steps": Variation(
        "length of both stages, times the quickstart's", ("0.5", "3"), tokenizer_steps
    ),
    "generator_steps": Variation(
        "length of the generator's training, times the quickstart's", ("0.5", "3"), generator_steps
    ),
    "steps": Variation(
        "length of both stages and of the generator's training, times the quickstart's", ("3",), lambda v: tokenizer_steps(v) + generator_steps(v)
    ),
    "codebook_size": Variation("codes in the codebook", ("64", "1024"), size("codebook_size")),
    "patch_size": Variation("side of a patch in pixels", ("8",), size("patch_size")),
    "image_size": Variation("side of an image in pixels, of crops an eighth larger", ("32",), image_size),
    "mixed_precision": Variation(
        "precision of the training of both stages and of the generator", ("no", "bf16"), mixed_precision
    ),
    "encoder_layers": Variation("depth of the encoder", ("1", "6"), size("encoder_layers")),
    "aux_weight": Variation(
        "weight of the aux loss", ("1", "10"), stage1("losses.aux_weight"), ("aux",)
    ),
    "data": Variation(
        "other images: a name, or a folder that holds train/ and val/", tuple(DATA),
        lambda value: DATA.get(value, Data()).overrides + Overrides(data=value),
    ),
}  # fmt: skip


def varied(text: str) -> tuple[Overrides, tuple[str, ...]]:
    """Overrides of NAME=VALUE[,NAME=VALUE…] and the rows that they are tried on."""
    overrides, rows, base = Overrides(), (), Overrides()
    for part in text.split(","):
        name, equals, value = part.partition("=")
        variation = VARIATIONS.get(name)
        if variation is None or not equals or not value:
            raise InputError(
                f"--vary {text}: pass NAME=VALUE with one of {', '.join(VARIATIONS)}; "
                f"separate several by commas"
            )
        try:
            found = variation.overrides(value)
        except ValueError as e:
            tried = " or ".join(f"{name}={example}" for example in variation.examples)
            raise InputError(
                f"--vary {part}: {variation.meaning}; pass a value such as {tried}"
            ) from e
        rows = rows or variation.rows
        if name == "data":  # a data set's own options come before those that vary them
            base = found
        else:
            overrides += found
    return base + overrides, rows


# ---------------------------------------------------------------------- a row as options of the programs
@dataclass(frozen=True)
class Recipe:
    """The options of a row's commands, over their configs."""

    stage1: list[str]
    stage2: list[str]
    train: list[str]  # train_ar.py
    sample: list[str]  # sample_imagenet.py


def recipe(row: Row, overrides: Overrides) -> Recipe:
    """A row under a variation. Raises InputError for sizes that do not fit."""
    sizes = dict(overrides.sizes)
    if not row.prefix:
        sizes["num_latent_tokens"] = load_sizes(STAGE1, **sizes).model.vq_model.grid ** 2
    tokens = load_sizes(STAGE1, **sizes, prefix_head=False).model.vq_model.num_tokens
    tokenizer = [f"model.vq_model.{name}={value}" for name, value in sizes.items()]
    known = OmegaConf.load(GENERATOR).model.generator
    generator = list(tokenizer)
    if tokens != known.image_seq_len:
        generator.append(f"model.generator.image_seq_len={tokens}")
    return Recipe(
        stage1=[*tokenizer, *row.stage1, *overrides.stage1, *phases(STAGE1, **overrides.phases)],
        stage2=[*tokenizer, *overrides.stage2, *phases(STAGE2, overrides.phases.get("steps", 1))],
        train=[*generator, *overrides.generator],
        sample=generator,
    )
