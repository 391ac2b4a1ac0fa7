"""Every option of the programs that take `config=FILE option=value …`: the dataclasses, nothing else.

Option names are those of the published configs. `configs.load` reads them, `configs.help` lists
them; plain dataclasses go into the models. `modeling.fields.Rule` says what is declared of each. YAML files
may hold options of other programs, because several programs read one preset.
"""

# fmt: off
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Optional, Self

from modeling.fields import Contradictions, Options, again, for_training, option
from modeling.generator import GeneratorConfig
from modeling.sampling import CACHES, ENGINES, Sampling
from modeling.tokenizer import TokenizerConfig
from runtime.errors import InputError

COMMAND_LINE = "the command line"
for_sampling = partial(option, only="sample")


class Loaded(Options):
    """Options with the places where `configs.load` found them."""

    # {full name of each option that was set: COMMAND_LINE, or "FILE, line N"}
    places: ClassVar[Mapping[str, str]] = {}
    # Full names of options that the program has not read: a run's config.yaml leaves them out.
    unread: ClassVar[tuple[str, ...]] = ()

    def changed(self, **parts: Any) -> Self:
        """These options with other sections or another `unread`; everything else is kept."""
        other = copy(self)
        vars(other).update(parts)
        other.__post_init__()
        return other


# ---------------------------------------------------------------------- every program
@dataclass
class TokenizerModel(Options):
    vq_model: TokenizerConfig = option(TokenizerConfig, "The tokenizer's sizes.")


@dataclass
class TokenizerSizes(Loaded):
    """The options that a program with flags reads from its --config."""

    model: TokenizerModel = option(TokenizerModel, "The tokenizer.")


# ---------------------------------------------------------------------- both trainers
@dataclass
class OptimizerParams(Options):
    learning_rate: float = option(4e-4, "The highest learning rate.", at_least=0)
    beta1: float = option(0.9, "Decay of the first moment.", at_least=0, below=1)
    beta2: float = option(0.96, "Decay of the second moment.", at_least=0, below=1)
    weight_decay: float = option(
        0.03, "Weight decay of the matrices of attention, MLP and output.", at_least=0, at_most=1000
    )


@dataclass
class Optimizer(Options):
    name: str = option("adamw", "The optimizer.", choices=("adamw",))
    params: OptimizerParams = option(OptimizerParams, "Parameters of AdamW.")


@dataclass
class Training(Options):
    gradient_accumulation_steps: int = option(
        1, "Batches per optimizer step.", at_least=1, at_most=2**20, resumes=True)
    per_gpu_batch_size: int = option(
        128, "Images per process and batch.", at_least=1, at_most=2**20, resumes=True,
        instead="experiment.per_proc_batch_size")
    numerics: str = option(
        "auto", "Precision of training on CUDA. published: that of the published programs "
        "(tokenizer: fp16 with a loss scaler, discriminator in float32, TF32 in convolutions "
        "only; generator: bf16 and TF32); fast: bf16 and TF32; exact: float32 without TF32; auto: "
        "fast, or on GPUs without bf16 the tokenizer's published. The next two options override "
        "it.", choices=("auto", "published", "fast", "exact"))
    mixed_precision: str = option(
        "auto", "Autocast type; auto: that of training.numerics on CUDA, no elsewhere.",
        choices=("auto", "no", "bf16", "fp16"), instead="experiment.precision")
    enable_tf32: bool | str = option(
        "auto", "TensorFloat-32 in float32 products and convolutions on CUDA; auto: that of "
        "training.numerics.", choices=("auto", True, False), resumes=True,
        instead="experiment.precision=tf32")
    enable_wandb: bool = option(
        False, "Also log to Weights & Biases, which obeys WANDB_MODE.", resumes=True)
    use_ema: bool = option(
        False, "Keep a moving average of the weights.",
        instead="experiment.generator_checkpoint; of a run folder, the average is used")
    ema_decay: float = option(
        0.999, "Decay of the average, the share that each update keeps.", at_least=0, at_most=1)
    ema_warmup: bool = option(
        True, "Warm the decay up: after n updates of the average it is (1 + n) / (10 + n), at "
        "most ema_decay.")
    compile: bool | str = option(
        False, "Compile the trained model with torch.compile; auto: only on CUDA.",
        choices=(True, False, "auto"), resumes=True, instead="experiment.compile")
    timeout_minutes: int = option(
        30, "Minutes that a rank waits for the others before it gives up.", at_least=1,
        at_most=10**6, resumes=True)
    seed: int = option(
        42, "Seed of initial weights, order, crops and dropout; null: 42.", at_least=0, null=42,
        instead="model.generator.seed")
    max_train_steps: int = option(500_000, "Optimizer steps of the run.", at_least=1)
    max_grad_norm: float = option(
        1.0, "Clip the gradient to this norm; 0 or null: no clipping.", at_least=0, null=0.0)


