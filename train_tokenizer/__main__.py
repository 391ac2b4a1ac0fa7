"""Train the tokenizer: `accelerate launch -m train_tokenizer config=FILE option=value …`.

Stage 1 trains everything with a causal decoder; stage 2 keeps the encoder and the codebook of a
stage-1 checkpoint and trains a bidirectional decoder. One command runs all phases of a stage; the
same command resumes an interrupted run. `--dry-run` runs a few steps of every phase, prints what the
whole run needs, and writes nothing.
"""

if not __package__:  # started as a file: the other packages are out of reach
    import sys

    print("error: run `python -m train_tokenizer` in the folder above this one", file=sys.stderr)
    sys.exit(2)

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn

import configs.load
from configs.schema import ImageDataParams, Phase, TokenizerRun
from data.classes import printable
from data.identity import identity_of_images
from data.images import (
    ImagePath,
    TrainImages,
    is_path_list,
    list_paths,
    load_image,
    scan_images,
    to_float,
)
from data.loader import worker_count
from data.subset import spread_over_classes
from evaluation import in_training
from evaluation.evaluator import Evaluator
from evaluation.lpips import LPIPS, lpips_is_available
from evaluation.reconstruction import (
    PositionCounts,
    Preview,
    code_agreement,
    codebook_use,
    image_batches,
    reconstruct,
)
from modeling.compiling import compile_blocks, inductor_or_eager
from modeling.tokenizer import Tokenizer, TokenizerConfig, TokenizerOutput
from modeling.weights.metadata import DECODER, DISCRIMINATOR, ENCODER, SIZES, TOKENIZER, about_model
from modeling.weights.opened import Opened
from modeling.weights.tensors import describe, fingerprint, load_tensors
from runtime.errors import InputError
from runtime.processes import compiles, on_main
from runtime.program import run as run_program
from runtime.published import WEIGHTS
from runtime.randomness import seed_step
from runtime.weights import open_on_all
from train_tokenizer.discriminator import Discriminator, hinge_loss, weights_frozen
from train_tokenizer.losses import FrozenNetworks, tokenizer_terms
from training.accelerator import describe_precision, numerics_of, start_training, tune_convolutions
from training.dry_run import split_dry_run
from training.optim import EMA, adamw, clip_gradients, set_learning_rate
from training.run import Due, Run
from training.schedule import is_critic_step, phase_at, phase_lr, tokenizer_lr

PREVIEWS, PER_ROW = 16, 8  # images in a preview, and pictures (before | after) in its row
STAGE1_ONLY = ("decoder.ffn_aux", "decoder.conv_out_aux", "quantize.embed_prob")
BUFFERS_AND_POSITIONS = ("decoder.class_embedding", "decoder.latent_token_positional_embedding")
MIN_CODEBOOK_USE = 0.1  # a smaller share of the codebook in use is worth a warning …
MIN_TOKENS_PER_CODE = 10  # … once a window has enough tokens that chance does not explain it
# Two images with the same code at a larger share of positions are worth a warning, too, once a
# window has enough images.
MAX_AGREEMENT, MIN_IMAGES = 0.9, 8


# ---------------------------------------------------------------------- data
@dataclass
class TokenizerData:
    """What a run learns from, and the held-out images and networks that it is evaluated with."""

    paths: list[ImagePath]
    source: str  # where they come from, in words
    whole: bool  # whether that is all of them
    identity_of_all: dict[str, str]  # of all that is there
    dataset: TrainImages
    validation: list[ImagePath]  # paths of held-out images; may be empty
    evaluator: Optional[Evaluator]  # for rFID

    def identity(self) -> dict[str, Any]:
        """What must be the same when the run resumes."""
        return {"images": len(self.paths), **self.identity_of_all}


