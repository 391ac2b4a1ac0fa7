"""The typed schema of every program's options, and the reading of `config=FILE option=value …`.

Option names are those of the published configs; a name that is not listed here stops the program
before anything is built. Plain dataclasses come out, and go into the models as they are.
"""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modeling.generator import GeneratorConfig
from modeling.sampling import Sampling
from modeling.tokenizer import TokenizerConfig
from runtime.errors import InputError
from runtime.files import write_whole

T = TypeVar("T")


# ---------------------------------------------------------------------- both trainers
@dataclass
class OptimizerParams:
    """AdamW. The tokenizer's phases set its learning rate; there this one is not read."""

    learning_rate: float = 4e-4
    beta1: float = 0.9
    beta2: float = 0.96
    weight_decay: float = 0.03


@dataclass
class Optimizer:
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class Training:
    gradient_accumulation_steps: int = 1
    per_gpu_batch_size: int = 128
    mixed_precision: str = "auto"  # auto (bf16 on CUDA, else no), no, bf16, fp16
    enable_tf32: bool = True
    enable_wandb: bool = False  # WANDB_MODE=offline or disabled are honoured
    use_ema: bool = False
    ema_decay: float = 0.9999
    compile: Any = False  # torch.compile of the trained model: True, False or auto (CUDA only)
    timeout_minutes: int = 30  # after which ranks that wait for a dead one give up
    seed: int = 42
    max_train_steps: int = 500_000
    max_grad_norm: float = 1.0  # 0 switches clipping off

    def __post_init__(self):
        choices = ("auto", "no", "bf16", "fp16")
        if self.mixed_precision not in choices:
            raise InputError(
                f"training.mixed_precision={self.mixed_precision}: choose one of "
                f"{', '.join(choices)}"
            )
        if self.compile not in (True, False, "auto"):
            raise InputError(f"training.compile={self.compile}: give True, False or auto")
        for name in ("gradient_accumulation_steps", "per_gpu_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name}={getattr(self, name)}: give 1 or more")
        if self.seed < 0:
            raise InputError(f"training.seed={self.seed}: give 0 or more")


@dataclass
class Experiment:
    """Where a run lives and how often it reports; every period is in steps, 0 is never."""

    project: str = "alitok"
    name: str = "alitok"
    output_dir: str = "output/alitok"
    # True: go on from the newest checkpoint; False: refuse a used folder; a path: start from that.
    resume: Any = True
    save_every: int = 10_000
    keep_checkpoints: int = 2
    keep_every: int = 0  # checkpoints of these steps stay for good
    eval_every: int = 10_000
    generate_every: int = 10_000
    log_every: int = 100
    log_grad_norm_every: int = 100
    max_train_examples: Optional[int] = None  # use only the first so many images
    # Score against this while training (evaluate.py --reference says what it may be); None: never.
    # The generator whenever it draws samples, the tokenizer whenever it is evaluated.
    fid_reference: Optional[str] = None

    def __post_init__(self):
        if not isinstance(self.resume, (bool, str)):
            raise InputError(f"experiment.resume={self.resume}: give True, False or a path")
        if self.keep_checkpoints < 2:
            raise InputError(
                f"experiment.keep_checkpoints={self.keep_checkpoints}: give 2 or more, so that one "
                f"is left when the newest is damaged"
            )


# ---------------------------------------------------------------------- generator
@dataclass
class GeneratorExperiment(Experiment):
    generator_checkpoint: Optional[str] = None  # the weights to sample from
    tokenizer_checkpoint: str = "weights/AliTok.pth"
    num_fid_samples: int = 50_000
    # Images sampled together, one fixed chunk of indices; None: as many as memory allows, up to 256
    per_proc_batch_size: Optional[int] = None
    save_png: bool = True
    evaluate: Optional[str] = None  # score the samples against this reference when all are there
    precision: str = "auto"  # of sampling: fp32, tf32, bf16; auto: bf16 on CUDA, fp32 on a CPU
    compile: Any = "auto"  # of sampling: True, False; auto: on CUDA
    classes: Optional[list[int]] = None  # image i has class classes[i mod their number]; None: all
    codes: Optional[str] = None  # decode the codes of this .npz instead of sampling new ones
    grid: int = 0  # N: the first N x N images also as one picture, OUTPUT_DIR_grid.png

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("num_fid_samples", 1), ("per_proc_batch_size", 1), ("grid", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"experiment.{name}={value}: give {least} or more")
        if self.precision not in ("auto", "fp32", "tf32", "bf16"):
            raise InputError(
                f"experiment.precision={self.precision}: choose auto, fp32, tf32 or bf16"
            )
        if self.compile not in ("auto", True, False):
            raise InputError(f"experiment.compile={self.compile}: choose auto, True or False")
        if self.classes is not None and not self.classes:
            raise InputError("experiment.classes is empty: give at least one, for example [207]")