@dataclass
class Experiment(Options):
    project: str = for_training("alitok", "Project in Weights & Biases.")
    name: str = for_training(
        "alitok", "Name of the run in Weights & Biases.", instead="experiment.output_dir")
    output_dir: str = option("output/alitok", "Folder of the run.", path=True)
    resume: bool | str = for_training(
        True, "true: resume from the newest checkpoint; false: refuse a folder that has "
        "checkpoints; a path: start from that checkpoint or run.", path=True,
        instead="experiment.output_dir; sampling always resumes what is there")
    init_weights: Optional[str] = for_training(
        None, "Start a new run (step 1, new optimizer and average) with the weights and sizes of "
        "a file or a run folder (its average, if it has one); null: start from random weights.",
        path=True, instead="experiment.generator_checkpoint")
    save_every: int = for_training(
        10_000, "Steps between checkpoints; 0: only at the end or when stopped.", at_least=0)
    keep_checkpoints: int = for_training(
        2, "Newest checkpoints to keep; at least 2, so that one is left if the newest is damaged.",
        at_least=2)
    keep_every: int = for_training(
        0, "Never delete the checkpoints at multiples of this step; 0: delete all but the newest.",
        at_least=0)
    eval_every: int = for_training(
        10_000, "Steps between evaluations; 0: only at the end.", at_least=0)
    generate_every: int = for_training(
        10_000, "Steps between grids of samples or reconstructions; 0: no samples, "
        "reconstructions only at the end.", at_least=0,
        instead="experiment.grid for one picture of the images")
    log_every: int = for_training(
        100, "Steps between lines of the log; 0: only at the end.", at_least=0)
    log_grad_norm_every: int = for_training(
        100, "Steps between logged gradient norms; 0: none.", at_least=0)
    max_train_examples: Optional[int] = for_training(
        None, "Train on this many images only, spread evenly over all classes; null: all. "
        "Published files use it for book-keeping only.", at_least=1,
        instead="experiment.num_fid_samples")
    fid_reference: Optional[str] = option(
        None, "Reference set of the scores, as for evaluate.py. Scores are computed at every "
        "evaluation or sample grid in training, and at the end of sampling; null: no scores.",
        path=True)

    def contradictions(self) -> Contradictions:
        yield ("output_dir", Path(self.output_dir).name in ("", ".."),
               "set the name of a folder of its own, such as output/alitok")