def open_data(options: TokenizerRun, index_folder: Optional[Path] = None) -> TokenizerData:
    """List the images of a run. Raises InputError if there are none, if they would be too small,
    or if a list or a held-out image cannot be read. Indexes of tars are kept in `index_folder`."""
    params, size = options.dataset.params, options.model.vq_model.image_size
    resize = params.resize or size
    if resize < size:
        raise InputError(f"dataset.params.resize={resize} is smaller than the image size {size}")
    lists = [path for path in (params.train_dir, params.val_dir) if path and is_path_list(path)]
    if params.train_root is not None and not lists:
        raise InputError(
            f"dataset.params.train_root={params.train_root} is for text files of paths, and "
            f"dataset.params.train_dir={params.train_dir} is not one: leave train_root out"
        )
    listed, labels, source = list_training(params, index_folder)
    chosen = spread_over_classes(labels, options.experiment.max_train_examples or len(listed))
    paths = [listed[i] for i in chosen]
    validation = []
    if params.val_dir:
        validation = list_paths(params.val_dir, params.train_root, index_folder)
    for path in validation[:1]:  # a mistake shows now, not at the first evaluation
        load_image(path)
    evaluator = in_training.open_evaluator(
        options.experiment.fid_reference, len(validation), "dataset.params.val_dir", WEIGHTS, size
    )
    dataset = TrainImages(paths, size, resize, params.random_flip, options.training.seed)
    whole = len(paths) == len(listed)
    identity = on_main(lambda: identity_of_images(listed))
    return TokenizerData(paths, source, whole, identity, dataset, validation, evaluator)


def list_training(
    params: ImageDataParams, index_folder: Optional[Path]
) -> tuple[list[ImagePath], np.ndarray, str]:
    """All training images: paths, labels and, in words, where they are. Those of a list, and of a
    folder or tar without class folders, have one label."""
    if is_path_list(params.train_dir):
        paths = list_paths(params.train_dir, params.train_root)
        return paths, np.zeros(len(paths), np.int64), f"a list of {len(paths)} images"
    listing = scan_images(params.train_dir, index_folder=index_folder)
    labels = np.array([label for _, label in listing.samples])
    return listing.paths, labels, listing.describe()


# ---------------------------------------------------------------------- what is trained
def build_tokenizer(options: TokenizerRun) -> Tokenizer:
    """A tokenizer with random weights; in stage 2 its encoder and codebook are frozen."""
    tokenizer = Tokenizer(options.model.vq_model)
    assert tokenizer.encoder is not None and tokenizer.decoder is not None
    tokenizer.encoder.recompute = tokenizer.decoder.recompute = options.model.use_checkpoint
    if options.model.stage == 2:
        tokenizer.freeze_encoder()
    return tokenizer


def load_stage1(run: Run, tokenizer: Tokenizer) -> None:
    """Load encoder, codebook and, by default, decoder of stage 1, where a new run of stage 2 starts there.

    Raises InputError where they are missing or do not fit. A resumed run has them in its checkpoint.
    """
    experiment, model = run.options.experiment, run.options.model
    if model.stage == 1 or run.resumed or experiment.init_weights is not None:
        return
    if experiment.stage1_checkpoint is None:
        raise InputError(
            "stage 2 needs the tokenizer that stage 1 trained: set "
            "experiment.stage1_checkpoint=RUN_DIR or a weights file, or experiment.init_weights to "
            "continue from a tokenizer of stage 2"
        )
    weights = open_on_all(experiment.stage1_checkpoint, TOKENIZER)
    from_stage1 = model.decoder_init == "stage1"
    check_sizes(weights, model.vq_model, (*ENCODER, *(DECODER if from_stage1 else ())))
    if from_stage1:
        ignore, keep = STAGE1_ONLY + BUFFERS_AND_POSITIONS, BUFFERS_AND_POSITIONS
    else:
        ignore, keep = (*STAGE1_ONLY, "decoder."), ("decoder.",)
    load_tensors(tokenizer, weights.state, str(weights.file), ignore, keep)
    if from_stage1 and weights.about.stage != 1:
        raise InputError(
            f"{weights.file} is not a checkpoint of stage 1 but {describe(weights.state)}: pass stage "
            f"1's run, or set model.decoder_init=scratch to take only encoder and codebook from it"
        )