@dataclass
class GeneratorOptions(GeneratorConfig):
    """`model.generator`: the architecture, then how to sample from it."""

    codebook_size: int = "${model.vq_model.codebook_size}"  # type: ignore[assignment]
    randomize_temperature: float = 1.0  # of sampling
    guidance_scale: float = 16.0  # 0 or 1: no guidance
    guidance_scale_pow: float = 1.8  # of the power-cosine schedule
    guidance_schedule: str = "power-cosine"  # as published; or constant, linear
    top_k: int = 0  # draw among the so many most likely codes; 0: all
    top_p: float = 1.0  # draw among the fewest codes that hold this probability; 1: all
    seed: int = 42  # of sampling

    def __post_init__(self):
        super().__post_init__()
        if self.seed < 0:
            raise InputError(f"model.generator.seed={self.seed}: give 0 or more")
        if self.randomize_temperature <= 0:
            raise InputError(
                f"model.generator.randomize_temperature={self.randomize_temperature}: give more "
                f"than 0 (1e-5 takes the most likely code)"
            )
        _ = self.sampling  # refuses the other values that make no sense

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            guidance_scale=self.guidance_scale,
            guidance_power=self.guidance_scale_pow,
            guidance_schedule=self.guidance_schedule,
            temperature=self.randomize_temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


@dataclass
class GeneratorModels:
    vq_model: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: GeneratorOptions = field(default_factory=GeneratorOptions)

    def __post_init__(self):
        given, needed = self.generator.image_seq_len, self.vq_model.num_tokens
        if given != needed:
            raise InputError(
                f"model.generator.image_seq_len={given}, but the tokenizer makes {needed} codes an "
                f"image (model.vq_model): give the same number"
            )


@dataclass
class TokenDataParams:
    pretokenization: str = "cache_alitok"  # the token cache to train on
    # Train on the ten crops of this image folder instead; the tokenizer encodes them on the fly.
    train_dir: Optional[str] = None
    val_pretokenization: Optional[str] = None  # a held-out cache for eval_every
    num_workers_per_gpu: int = 4


@dataclass
class TokenData:
    params: TokenDataParams = field(default_factory=TokenDataParams)


@dataclass
class SchedulerParams:
    learning_rate: float = "${optimizer.params.learning_rate}"  # type: ignore[assignment]
    warmup_steps: int = 62_500
    end_lr: float = 1e-5


@dataclass
class Scheduler:
    scheduler: str = "cosine"
    params: SchedulerParams = field(default_factory=SchedulerParams)

    def __post_init__(self):
        if self.scheduler not in ("cosine", "constant"):
            raise InputError(f"lr_scheduler.scheduler={self.scheduler}: choose cosine or constant")


@dataclass
class GeneratorRun:
    """Options of train_ar.py and sample_imagenet.py."""

    experiment: GeneratorExperiment = field(default_factory=GeneratorExperiment)
    model: GeneratorModels = field(default_factory=GeneratorModels)
    dataset: TokenData = field(default_factory=TokenData)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: Scheduler = field(default_factory=Scheduler)
    training: Training = field(default_factory=Training)


# ---------------------------------------------------------------------- tokenizer
@dataclass
class TokenizerExperiment(Experiment):
    stage1_checkpoint: Optional[str] = None  # stage 2 takes encoder and codebook from it


@dataclass
class TokenizerModels:
    stage: int = 1
    vq_model: TokenizerConfig = field(default_factory=TokenizerConfig)
    # Stage 2's decoder starts from stage 1's (all but the buffer tokens and positions), as the
    # published code in effect does, or from scratch, as the paper says.
    decoder_init: str = "stage1"
    use_checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self):
        if self.stage not in (1, 2):
            raise InputError(f"model.stage={self.stage}: give 1 or 2")
        if self.decoder_init not in ("stage1", "scratch"):
            raise InputError(f"model.decoder_init={self.decoder_init}: give stage1 or scratch")
        if self.stage == 2 and (self.vq_model.prefix_head or self.vq_model.clustering):
            raise InputError(
                "stage 2 trains neither a prefix head nor the codebook: leave "
                "model.vq_model.prefix_head and clustering out of its config"
            )