# ---------------------------------------------------------------------- generator
@dataclass
class GeneratorExperiment(Experiment):
    generator_checkpoint: Optional[str] = for_sampling(
        None, "Weights to sample from: a file or a run folder.", path=True,
        instead="experiment.init_weights=FILE to start from weights, or experiment.resume=RUN_DIR to start from a checkpoint")
    tokenizer_checkpoint: str = option(
        "weights/AliTok.pth", "The tokenizer's weights: a file or a run folder.", path=True)
    num_fid_samples: int = option(50_000, "Images to sample.", at_least=1)
    per_proc_batch_size: Optional[int] = option(
        None, "Images sampled together; null: as many as memory allows, at most 1024; in training "
        "64.", at_least=1, at_most=2**31 - 1)
    save_png: bool = for_sampling(
        True, "Also write every image as a PNG.",
        instead="experiment.generate_every for sample grids")
    precision: str = option(
        "auto", "Precision of sampling; auto: bf16 on CUDA from Ampere on, fp32 elsewhere.",
        choices=("auto", "fp32", "tf32", "bf16"))
    compile: bool | str = for_sampling(
        "auto", "Compile the sampler with torch.compile; auto: only on CUDA.",
        choices=("auto", True, False), instead="training.compile")
    engine: str = option(
        "auto", "Attention of sampling; auto: fused on CUDA, if it passes its check there; "
        "reference: the plain loop, slow, for any backbone.", choices=(*ENGINES, "reference"))
    cache: str = for_sampling(
        "auto", "Type of the cached keys and values. int8 halves the memory of bf16 and changes "
        "images slightly; auto: the type of experiment.precision.", choices=CACHES)
    classes: Optional[list[int | str]] = option(
        None, "Classes by number or name, taken in turn; none: an image without a class; null: "
        "all classes.", at_least=0)
    codes: Optional[str] = for_sampling(
        None, "Decode the codes of this .npz instead of sampling new ones.", path=True)
    prefix: Optional[str] = for_sampling(
        None, "Complete images from a given beginning: an image, or an .npy or .npz file of "
        "codes, one image per row, taken in turn; null: sample whole images.", path=True)
    prefix_rows: Optional[int] = for_sampling(
        None, "Rows of codes to keep after the prefix tokens; null: half of the rows of an image, "
        "all codes of a file.", at_least=0, at_most=8192)
    prefix_mask: bool = for_sampling(
        False, "Before encoding, replace the rows that are not kept by the image's mean colour, "
        "so that the codes do not depend on them.")
    edit: Optional[str] = for_sampling(
        None, "Redraw the part of this image that experiment.mask marks; null: sample whole "
        "images.", path=True)
    mask: Optional[str] = for_sampling(
        None, "The part that experiment.edit redraws: x0,y0,x1,y1 in pixels of its image, x1 and "
        "y1 excluded, or an image of the same size, white where codes are drawn.", path=True)
    grid: int = for_sampling(
        0, "Also write the first N x N images as one picture; 0: no picture.", at_least=0,
        at_most=1000, instead="experiment.generate_every for sample grids")

    def contradictions(self) -> Contradictions:
        yield from super().contradictions()
        yield ("classes", self.classes is not None and not self.classes,
               "set at least one class, for example [207]")
        prefix = "it needs experiment.prefix, an image or a file of codes"
        yield "prefix_rows", self.prefix_rows is not None and self.prefix is None, prefix
        yield "prefix_mask", self.prefix_mask and self.prefix is None, prefix
        yield ("edit", self.edit is not None and self.mask is None,
               "it needs experiment.mask, the part to redraw")
        yield ("mask", self.mask is not None and self.edit is None,
               "it needs experiment.edit, the image to redraw")
        sources = [n for n in ("codes", "prefix", "edit") if getattr(self, n) is not None]
        for other in sources[1:]:
            remedy = f"experiment.{other} also gives codes of the images; leave one out"
            yield sources[0], True, remedy


@dataclass
class GeneratorOptions(GeneratorConfig, Sampling):
    """The generator's architecture, then how to sample from it."""

    codebook_size: int = again(GeneratorConfig, "codebook_size", "${model.vq_model.codebook_size}")
    guidance_scale: float = again(Sampling, "guidance_scale", 16.0)
    guidance_scale_pow: float = again(Sampling, "guidance_scale_pow", 1.8)
    seed: int = option(42, "Seed of sampling; null: 42.", at_least=0, null=42, resumes=True)

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})