def check_sizes(weights: Opened, config: TokenizerConfig, names: tuple[str, ...]) -> None:
    """Refuse weights that differ from the config in one of these sizes."""
    here = about_model(TOKENIZER, config).config
    chosen = {name: here[name] for name in names}
    weights.about.sizes(chosen, weights.file, "model.vq_model.{}={}".format)


def load_initial(run: Run, tokenizer: Tokenizer) -> str:
    """Load `experiment.init_weights`, if this is a new run with it; returns in words what was taken.

    Raises InputError where the weights do not fit, and where they disagree with the encoder or codebook
    of `experiment.stage1_checkpoint`.
    """
    weights, options = run.initial_weights(), run.options
    if weights is None:
        return ""
    source, stage1 = weights.file, options.experiment.stage1_checkpoint
    if options.model.stage == 2 and weights.about.stage == 1:
        raise InputError(
            f"{source} is {describe(weights.state)}: for stage 2, set experiment.stage1_checkpoint to it "
            f"instead of experiment.init_weights"
        )
    check_sizes(weights, tokenizer.config, SIZES[TOKENIZER])
    load_tensors(tokenizer, weights.state, str(source))
    if stage1 is not None:
        first = open_on_all(stage1, TOKENIZER)
        if fingerprint(weights.state) != fingerprint(first.state):
            raise InputError(
                f"experiment.init_weights ({source}) and experiment.stage1_checkpoint={stage1} differ "
                f"in encoder or codebook: leave stage1_checkpoint out; both come with init_weights"
            )
    return f"starts from {source}: {describe(weights.state)}"


def build_discriminator(run: Run) -> Discriminator:
    """From scratch or, with `model.critic_init=stage1`, from stage 1's checkpoint or the run's initial
    weights. The published trainer's last.pth holds it too."""
    options = run.options
    discriminator = Discriminator(exact=numerics_of(options.training).exact_critic)
    experiment = options.experiment
    source = experiment.stage1_checkpoint or experiment.init_weights
    resumed = run.checkpoint.holds("discriminator")  # the source may be gone by now
    if options.model.critic_init == "stage1" and source is not None and not resumed:
        try:
            weights = open_on_all(source, DISCRIMINATOR)
        except InputError as e:  # there may have been no adversarial phase
            raise InputError(f"{e}; or set model.critic_init=scratch") from e
        load_tensors(discriminator, weights.state, str(weights.file))
    return discriminator