@dataclass
class ImageDataParams:
    # Each a folder with a folder a class, or a text file with an image's path on every line.
    train_dir: str = "imagenet/train"
    val_dir: Optional[str] = None  # held-out images for eval_every and previews
    resize: Optional[int] = None  # shorter side before the random crop; None: the image size
    random_flip: bool = True
    num_workers_per_gpu: int = 8


@dataclass
class ImageData:
    params: ImageDataParams = field(default_factory=ImageDataParams)


@dataclass
class Phase:
    """A stretch of tokenizer training; a term of weight 0 is not computed."""

    name: str = "main"
    steps: int = 0
    learning_rate: float = 1e-4
    end_lr: Optional[float] = None
    # constant, or the way from learning_rate to end_lr: cosine or linear. None: what end_lr tells,
    # constant without it and cosine with it.
    shape: Optional[str] = None
    perceptual_weight: float = 0.0  # ConvNeXt-S logits
    lpips_weight: float = 0.0
    gan_weight: float = 0.0  # of -mean(D(fake)); > 0 alternates tokenizer and discriminator steps

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"phase {self.name}: steps={self.steps}; give 1 or more")
        if self.shape is None:
            self.shape = "constant" if self.end_lr is None else "cosine"
        if self.shape not in ("constant", "cosine", "linear"):
            raise InputError(
                f"phase {self.name}: shape={self.shape}; choose constant, cosine or linear"
            )
        if (self.shape == "constant") != (self.end_lr is None):
            raise InputError(
                f"phase {self.name}: shape={self.shape} and end_lr={self.end_lr}; a constant rate "
                f"has no end_lr, the other shapes need one"
            )
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not 0 <= value < float("inf"):
                raise InputError(f"phase {self.name}: {entry.name}={value}; give 0 or more")