@dataclass
class GeneratorModels(TokenizerModel):
    vq_model: TokenizerConfig = option(TokenizerConfig, "The tokenizer's sizes.", resumes=True)
    generator: GeneratorOptions = option(
        GeneratorOptions, "The generator's sizes, its dropout and its sampling.")

    def contradictions(self) -> Contradictions:
        generator, tokenizer = self.generator, self.vq_model
        yield ("generator.image_seq_len", generator.image_seq_len != tokenizer.num_tokens,
               f"the tokenizer (model.vq_model) makes {tokenizer.num_tokens} codes per image; set "
               f"the same number")
        known = tokenizer.codebook_size, type(generator).codebook_size  # the latter if it is unset
        yield ("generator.codebook_size", generator.codebook_size not in known,
               f"model.vq_model.codebook_size is {tokenizer.codebook_size}; leave the former out")


@dataclass
class TokenDataParams(Options):
    pretokenization: str = option("cache_alitok", "The token cache to train on.", path=True)
    train_dir: Optional[str] = option(
        None, "Train on the ten crops of this image folder or tar instead, encoded on the fly in "
        "float32.", path=True)
    val_pretokenization: Optional[str] = option(
        None, "A held-out token cache for experiment.eval_every.", path=True)
    skip_unreadable: int = option(
        0, "Unreadable images of train_dir to tolerate: the next readable image replaces each, "
        "and unreadable.txt in the run's folder lists them.", at_least=0)
    num_workers_per_gpu: Optional[int] = option(
        None, "Reading processes per GPU; 0: the main process reads; null: 8, at most one per "
        "core.", at_least=0, at_most=1024)


@dataclass
class TokenData(Options):
    params: TokenDataParams = option(TokenDataParams, "Where the codes come from.")
    preprocessing: dict[str, Any] = option(
        dict, "Accepted from published configs, without effect: pretokenization.py crops the "
        "images. Sizes other than model.vq_model.image_size are refused.", null={})


@dataclass
class SchedulerParams(Options):
    learning_rate: float = option(
        "${optimizer.params.learning_rate}", "The highest rate.", at_least=0)
    warmup_steps: int = option(62_500, "Steps of linear warm-up; 0: none.", at_least=0)
    end_lr: float = option(1e-5, "The rate at the end of the cosine.", at_least=0)
    count_from: int = option(
        0, "Number of the first update in the schedule. 0, as published: the first rate is 0 and "
        "the last is not quite end_lr.", choices=(0, 1))


@dataclass
class Scheduler(Options):
    scheduler: str = option(
        "cosine", "The rate's shape after the warm-up.", choices=("cosine", "constant"))
    params: SchedulerParams = option(SchedulerParams, "Its rates and warm-up.")


@dataclass
class GeneratorRun(Loaded):
    """Options of train_ar.py and sample_imagenet.py."""

    experiment: GeneratorExperiment = option(
        GeneratorExperiment, "Where a run lives, how often it reports, what is sampled.",
        resumes=True)
    model: GeneratorModels = option(GeneratorModels, "The two models.")
    dataset: TokenData = for_training(TokenData, "The training data.", resumes=True)
    optimizer: Optimizer = for_training(Optimizer, "The optimizer, AdamW.")
    lr_scheduler: Scheduler = for_training(Scheduler, "The learning rate.")
    training: Training = for_training(Training, "Batches, precision, steps.")

    def __post_init__(self):
        super().__post_init__()
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
        None, "Stage 2: source of encoder and codebook, a file or a run folder.", path=True)