class CodebookUse:
    """How often each code was chosen since the last report, on the device; warns of a collapse."""

    def __init__(self, config: TokenizerConfig, accelerator: Accelerator):
        self.accelerator, device = accelerator, accelerator.device
        self.counts = torch.zeros(config.codebook_size, device=device)  # of this rank
        self.positions = PositionCounts(config.num_tokens, config.codebook_size, device)
        self.clustering, self.latents = config.clustering, []
        self.warned = self.warned_of_agreement = False

    def add(self, out: TokenizerOutput) -> None:
        """Codes (B, T) and latents (B, T, d) of a micro-batch; the latents are kept for clustering."""
        codes = out.codes.flatten()
        if self.clustering:
            self.latents.append(out.latents.detach().flatten(0, 1))
        self.counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=self.counts.dtype))
        self.positions.add(out.codes)

    def take_latents(self) -> Tensor:
        """The latents (N, d) of this rank's micro-batches since the last call."""
        latents, self.latents = torch.cat(self.latents), []
        return latents

    def state_dict(self) -> dict[str, Tensor]:
        """Counts of codes (codebook_size,) and by position (T, codebook_size), of all ranks."""
        counts = {"codes": self.counts, "positions": self.positions.counts}
        return {name: self.accelerator.reduce(part, "sum").cpu() for name, part in counts.items()}  # type: ignore[union-attr]

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        if self.accelerator.is_main_process:
            self.counts += state_dict["codes"].to(self.counts.device)
            self.positions.counts += state_dict["positions"].to(self.counts.device)

    def report(self, run: Run) -> dict[str, float]:
        """Share of codes used and perplexity, none if no code was counted; counts start anew."""
        counts, at_positions = self.state_dict().values()
        self.counts.zero_(), self.positions.counts.zero_()
        if not counts.any():  # all steps were the discriminator's
            return {}
        use, perplexity = codebook_use(counts)
        if not self.warned and has_collapsed(counts):
            self.warned = True
            run.log.say(
                f"warning: the codebook has collapsed: {use:.2%} of {len(counts)} codes are used, "
                f"perplexity {perplexity:.1f}; lower the learning rate, or train stage 1 with "
                f"clustering"
            )
        values = {"codes used": use, "perplexity": perplexity}
        if at_positions[0].sum().item() < 2:
            return values
        agreement = code_agreement(at_positions)
        if not self.warned_of_agreement and images_look_alike(at_positions):
            self.warned_of_agreement = True
            run.log.say(
                f"warning: the codes hardly depend on the image: two images have the same code at "
                f"{agreement:.1%} of positions; lower the learning rate, and look at the previews"
            )
        return {**values, "code agreement": agreement}


def images_look_alike(counts: Tensor) -> bool:
    """Whether counts (T, codebook_size) cover enough images, nearly all with the same codes."""
    return counts[0].sum().item() >= MIN_IMAGES and code_agreement(counts) > MAX_AGREEMENT


def has_collapsed(counts: Tensor) -> bool:
    """Whether counts (codebook_size,) use too few codes for chance to explain it."""
    use, _ = codebook_use(counts)
    return use < MIN_CODEBOOK_USE and counts.sum().item() >= MIN_TOKENS_PER_CODE * len(counts)


