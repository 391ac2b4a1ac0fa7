"""Every option of the programs that take `config=FILE option=value …`: the dataclasses, nothing else.

Option names are those of the published configs. `configs.load` reads them, `configs.help` lists
them; plain dataclasses go into the models. `modeling.fields.option` declares each one: its default,
one sentence, the values that it takes, and notes, which also hold for the options of a section:

    path=True        a text where `~` is the home folder
    resumes=True     may change when a run resumes: its weights stay the same but for rounding
    only="train"     used by programs whose names begin so. Others refuse it on the command line; a
                     YAML file may hold it, because several programs read one preset
    instead="…"      what another program offers instead
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Optional

from modeling.fields import check_options, option, short
from modeling.generator import GeneratorConfig
from modeling.sampling import CACHES, ENGINES, SCHEDULES, Sampling
from modeling.tokenizer import TokenizerConfig
from runtime.errors import InputError

COMMAND_LINE = "the command line"
PRECISIONS = ("auto", "no", "bf16", "fp16")
NUMERICS = ("auto", "published", "fast", "exact")
EXACT_LOSSES = ("published", "exact")  # numerics under which the perceptual networks are float32


class Loaded:
    """What `configs.load` knows of a program's options besides their values."""

    # {full name of each option that was set: COMMAND_LINE, or "FILE, line N"}
    places: ClassVar[Mapping[str, str]] = MappingProxyType({})