@dataclass
class TokenizerModels(TokenizerModel):
    stage: int = option(1, "Stage of training.", choices=(1, 2))
    decoder_init: str = option(
        "stage1", "Stage 2's decoder starts from: stage1, as in the published code; scratch, as "
        "in the paper.", choices=("stage1", "scratch"))
    critic_init: str = option(
        "scratch", "The discriminator starts from: scratch; stage1: that of "
        "experiment.stage1_checkpoint, as published, or the one beside experiment.init_weights.",
        choices=("stage1", "scratch"))
    cluster_in_critic_steps: bool = option(
        False, "Also cluster the codebook in the discriminator's steps, as published.")
    use_checkpoint: bool = again(GeneratorConfig, "use_checkpoint", False)

    def contradictions(self) -> Contradictions:
        stage, sizes = self.stage, self.vq_model
        yield ("decoder_init", stage == 1 and self.decoder_init != "stage1",
               "stage 1 starts from scratch; set it for model.stage=2 only")
        yield ("cluster_in_critic_steps", self.cluster_in_critic_steps and not sizes.clustering,
               "it needs model.vq_model.clustering=true; set both or neither")
        for name in ("prefix_head", "clustering"):
            yield (f"vq_model.{name}", stage == 2 and getattr(sizes, name),
                   "stage 2 trains neither a prefix head nor the codebook; leave it out")


@dataclass
class ImageDataParams(Options):
    train_dir: str = option(
        "imagenet/train", "A folder or an uncompressed tar of class folders (or of one tar per "
        "class, as ImageNet is distributed) or of images alone; or a text file with one image "
        "path per line.", path=True, resumes=True)
    val_dir: Optional[str] = option(
        None, "Held-out images, likewise, for evaluation and previews.", path=True, resumes=True)
    train_root: Optional[str] = option(
        None, "Base folder for relative paths in text files of images, tried after the file's own "
        "folder; null: none.", path=True, resumes=True)
    skip_unreadable: int = again(TokenDataParams, "skip_unreadable", 0, resumes=True)
    resize: Optional[int] = option(
        None, "Shorter side in pixels before the random crop; null: the image size.", at_least=1,
        at_most=65536)
    random_flip: bool = option(True, "Mirror each training image with probability 1/2.")
    num_workers_per_gpu: Optional[int] = again(
        TokenDataParams, "num_workers_per_gpu", None, resumes=True)


@dataclass
class ImageData(Options):
    params: ImageDataParams = option(ImageDataParams, "Where the images are.")


@dataclass
class Phase(Options):
    """A stretch of tokenizer training; a term of weight 0 is not computed."""

    name: str = option("main", "Name of the phase in the log.")
    steps: int = option(0, "Steps of the phase.", at_least=1)
    learning_rate: float = option(1e-4, "The first rate.", at_least=0)
    end_lr: Optional[float] = option(
        None, "The last rate, reached along a half cosine; null: the first rate all the way.",
        at_least=0)
    perceptual_weight: float = option(
        0.0, "Weight of the ConvNeXt-S logits' MSE.", at_least=0, at_most=1e6)
    lpips_weight: float = option(0.0, "Weight of LPIPS.", at_least=0, at_most=1e6)
    gan_weight: float = option(
        0.0, "Weight of -mean(D(fake)); above 0, tokenizer and discriminator steps alternate.",
        at_least=0, at_most=1e6)
    critic_after: int = option(
        1, "With gan_weight: steps of the tokenizer before the discriminator's first step in the "
        "phase; then they alternate.", at_least=1)
    reset_optimizer: bool = option(
        False, "Start the phase with zeroed Adam moments and a new warm-up, as a published "
        "restart does.")


@dataclass
class Losses(Options):
    """Weights that stay the same in all phases; a term of weight 0 is not computed."""

    aux: str = option(
        "strip", "Loss of the prefix tokens. strip (v1): MSE of their strip, times K / g²; "
        "stitched (v3): MSE and perceptual term of an image whose first row of patches is the "
        "strip.", choices=("strip", "stitched"))
    aux_weight: float = option(10.0, "Weight of the prefix tokens' loss.", at_least=0, at_most=1e6)
    critic_weight: float = option(
        1.0, "Weight of the discriminator's hinge loss (published: 0.1).", above=0, at_most=1e6)