class TrainState:
    """Tokenizer, discriminator, their optimizers, the average and the frozen networks of the losses.

    Their state is that of the checkpoint that `run` resumes from, if any. `start` says in words where
    initial weights came from, if from a file; `about` is the metadata of the tokenizer's
    files. `critic` is the discriminator as the accelerator wraps it; without an adversarial
    phase there is none.
    """

    def __init__(self, run: Run, options: TokenizerRun, evaluates: bool):
        training, accelerator = options.training, run.accelerator
        self.options, self.accelerator, saved = options, accelerator, run.checkpoint
        self.config = options.model.vq_model
        self.about = about_model(TOKENIZER, self.config, stage=options.model.stage)
        set_seed(training.seed)  # the same initial weights on every rank, whatever was built before
        self.tokenizer = build_tokenizer(options)
        load_stage1(run, self.tokenizer)
        self.start = load_initial(run, self.tokenizer)
        adversarial = any(phase.gan_weight for phase in options.phases)
        self.discriminator = build_discriminator(run) if adversarial else None
        # One rank reads the disk, the others its cache.
        with accelerator.local_main_process_first():
            self.networks = FrozenNetworks(options.phases, WEIGHTS, accelerator.device)
            self.lpips = self.networks.lpips
            if self.lpips is None and evaluates and lpips_is_available(WEIGHTS):
                self.lpips = LPIPS(WEIGHTS).to(accelerator.device)
        self.ema = None
        if training.use_ema:
            self.ema = EMA(self.tokenizer, training.ema_decay, training.ema_warmup)
        saved.register_model("tokenizer", self.tokenizer, self.about, self.ema)
        if self.discriminator is not None:  # optional: a phase with one may come to a run without
            about = about_model(DISCRIMINATOR)
            saved.register_model("discriminator", self.discriminator, about, optional=True)

        params = options.optimizer.params
        trained = [p for p in self.tokenizer.parameters() if p.requires_grad]
        self.compiled = bool(compiles(training.compile, "training.compile"))
        if self.compiled:
            self._compile()
        self.model, self.optimizer = accelerator.prepare(self.tokenizer, adamw(trained, params))
        saved.register("optimizer", self.optimizer)
        self.critic: Any = None
        self.critic_optimizer: Any = None
        if self.discriminator is not None:
            self.critic, self.critic_optimizer = accelerator.prepare(
                self.discriminator, adamw(self.discriminator.parameters(), params)
            )
            saved.register("critic_optimizer", self.critic_optimizer, optional=True)
        if self.ema is not None:
            self.ema.prepare(accelerator)
        self.codes = CodebookUse(self.config, accelerator)
        saved.register("codes", self.codes)
        self.model.train()

    def _compile(self) -> None:
        """Compile what trains. A frozen encoder stays eager: it computes in full float32
        (`Tokenizer.exact_latents`), and a program keeps the precision that it was compiled under."""
        tokenizer: Any = self.tokenizer
        stacks = [tokenizer.decoder.transformer]
        if not tokenizer.encoder_frozen:
            stacks.append(tokenizer.encoder.transformer)
        compile_blocks(*stacks)
        if self.discriminator is not None:
            critic: Any = self.discriminator
            critic.logits = torch.compile(critic.logits, dynamic=False, backend=inductor_or_eager)

    @property
    def averaged(self) -> Tokenizer:
        """The tokenizer that is evaluated, previewed and exported: the average, if there is one."""
        part: Any = self.tokenizer if self.ema is None else self.ema.model
        return part

    def reset_optimizers(self) -> None:
        """Empty Adam's moments and counts of steps, as the published programs start every phase."""
        for optimizer in (self.optimizer, self.critic_optimizer):
            if optimizer is not None:
                optimizer.optimizer.state.clear()

    def models(self) -> dict[str, nn.Module]:
        """What is trained, by name."""
        models = {"tokenizer": self.tokenizer, "discriminator": self.discriminator}
        return {name: model for name, model in models.items() if model is not None}

    def judge(self, images: Tensor) -> Tensor:
        """The discriminator's logits in the tokenizer's loss, float32, computed as in its own steps.

        Its weights take no gradients here. Not by the wrapped module: DDP would wait for them.
        """
        assert self.discriminator is not None
        with weights_frozen(self.discriminator), self.accelerator.autocast():
            return self.discriminator(images).float()


# ---------------------------------------------------------------------- reports
def enter_phase(run: Run, phases: list[Phase], step: int) -> tuple[Phase, int, int]:
    """The phase of a step, its number and the step's number in it, both from 1; announces a phase."""
    phase, step_in_phase = phase_at(phases, step)
    number = 1 + [id(p) for p in phases].index(id(phase))  # two phases may be equal
    if step_in_phase == 1 or step == run.first_step:
        run.log.say(f"phase {phase.name}: step {step_in_phase} of {phase.steps}")
    return phase, number, step_in_phase


def refuse_fsdp(accelerator: Accelerator) -> Accelerator:
    """Raise InputError under FSDP: it would shard the codebook that clustering rewrites in place."""
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError(
            "the tokenizer does not train under FSDP, which shards the codebook that clustering "
            "moves: launch with torchrun, or accelerate without --use_fsdp (its models fit on one "
            "GPU)"
        )
    return accelerator