# ---------------------------------------------------------------------- both trainers
@dataclass
class OptimizerParams:
    learning_rate: float = option(4e-4, "The highest learning rate.", at_least=0)
    beta1: float = option(0.9, "Decay of the first moment.", at_least=0, below=1)
    beta2: float = option(0.96, "Decay of the second moment.", at_least=0, below=1)
    weight_decay: float = option(
        0.03, "Decay of the matrices of attention, MLP and output.", at_least=0, at_most=1000
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class Optimizer:
    name: str = option("adamw", "The optimizer.", choices=("adamw",))
    params: OptimizerParams = option(OptimizerParams, "Parameters of AdamW.")

    def __post_init__(self):
        check_options(self)


@dataclass
class Training:
    gradient_accumulation_steps: int = option(
        1, "Batches per optimizer step.", at_least=1, at_most=2**20, resumes=True
    )
    per_gpu_batch_size: int = option(
        128,
        "Images per process and batch.",
        at_least=1,
        at_most=2**20,
        resumes=True,
        instead="experiment.per_proc_batch_size",
    )
    numerics: str = option(
        "auto",
        "Precision of training. published: as the published programs on CUDA (tokenizer: fp16 with "
        "a loss scaler, discriminator in float32, TF32 in convolutions only; generator: bf16); "
        "fast: bf16; exact: float32 without TF32; auto: fast (fp16 with a loss scaler on GPUs without "
        "bf16), as far as the two options below, and exact_attention, leave it.",
        choices=NUMERICS,
    )
    mixed_precision: str = option(
        "auto",
        "Autocast type; auto: that of the numerics (bf16 by default) on CUDA, no elsewhere.",
        choices=PRECISIONS,
        instead="experiment.precision",
    )
    enable_tf32: bool | str = option(
        "auto",
        "Float32 products and convolutions in TensorFloat-32 on CUDA; auto: as the numerics say "
        "(true by default).",
        choices=("auto", True, False),
        resumes=True,
        instead="experiment.precision=tf32",
    )
    enable_wandb: bool = option(
        False, "Log to Weights & Biases too; it obeys WANDB_MODE.", resumes=True
    )
    use_ema: bool = option(
        False,
        "Keep a moving average of the weights.",
        instead="experiment.generator_checkpoint; of a run folder, the average is used",
    )
    ema_decay: float = option(
        0.9999, "Share of the average that each step keeps.", at_least=0, at_most=1
    )
    ema_warmup: bool = option(
        False,
        "Warm the decay up: after n updates of the average it is (1 + n) / (10 + n), at most "
        "ema_decay.",
    )
    compile: bool | str = option(
        False,
        "torch.compile the trained model; auto: on CUDA.",
        choices=(True, False, "auto"),
        resumes=True,
        instead="experiment.compile",
    )
    timeout_minutes: int = option(
        30,
        "Minutes after which ranks give up waiting for a dead one.",
        at_least=1,
        at_most=10**6,
        resumes=True,
    )
    seed: int = option(
        42,
        "Seed of weights, order, crops and dropout; null: 42.",
        at_least=0,
        null=42,
        instead="model.generator.seed",
    )
    max_train_steps: int = option(500_000, "Optimizer steps of the run.", at_least=1)
    max_grad_norm: float = option(
        1.0, "Clip the gradient to this norm; 0 or null: no clipping.", at_least=0, null=0.0
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class Experiment:
    project: str = option("alitok", "Project in Weights & Biases.", only="train")
    name: str = option(
        "alitok",
        "Name of the run in Weights & Biases.",
        only="train",
        instead="experiment.output_dir",
    )
    output_dir: str = option("output/alitok", "Folder of the run.", path=True)
    resume: bool | str = option(
        True,
        "true: resume from the newest checkpoint; false: refuse a used folder; a path: start from "
        "that checkpoint or run.",
        path=True,
        only="train",
        instead="experiment.output_dir; sampling always resumes what is there",
    )
    init_weights: Optional[str] = option(
        None,
        "Start a new run from the weights of a file or a run folder (its average, if it has one): "
        "step 1, a new optimizer and average; null: from random weights.",
        path=True,
        only="train",
        instead="experiment.generator_checkpoint",
    )
    save_every: int = option(
        10_000, "Steps between checkpoints; 0: none.", at_least=0, only="train"
    )
    keep_checkpoints: int = option(
        2,
        "Newest checkpoints to keep; with 2, one is left when the newest is damaged.",
        at_least=2,
        only="train",
    )
    keep_every: int = option(
        0,
        "Keep the checkpoints of multiples of this step for good; 0: none.",
        at_least=0,
        only="train",
    )
    eval_every: int = option(
        10_000, "Steps between evaluations; 0: none.", at_least=0, only="train"
    )
    generate_every: int = option(
        10_000,
        "Steps between grids of samples or reconstructions; 0: none.",
        at_least=0,
        only="train",
        instead="experiment.grid for one picture of the images",
    )
    log_every: int = option(
        100, "Steps between lines of the log; 0: none.", at_least=0, only="train"
    )
    log_grad_norm_every: int = option(
        100, "Steps between logged gradient norms; 0: none.", at_least=0, only="train"
    )
    max_train_examples: Optional[int] = option(
        None,
        "Train on this many images only, spread over all classes; null: all.",
        at_least=1,
        only="train",
        instead="experiment.num_fid_samples",
    )
    fid_reference: Optional[str] = option(
        None,
        "Score against this while training, as evaluate.py --reference; null: never.",
        path=True,
        only="train",
        instead="experiment.evaluate",
    )

    def __post_init__(self):
        check_options(self)
        if Path(self.output_dir).name in ("", ".."):
            raise InputError(
                f"output_dir={short(self.output_dir)}: set the name of a folder of its own, such as "
                f"output/alitok",
                "output_dir",
            )


# ---------------------------------------------------------------------- generator
@dataclass
class GeneratorExperiment(Experiment):
    generator_checkpoint: Optional[str] = option(
        None,
        "Weights to sample from: a file or a run folder.",
        path=True,
        only="sample",
        instead="experiment.init_weights=FILE to start from weights, or experiment.resume=RUN_DIR to start from a checkpoint",
    )
    tokenizer_checkpoint: str = option(
        "weights/AliTok.pth", "The tokenizer's weights: a file or a run folder.", path=True
    )
    num_fid_samples: int = option(50_000, "Images to sample.", at_least=1)
    per_proc_batch_size: Optional[int] = option(
        None,
        "Images sampled together; null: as many as memory allows, at most 512.",
        at_least=1,
        at_most=2**31 - 1,
    )
    save_png: bool = option(
        True,
        "Write every image as a PNG too.",
        only="sample",
        instead="experiment.generate_every for sample grids",
    )
    evaluate: Optional[str] = option(
        None,
        "Score the samples against this reference at the end; null: do not.",
        path=True,
        only="sample",
        instead="experiment.fid_reference",
    )
    precision: str = option(
        "auto",
        "Precision of sampling; auto: bf16 on CUDA, fp32 on a CPU.",
        choices=("auto", "fp32", "tf32", "bf16"),
    )
    compile: bool | str = option(
        "auto",
        "torch.compile the sampler; auto: on CUDA.",
        choices=("auto", True, False),
        only="sample",
        instead="training.compile",
    )
    engine: str = option(
        "auto",
        "Attention of sampling; auto: fused on CUDA if it is right there; reference: the plain loop, "
        "slow, for any backbone.",
        choices=(*ENGINES, "reference"),
    )
    cache: str = option(
        "auto",
        "Keys and values in sampling; int8: half the bytes of bf16, slightly other images; auto: as "
        "the precision.",
        choices=CACHES,
        only="sample",
    )
    classes: Optional[list[int | str]] = option(
        None,
        "Image i has class classes[i mod their number], by number or name; none: an image without a "
        "class; null: all classes.",
        at_least=0,
    )
    codes: Optional[str] = option(
        None,
        "Decode the codes of this .npz instead of sampling new ones.",
        path=True,
        only="sample",
    )
    prefix: Optional[str] = option(
        None,
        "Complete images from their beginning: an image, or an .npy or .npz of codes, of which image "
        "i begins with row i mod their number; null: sample whole images.",
        path=True,
        only="sample",
    )
    prefix_rows: Optional[int] = option(
        None,
        "Rows of codes that the prefix holds after the prefix tokens; null: half of an image's rows, "
        "and all of a file's codes.",
        at_least=0,
        at_most=8192,
        only="sample",
    )
    prefix_mask: bool = option(
        False,
        "Encode the prefix's image with its mean colour in place of all other rows, so that the "
        "codes know nothing of them.",
        only="sample",
    )
    grid: int = option(
        0,
        "N: write the first N x N images as one picture too; 0: none.",
        at_least=0,
        at_most=1000,
        only="sample",
        instead="experiment.generate_every for sample grids",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.classes is not None and not self.classes:
            raise InputError("classes=[]: set at least one class, for example [207]", "classes")
        if self.prefix is None and (self.prefix_rows is not None or self.prefix_mask):
            name = "prefix_mask" if self.prefix_rows is None else "prefix_rows"
            raise InputError(
                f"{name}={getattr(self, name)} needs experiment.prefix=FILE, an image or a file of "
                f"codes",
                name,
            )
        if self.prefix is not None and self.codes is not None:
            raise InputError(
                f"codes={short(self.codes)} decodes whole images, but "
                f"experiment.prefix={short(self.prefix)} samples the rest of images: leave one out",
                "codes",
            )


@dataclass
class GeneratorOptions(GeneratorConfig):
    """The generator's architecture, then how to sample from it."""

    num_hidden_layers: int = option(24, "Blocks.", at_least=1, at_most=1024)
    codebook_size: int = option(
        "${model.vq_model.codebook_size}",
        "Codes of the tokenizer's codebook.",
        at_least=1,
        at_most=65536,
    )
    randomize_temperature: float = option(
        1.0,
        "Softmax temperature of sampling; 1e-5 takes the most likely code.",
        at_least=1e-6,
        resumes=True,
    )
    guidance_scale: float = option(
        16.0,
        "Scale of classifier-free guidance; 0 or 1: none.",
        at_least=0,
        at_most=10_000,
        resumes=True,
    )
    guidance_scale_pow: float = option(
        1.8, "Power of the power-cosine guidance schedule.", at_least=0, at_most=1000, resumes=True
    )
    guidance_schedule: str = option(
        "power-cosine", "How guidance grows from token to token.", choices=SCHEDULES, resumes=True
    )
    top_k: int = option(
        0, "Draw among this many most likely codes; 0: all.", at_least=0, resumes=True
    )
    top_p: float = option(
        1.0,
        "Draw among the fewest codes that hold this probability; 1: all.",
        above=0,
        at_most=1,
        resumes=True,
    )
    seed: int = option(42, "Seed of sampling; null: 42.", at_least=0, null=42, resumes=True)

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
    vq_model: TokenizerConfig = option(TokenizerConfig, "The tokenizer's sizes.", resumes=True)
    generator: GeneratorOptions = option(
        GeneratorOptions, "The generator's sizes, its dropout and its sampling."
    )

    def __post_init__(self):
        check_options(self)
        check_layers(self.vq_model)
        generator, tokenizer = self.generator, self.vq_model
        if generator.image_seq_len != tokenizer.num_tokens:
            raise InputError(
                f"generator.image_seq_len={generator.image_seq_len}, but the tokenizer "
                f"(model.vq_model) makes {tokenizer.num_tokens} codes per image: set the same number",
                "generator.image_seq_len",
            )
        if generator.codebook_size not in (
            tokenizer.codebook_size,
            "${model.vq_model.codebook_size}",
        ):
            raise InputError(
                f"generator.codebook_size={generator.codebook_size}, but "
                f"model.vq_model.codebook_size={tokenizer.codebook_size}: leave the former out",
                "generator.codebook_size",
            )


@dataclass
class TokenDataParams:
    pretokenization: str = option("cache_alitok", "The token cache to train on.", path=True)
    train_dir: Optional[str] = option(
        None,
        "Train on the ten crops of this image folder or tar instead, encoded on the fly.",
        path=True,
    )
    encoder_precision: str = option(
        "fp32",
        "Precision of the encoder with train_dir. fp32: float32, with TF32 where training uses it; "
        "autocast: the autocast type of training, which is faster and changes some codes.",
        choices=("fp32", "autocast"),
    )
    val_pretokenization: Optional[str] = option(
        None, "A held-out token cache for experiment.eval_every.", path=True
    )
    skip_unreadable: int = option(
        0,
        "Unreadable images that the next readable one may replace; unreadable.txt in the run's folder "
        "lists them. Only with train_dir.",
        at_least=0,
    )
    num_workers_per_gpu: int = option(
        4, "Reading processes per GPU; 0: none.", at_least=0, at_most=1024
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class TokenData:
    params: TokenDataParams = option(TokenDataParams, "Where the codes come from.")
    preprocessing: dict[str, Any] = option(
        dict,
        "Accepted from published configs, without effect: pretokenization.py crops the images. "
        "Sizes other than model.vq_model.image_size are refused.",
        null={},
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class SchedulerParams:
    learning_rate: float = option(
        "${optimizer.params.learning_rate}", "The highest rate.", at_least=0
    )
    warmup_steps: int = option(62_500, "Steps of linear warm-up; 0: none.", at_least=0)
    end_lr: float = option(1e-5, "The rate at the end of the cosine.", at_least=0)
    count_from: int = option(
        1,
        "Number of the first update in the schedule; 0 (as published): its rate is 0, and the last "
        "one's is not quite end_lr.",
        choices=(0, 1),
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class Scheduler:
    scheduler: str = option(
        "cosine", "The rate's shape after the warm-up.", choices=("cosine", "constant")
    )
    params: SchedulerParams = option(SchedulerParams, "Its rates and warm-up.")

    def __post_init__(self):
        check_options(self)


@dataclass
class GeneratorRun(Loaded):
    """Options of train_ar.py and sample_imagenet.py."""

    experiment: GeneratorExperiment = option(
        GeneratorExperiment,
        "Where a run lives, how often it reports, what is sampled.",
        resumes=True,
    )
    model: GeneratorModels = option(GeneratorModels, "The two models.")
    dataset: TokenData = option(TokenData, "The training data.", resumes=True, only="train")
    optimizer: Optimizer = option(Optimizer, "The optimizer, AdamW.", only="train")
    lr_scheduler: Scheduler = option(Scheduler, "The learning rate.", only="train")
    training: Training = option(Training, "Batches, precision, steps.", only="train")

    def __post_init__(self):
        check_options(self)
        size = self.model.vq_model.image_size
        for name in ("resize_shorter_edge", "crop_size"):
            value = self.dataset.preprocessing.get(name, size)
            if value != size:
                raise InputError(
                    f"dataset.preprocessing.{name}={value}: the images of this model have {size} "
                    f"pixels a side (model.vq_model.image_size); leave it out",
                    f"dataset.preprocessing.{name}",
                )


# ---------------------------------------------------------------------- tokenizer
@dataclass
class TokenizerExperiment(Experiment):
    stage1_checkpoint: Optional[str] = option(
        None, "Stage 2: where encoder and codebook come from, a file or a run folder.", path=True
    )


@dataclass
class TokenizerModels:
    stage: int = option(1, "Stage of training.", choices=(1, 2))
    vq_model: TokenizerConfig = option(TokenizerConfig, "The tokenizer's sizes.")
    decoder_init: str = option(
        "stage1",
        "Stage 2's decoder starts from stage 1's (as the published code) or from scratch (as the "
        "paper says).",
        choices=("stage1", "scratch"),
    )
    critic_init: str = option(
        "scratch",
        "Stage 2's discriminator starts from stage 1's (as published) or from scratch.",
        choices=("stage1", "scratch"),
    )
    cluster_in_critic_steps: bool = option(
        False, "Cluster the codebook in the discriminator's steps too (as published)."
    )
    use_checkpoint: bool = option(
        False, "Recompute activations in the backward pass: less memory, more time.", resumes=True
    )

    def __post_init__(self):
        check_options(self)
        check_layers(self.vq_model)
        for name, default in (("critic_init", "scratch"), ("decoder_init", "stage1")):
            value = getattr(self, name)
            if self.stage == 1 and value != default:
                raise InputError(
                    f"{name}={value}: stage 1 always starts from scratch; this is an option of "
                    f"model.stage=2",
                    name,
                )
        if self.cluster_in_critic_steps and not self.vq_model.clustering:
            raise InputError(
                "cluster_in_critic_steps=True needs model.vq_model.clustering=true: set it, or leave "
                "the former out",
                "cluster_in_critic_steps",
            )
        for name in ("prefix_head", "clustering"):
            if self.stage == 2 and getattr(self.vq_model, name):
                raise InputError(
                    f"vq_model.{name}=True: stage 2 trains neither a prefix head nor the codebook; "
                    f"leave model.vq_model.prefix_head and model.vq_model.clustering out",
                    f"vq_model.{name}",
                )


@dataclass
class ImageDataParams:
    train_dir: str = option(
        "imagenet/train",
        "A folder or an uncompressed tar, of one folder per class (or one tar, as ImageNet's is "
        "downloaded) or of images alone; or a text file with one image path per line.",
        path=True,
        resumes=True,
    )
    val_dir: Optional[str] = option(
        None, "Held-out images, likewise, for evaluation and previews.", path=True, resumes=True
    )
    train_root: Optional[str] = option(
        None,
        "Folder of the relative paths in those text files; null: the folder of the file, which "
        "always comes first.",
        path=True,
        resumes=True,
    )
    skip_unreadable: int = option(
        0,
        "Unreadable images that the next readable one may replace; unreadable.txt in the run's folder "
        "lists them.",
        at_least=0,
        resumes=True,
    )
    resize: Optional[int] = option(
        None,
        "Shorter side in pixels before the random crop; null: the image size.",
        at_least=1,
        at_most=65536,
    )
    random_flip: bool = option(True, "Mirror half of the training images.")
    num_workers_per_gpu: int = option(
        8, "Reading processes per GPU; 0: none.", at_least=0, at_most=1024, resumes=True
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class ImageData:
    params: ImageDataParams = option(ImageDataParams, "Where the images are.")

    def __post_init__(self):
        check_options(self)


@dataclass
class Phase:
    """A stretch of tokenizer training; a term of weight 0 is not computed."""

    name: str = option("main", "Name of the phase in the log.")
    steps: int = option(0, "Steps of the phase.", at_least=1)
    learning_rate: float = option(1e-4, "The first rate.", at_least=0)
    end_lr: Optional[float] = option(None, "The last rate; null: constant.", at_least=0)
    shape: Optional[str] = option(
        None,
        "The way from the first rate to the last; null: constant without end_lr, cosine with it.",
        choices=("constant", "cosine", "linear"),
    )
    perceptual_weight: float = option(
        0.0, "Weight of the ConvNeXt-S logits' MSE.", at_least=0, at_most=1e6
    )
    lpips_weight: float = option(0.0, "Weight of LPIPS.", at_least=0, at_most=1e6)
    gan_weight: float = option(
        0.0,
        "Weight of -mean(D(fake)); above 0, tokenizer and discriminator steps alternate.",
        at_least=0,
        at_most=1e6,
    )
    critic_after: int = option(
        1,
        "With gan_weight: steps of the tokenizer before the discriminator's first step in the "
        "phase; then they alternate.",
        at_least=1,
    )

    def __post_init__(self):
        try:
            check_options(self)
        except InputError as e:
            raise InputError(f"{e} (phase {short(self.name)})", e.option) from e
        if self.shape is None:
            self.shape = "constant" if self.end_lr is None else "cosine"
        if (self.shape == "constant") != (self.end_lr is None):
            raise InputError(
                f"shape={self.shape} and end_lr={self.end_lr} (phase {short(self.name)}): a constant rate "
                f"has no end_lr, the other shapes need one",
                "shape",
            )


@dataclass
class Losses:
    """Weights that stay the same in all phases; a term of weight 0 is not computed."""

    aux: str = option(
        "strip",
        "How the prefix tokens are judged. strip (v1): MSE of their strip, times K / g²; stitched "
        "(v3): MSE and perceptual term of an image whose first row of patches is the strip.",
        choices=("strip", "stitched"),
    )
    aux_weight: float = option(10.0, "Weight of that term.", at_least=0, at_most=1e6)
    quantizer_weight: float = option(
        1.0, "Weight of the quantizer's loss.", at_least=0, at_most=1e6
    )
    critic_weight: float = option(
        1.0, "Weight of the discriminator's hinge loss (published: 0.1).", above=0, at_most=1e6
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class Perceptual:
    pretrained: bool = option(
        True, "Pretrained perceptual networks; false: random ones, for tests only."
    )
    precision: str = option(
        "fp32",
        "Convolutions and products of the perceptual networks in the losses: fp32, as published, or "
        "bf16, which is faster on GPUs.",
        choices=("fp32", "bf16"),
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class TokenizerOptimizerParams:
    beta1: float = option(0.9, "Decay of the first moment.", at_least=0, below=1)
    beta2: float = option(0.999, "Decay of the second moment.", at_least=0, below=1)
    weight_decay: float = option(0.01, "Weight decay.", at_least=0, at_most=1000)
    warmup_steps: int = option(
        10_000,
        "The tokenizer's own steps of linear warm-up at the start of the run; 0: none.",
        at_least=0,
    )
    count_from: int = option(
        1,
        "Number of the first step in the warm-up; 0 (as published): its rate is 0.",
        choices=(0, 1),
    )
    critic_learning_rate: Optional[float] = option(
        None,
        "The discriminator's constant rate (published: 1e-4); null: that of the tokenizer.",
        at_least=0,
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class TokenizerOptimizer:
    name: str = option("adamw", "The optimizer.", choices=("adamw",))
    params: TokenizerOptimizerParams = option(
        TokenizerOptimizerParams, "Parameters of AdamW; the phases set its learning rate."
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class TokenizerTraining(Training):
    per_gpu_batch_size: int = option(
        48, "Images per process and batch.", at_least=1, at_most=2**20, resumes=True
    )
    max_train_steps: Optional[int] = option(  # type: ignore[assignment]  # the phases rule
        None,
        "Only compared with the sum of the phases' steps; null: not.",
        at_least=1,
        resumes=True,
    )


@dataclass
class TokenizerRun(Loaded):
    """Options of train_tokenizer."""

    experiment: TokenizerExperiment = option(
        TokenizerExperiment, "Where a run lives and how often it reports.", resumes=True
    )
    model: TokenizerModels = option(TokenizerModels, "The tokenizer and its stage.")
    dataset: ImageData = option(ImageData, "The training data.")
    optimizer: TokenizerOptimizer = option(TokenizerOptimizer, "The optimizer, AdamW.")
    losses: Losses = option(Losses, "Loss weights that stay the same in all phases.")
    perceptual: Perceptual = option(Perceptual, "The perceptual networks.")
    phases: list[Phase] = option(
        list, "The phases in their order, always the whole list: [{name: main, steps: 1000}, …]."
    )
    training: TokenizerTraining = option(TokenizerTraining, "Batches, precision.")

    def __post_init__(self):
        check_options(self)
        if not self.phases:
            raise InputError("no phases: list at least one, with its steps, in the config")
        total, expected = sum(p.steps for p in self.phases), self.training.max_train_steps
        if expected not in (None, total):
            steps = " + ".join(str(p.steps) for p in self.phases)
            raise InputError(
                f"training.max_train_steps={expected}, but the phases have {steps} = {total} "
                f"steps: correct one, or leave the former out",
                "training.max_train_steps",
            )
        if self.perceptual.precision == "bf16" and self.training.numerics in EXACT_LOSSES:
            raise InputError(
                f"training.numerics={self.training.numerics} computes the losses in float32, but "
                f"perceptual.precision=bf16: leave one of the two out"
            )
        model, losses = self.model.vq_model, self.losses
        if model.prefix_head and not losses.aux_weight:
            raise InputError(
                "losses.aux_weight=0 leaves the prefix head untrained: set "
                "model.vq_model.prefix_head=false too",
                "losses.aux_weight",
            )
        if losses.aux == "stitched" and model.prefix_head and model.num_prefix_tokens != model.grid:
            raise InputError(
                f"losses.aux=stitched puts the strip in place of the image's first row, so it has "
                f"no corner token: set model.vq_model.num_latent_tokens={model.grid**2 + model.grid}",
                "losses.aux",
            )
        if self.model.stage == 1 and self.experiment.stage1_checkpoint is not None:
            raise InputError(
                f"experiment.stage1_checkpoint={short(self.experiment.stage1_checkpoint)}: stage 1 "
                f"does not use it; set model.stage=2 for stage 2, experiment.init_weights=PATH to "
                f"start stage 1 from weights, or experiment.resume=PATH from a checkpoint",
                "experiment.stage1_checkpoint",
            )
        self.check_init_weights()

    def check_init_weights(self) -> None:
        """Refuse options of stage 2 that take from stage 1 what `init_weights` brings or lacks."""
        experiment, model = self.experiment, self.model
        if experiment.init_weights is None:
            return
        if model.decoder_init == "scratch":
            raise InputError(
                "model.decoder_init=scratch, but experiment.init_weights brings a decoder: leave one "
                "of them out",
                "model.decoder_init",
            )
        if model.critic_init == "stage1" and experiment.stage1_checkpoint is None:
            raise InputError(
                "model.critic_init=stage1, but experiment.init_weights brings no discriminator: set "
                "model.critic_init=scratch, or experiment.stage1_checkpoint too",
                "model.critic_init",
            )


def check_layers(tokenizer: TokenizerConfig) -> None:
    """Refuse a tokenizer without blocks, which the model allows and no run means."""
    for name in ("encoder_layers", "decoder_layers"):
        if getattr(tokenizer, name) < 1:
            raise InputError(
                f"vq_model.{name}={getattr(tokenizer, name)}: set 1 or more", f"vq_model.{name}"
            )