@dataclass
class TokenizerOptimizerParams(Options):
    beta1: float = option(0.9, "Decay of the first moment.", at_least=0, below=1)
    beta2: float = option(0.999, "Decay of the second moment.", at_least=0, below=1)
    weight_decay: float = option(0.01, "Weight decay.", at_least=0, at_most=1000)
    warmup_steps: int = option(
        10_000, "The tokenizer's own steps of linear warm-up, at the start of the run and of "
        "phases that reset the optimizer; 0: none.", at_least=0)
    count_from: int = option(
        0, "Number of the first step in the warm-up. 0, as published: the first rate is 0.",
        choices=(0, 1))
    critic_learning_rate: Optional[float] = option(
        None, "The discriminator's constant rate; null, as published: that of the phase, without "
        "warm-up.", at_least=0)


@dataclass
class TokenizerOptimizer(Options):
    name: str = option("adamw", "The optimizer.", choices=("adamw",))
    params: TokenizerOptimizerParams = option(
        TokenizerOptimizerParams, "Parameters of AdamW; the phases set its learning rate.")


@dataclass
class TokenizerTraining(Training):
    per_gpu_batch_size: int = again(Training, "per_gpu_batch_size", 48)
    max_train_steps: Optional[int] = option(  # type: ignore[assignment]  # the phases rule
        None, "Must equal the sum of the phases' steps; null: not checked.", at_least=1,
        resumes=True)


@dataclass
class TokenizerRun(Loaded):
    """Options of train_tokenizer."""

    experiment: TokenizerExperiment = option(
        TokenizerExperiment, "Where a run lives and how often it reports.", resumes=True)
    model: TokenizerModels = option(TokenizerModels, "The tokenizer and its stage.")
    dataset: ImageData = option(ImageData, "The training data.")
    optimizer: TokenizerOptimizer = option(TokenizerOptimizer, "The optimizer, AdamW.")
    losses: Losses = option(Losses, "Loss weights that stay the same in all phases.")
    phases: list[Phase] = option(
        list, "The phases in their order, [{name: main, steps: 1000}, …]; phases[0].steps=… sets "
        "one option.")
    training: TokenizerTraining = option(TokenizerTraining, "Batches, precision.")

    def contradictions(self) -> Contradictions:
        yield "phases", not self.phases, "list at least one, with its steps, in the config"
        total, expected = sum(p.steps for p in self.phases), self.training.max_train_steps
        steps = " + ".join(str(p.steps) for p in self.phases)
        yield ("training.max_train_steps", expected not in (None, total),
               f"the phases have {steps} = {total} steps; correct one of them, or leave this option out")
        model, losses, init = self.model, self.losses, self.experiment.init_weights
        stage, sizes = model.stage, model.vq_model
        yield ("losses.aux_weight", sizes.prefix_head and not losses.aux_weight,
               "the prefix head would stay untrained; set model.vq_model.prefix_head=false too")
        corner = sizes.prefix_head and sizes.num_prefix_tokens != sizes.grid
        yield ("losses.aux", losses.aux == "stitched" and corner,
               f"the strip replaces the image's first row, so it has no corner token; set "
               f"model.vq_model.num_latent_tokens={sizes.grid**2 + sizes.grid}")
        yield ("experiment.stage1_checkpoint",
               stage == 1 and self.experiment.stage1_checkpoint is not None,
               "stage 1 does not use it; set model.stage=2, or start from weights with "
               "experiment.init_weights=PATH or from a checkpoint with experiment.resume=PATH")
        yield ("model.critic_init", stage == 1 and init is None and model.critic_init != "scratch",
               "stage 1 starts from scratch, unless experiment.init_weights brings a "
               "discriminator; leave it out")
        yield ("model.decoder_init", init is not None and model.decoder_init == "scratch",
               "experiment.init_weights brings a decoder; leave one of them out")