def describe_run(run: Run, state: TrainState, data: TokenizerData) -> None:
    """The header of a run: what trains, on what, for how long; and what is missing or unusual."""
    options, log = state.options, run.log
    params = options.dataset.params
    if data.validation and state.lpips is None:
        log.say("no val/lpips: it needs VGG16 and its heads (weights/README.md)")
    sample = "" if data.whole else f"{len(data.paths)} images, spread over all of "
    log.say(f"{printable(params.train_dir)}: {sample}{data.source}")
    if sample:
        log.say(f"warning: experiment.max_train_examples={len(data.paths)} leaves images out")
    if data.validation:
        run.warn_of_same_data(params.val_dir, lambda: identity_of_images(data.validation))
    if state.start:
        log.say(state.start)
    trained = sum(p.numel() for p in state.tokenizer.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in state.tokenizer.parameters()) - trained
    phases = " + ".join(f"{p.name} {p.steps}" for p in options.phases)
    epochs = run.total_steps * run.global_batch / len(data.paths)
    log.say(
        f"stage {options.model.stage}: {trained / 1e6:.1f}M parameters train, "
        f"{frozen / 1e6:.1f}M frozen; {len(data.paths)} images, {run.global_batch} per step; "
        f"{phases} = {run.total_steps} steps = {epochs:.1f} epochs; from step {run.first_step} on "
        f"{run.accelerator.num_processes} x {run.accelerator.device.type}; numerics "
        f"{options.training.numerics}: autocast {describe_precision(options.training)}"
    )


def report(run: Run, step: int, due: Due, state: TrainState, data: TokenizerData) -> None:
    """Validation metrics, rFID and previews of one step, as far as they are due and configured."""
    tokenizer = state.averaged
    # Eager: odd batch sizes are not worth compiling for.
    with run.reporting(step, due), torch.compiler.set_stance("force_eager"):
        if due.evaluate and data.validation:
            values = evaluate(run, state, data)
            if values is not None:
                run.log.metrics(step, values)
        if due.generate:
            pictures = run.attempt(
                "preview", lambda: preview(tokenizer, data.validation or data.paths)
            )
            if pictures is not None:
                run.log.images(step, "reconstruction", pictures, PER_ROW)


def evaluate(run: Run, state: TrainState, data: TokenizerData) -> Optional[dict[str, float]]:
    """Metrics of the held-out reconstructions, and rFID with a reference, from one pass over them.

    None, after a warning, if an image cannot be read or a figure cannot be computed.
    """
    scores = in_training.ReconstructionScores(
        state.averaged, data.validation, PartialState(), state.lpips, data.evaluator
    )
    batch = run.training.per_gpu_batch_size
    workers = worker_count(run.options.dataset.params.num_workers_per_gpu)
    measured = run.attempt("evaluation", lambda: scores.measure(batch, workers))
    return None if measured is None else run.attempt("evaluation", measured.reduced)


def preview(tokenizer: Tokenizer, paths: list[ImagePath]) -> Tensor:
    """Images from all over the list, each before and after: (2N, 3, S, S) in [0, 1] on the main
    process, empty on the others."""
    processes, pictures = PartialState(), Preview(PREVIEWS)
    if processes.is_main_process:
        chosen = torch.linspace(0, len(paths) - 1, min(PREVIEWS, len(paths))).long().tolist()
        size = tokenizer.config.image_size
        batches = image_batches([paths[i] for i in chosen], size, PREVIEWS, workers=0)
        reconstruct(tokenizer, batches, tokenizer.latent_tokens.device, [pictures])
    return pictures.pairs()