@dataclass
class Losses:
    """Weights that stay the same in all phases; a term of weight 0 is not computed."""

    # What the prefix tokens are judged by. strip (v1): the MSE of their strip, times K / g²;
    # stitched (v3): MSE and perceptual term of an image whose first row of patches is the strip.
    aux: str = "strip"
    aux_weight: float = 10.0
    quantizer_weight: float = 1.0

    def __post_init__(self):
        if self.aux not in ("strip", "stitched"):
            raise InputError(f"losses.aux={self.aux}: choose strip or stitched")
        for name in ("aux_weight", "quantizer_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"losses.{name}={getattr(self, name)}: give 0 or more")


@dataclass
class Perceptual:
    pretrained: bool = True  # false: random networks, for tests only


@dataclass
class TokenizerOptimizerParams:
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    warmup_steps: int = 10_000


@dataclass
class TokenizerOptimizer:
    params: TokenizerOptimizerParams = field(default_factory=TokenizerOptimizerParams)


@dataclass
class TokenizerTraining(Training):
    per_gpu_batch_size: int = 48
    # The phases rule. A number here is only compared with the sum of their steps.
    max_train_steps: Optional[int] = None


@dataclass
class TokenizerRun:
    """Options of train_tokenizer."""

    experiment: TokenizerExperiment = field(default_factory=TokenizerExperiment)
    model: TokenizerModels = field(default_factory=TokenizerModels)
    dataset: ImageData = field(default_factory=ImageData)
    optimizer: TokenizerOptimizer = field(default_factory=TokenizerOptimizer)
    losses: Losses = field(default_factory=Losses)
    perceptual: Perceptual = field(default_factory=Perceptual)
    phases: list[Phase] = field(default_factory=list)
    training: TokenizerTraining = field(default_factory=TokenizerTraining)

    def __post_init__(self):
        if not self.phases:
            raise InputError("no phases: list at least one, with its steps, in the config")
        total, expected = sum(p.steps for p in self.phases), self.training.max_train_steps
        if expected not in (None, total):
            steps = " + ".join(str(p.steps) for p in self.phases)
            raise InputError(
                f"phases do not add up: {steps} = {total} steps, but "
                f"training.max_train_steps={expected}; correct one, or leave the latter out"
            )
        model, losses = self.model.vq_model, self.losses
        if model.prefix_head and not losses.aux_weight:
            raise InputError(
                "losses.aux_weight=0 leaves the prefix head untrained: set "
                "model.vq_model.prefix_head=false too"
            )
        if losses.aux == "stitched" and model.prefix_head and model.num_prefix_tokens != model.grid:
            raise InputError(
                f"losses.aux=stitched puts the strip in place of the image's first row, so it has "
                f"no corner token: set model.vq_model.num_latent_tokens={model.grid**2 + model.grid}"
            )


# ---------------------------------------------------------------------- reading
def load(schema: type[T], argv: list[str]) -> T:
    """Options of one program: schema defaults, then `config=FILE`, then `section.option=value` …

    `--help` prints them all and ends the program.
    Raises InputError for a missing file, a misspelt option (with the nearest name), a value of the
    wrong type or a combination that does not hold together.
    """
    if {"-h", "--help"} & set(argv):
        print(
            "usage: config=FILE option=value …   (presets are in configs/)\n\noptions, by default:\n"
        )
        print(OmegaConf.to_yaml(OmegaConf.structured(schema)))
        raise SystemExit
    pairs = []
    for argument in argv:
        key, equals, value = argument.lstrip("-").partition("=")
        if not equals:
            raise InputError(f"'{argument}' is no option=value; write config=FILE option=value …")
        pairs.append((key, value))
    files = [value for key, value in pairs if key == "config"]
    if len(files) != 1:
        raise InputError("give one config=FILE, for example config=configs/alitok_b.yaml")
    from_file = read_yaml(files[0])
    try:
        from_command = OmegaConf.from_dotlist([f"{k}={v}" for k, v in pairs if k != "config"])
        check_names(schema, from_file, files[0])
        check_names(schema, from_command, "the command line")
        merged = OmegaConf.merge(OmegaConf.structured(schema), from_file, from_command)
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as e:
        raise InputError(f"config {files[0]}: {two_lines(e)}") from e


def two_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def read_yaml(path: str | Path) -> DictConfig:
    """The options of a YAML file as they stand there. Raises InputError where it has none."""
    if not Path(path).is_file():
        raise InputError(f"no config file {path}; the presets are in configs/")
    try:
        options = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as e:
        raise InputError(f"config {path}: {two_lines(e)}") from e
    if not OmegaConf.is_dict(options):
        raise InputError(f"{path} holds no options")
    return options


def tokenizer_config(path: str | Path | None, **known: Any) -> TokenizerConfig:
    """A tokenizer's sizes: what is `known`, then `model.vq_model` of a YAML file, then the defaults."""
    options: Any = {}
    try:
        if path is not None:
            found = OmegaConf.select(read_yaml(path), "model.vq_model")
            options = {} if found is None else found
            if found is not None and not OmegaConf.is_dict(found):
                raise InputError(f"config {path}: model.vq_model holds no options")
            check_names(TokenizerConfig, options, str(path), "model.vq_model.")
        merged = OmegaConf.merge(OmegaConf.structured(TokenizerConfig), options, known)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        raise InputError(f"config {path}: {two_lines(e)}") from e


def check_names(schema: type, config: Any, source: str, prefix: str = "") -> None:
    """Refuse names that the schema lacks, saying which is nearest."""
    hints = get_type_hints(schema)
    names = [f.name for f in fields(schema)]
    for key in config:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(names)}"
            raise InputError(f"{source}: there is no option {prefix}{key}; {hint}")
        value = config._get_node(key)
        if is_dataclass(hints[key]) and OmegaConf.is_dict(value):
            check_names(hints[key], value, source, f"{prefix}{key}.")
        elif get_origin(hints[key]) is list:
            if not OmegaConf.is_list(value):
                raise InputError(f"{source}: {prefix}{key} is a list; give all of it: [{{…}}, …]")
            for i in range(len(value)):
                item = value._get_node(i)
                if OmegaConf.is_dict(item):
                    check_names(get_args(hints[key])[0], item, source, f"{prefix}{key}[{i}].")


def as_dict(config: Any) -> dict[str, Any]:
    """Options as plain nested dicts, for trackers and comparisons."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)


def save(config: Any, path: str | Path) -> None:
    """Write the options of a run, resolved, as YAML that `load` reads again."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