# ---------------------------------------------------------------------- the program
def critic_loss(state: TrainState, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's weighted hinge loss on images and reconstructions, and what to log."""
    # A compiled block has one program with gradients and another one without. That with gradients is
    # there already, and what it adds is little: it writes the same activations and keeps them.
    with torch.set_grad_enabled(state.compiled), state.accelerator.autocast():
        out = state.tokenizer(images)
    if state.options.model.cluster_in_critic_steps:
        state.codes.add(out)
    made = out.images.detach()
    real_logits, fake_logits = state.critic(torch.cat([images, made])).chunk(2)
    loss = state.options.losses.critic_weight * hinge_loss(real_logits, fake_logits)
    return loss, {"critic": loss, "real": real_logits.mean(), "fake": fake_logits.mean()}


def tokenizer_loss(
    state: TrainState, images: Tensor, phase: Phase
) -> tuple[Tensor, dict[str, Tensor], TokenizerOutput]:
    """The weighted sum of the phase's terms, what to log, and the tokenizer's output."""
    out = state.model(images)
    options = state.options
    terms = tokenizer_terms(
        out, images, state.config, options.model.stage, phase, options.losses, state.networks,
        state.judge,
    )  # fmt: skip
    loss: Any = sum(weight * value for weight, value in terms.values())
    return loss, {"loss": loss, **{name: value for name, (_, value) in terms.items()}}, out


def learning_rate(options: TokenizerRun, step: int, train_critic: bool) -> float:
    """The rate of a step; the discriminator's is the phase's unless it has one of its own."""
    params = options.optimizer.params
    if not train_critic:
        return tokenizer_lr(options.phases, step, params)
    own = params.critic_learning_rate
    return phase_lr(options.phases, step) if own is None else own


def main(argv: list[str]) -> None:
    dry_run, argv = split_dry_run(argv)
    options = configs.load.load(TokenizerRun, argv, "train_tokenizer")
    training, phases = options.training, options.phases

    # Set-up: processes, data, the run's folder, what is trained; from a checkpoint if there is one
    accelerator = refuse_fsdp(start_training(training))
    tune_convolutions(accelerator.device)
    kept = None if dry_run else Path(options.experiment.output_dir)
    data = open_data(options, index_folder=kept)
    run = Run(accelerator, options, phases, data.identity(), TOKENIZER, dry_run)
    state = TrainState(run, run.options, evaluates=bool(data.validation))
    params = options.dataset.params
    run.start(data.dataset, len(data.paths), params.num_workers_per_gpu, params.skip_unreadable)
    describe_run(run, state, data)
    report(run, run.first_step - 1, run.missing_reports(), state, data)

    for step in run.steps():
        phase, number, step_in_phase = enter_phase(run, phases, step)
        if phase.reset_optimizer and step_in_phase == 1:
            state.reset_optimizers()
        train_critic = is_critic_step(phase, step_in_phase)  # the tokenizer begins
        lr = learning_rate(options, step, train_critic)
        seed_step(training.seed, accelerator.process_index, step)
        model, optimizer = state.model, state.optimizer
        if train_critic:
            model, optimizer = state.critic, state.critic_optimizer

        # Gradients of the global batch, one micro-batch after another
        for _ in range(training.gradient_accumulation_steps):
            images = to_float(run.next_batch())
            with accelerator.accumulate(model):
                if train_critic:
                    loss, values = critic_loss(state, images)
                else:
                    loss, values, out = tokenizer_loss(state, images, phase)
                    state.codes.add(out)
                accelerator.backward(loss)
            run.add(**values)

        # The update of the weights; clustering comes before it, as published: it moves moved codes
        if state.codes.latents:
            state.tokenizer.quantize.before_update(state.codes.take_latents())
        norm = clip_gradients(accelerator, model, training.max_grad_norm)
        run.watch(step, norm, optimizer)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        if state.ema is not None and not train_critic:
            state.ema.update(state.tokenizer)

        # What is due: the log, a checkpoint and, after it, reports
        due = run.due(step)
        if due.log:
            run.log_window(step, {"lr": lr, "phase": number, **state.codes.report(run)})
        if due.save:
            run.save(step)
        if due.stop:
            run.exit_stopped(step)
        report(run, step, due, state, data)

    if run.dry_run is not None:
        return run.report_dry_run(state.models())
    run.export(state.averaged, "tokenizer", ".pth", state.about)
    run.finish(f"weights in {run.folder / 'tokenizer.pth'} and .safetensors")


if __name__ == "__main__":
    run_program(main)
