"""Train the tokenizer: `accelerate launch -m train_tokenizer config=FILE option=value …`.

Stage 1 trains everything with a causal decoder; stage 2 keeps the encoder and the codebook of a
stage-1 checkpoint and trains a bidirectional decoder. One command runs all phases of a stage; the
same command resumes an interrupted run. `--dry-run` runs a few steps of every phase, prints what the
whole run needs, and writes nothing.
"""

if not __package__:  # started as a file: other packages cannot be imported
    import sys

    command = "python -m train_tokenizer config=configs/tokenizer_stage1.yaml"
    where = "in the folder above this one; README_AliTok.md explains its options"
    print(f"error: run `{command}` {where}", file=sys.stderr)
    sys.exit(2)

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

import configs.load
from configs.schema import Phase, TokenizerRun
from configs.sizes import open_start
from data.classes import printable
from data.images import TrainImages, identity_for_all, is_path_list, list_paths, scan_images
from data.loader import worker_count
from data.subset import spread_over_classes
from data.tree import ImagePath
from evaluation import in_training
from evaluation.evaluator import Evaluator
from evaluation.lpips import LPIPS
from evaluation.reconstruction import (
    Preview,
    code_figures,
    count_codes,
    figures_of,
    image_batches,
    reconstruct,
)
from modeling.compiling import compile_blocks, inductor_or_eager
from modeling.photos import load_image
from modeling.pixels import to_float
from modeling.tokenizer import Tokenizer, TokenizerConfig, TokenizerOutput
from modeling.weights.metadata import DECODER, DISCRIMINATOR, ENCODER, TOKENIZER, about_model
from modeling.weights.opened import Opened
from modeling.weights.tensors import describe, fingerprint, load_tensors
from runtime.errors import InputError
from runtime.processes import compiles, on_main, open_on_all
from runtime.program import run as run_program
from runtime.published import WEIGHTS, MissingFile
from runtime.randomness import seed_step
from train_tokenizer.discriminator import Discriminator, hinge_loss
from train_tokenizer.losses import FrozenNetworks, tokenizer_terms
from training.accelerator import numerics_of, start_training
from training.dry_run import split_dry_run
from training.optim import EMA, adamw, clip_gradients, set_learning_rate
from training.run import Due, Run
from training.schedule import is_critic_step, phase_at, phase_lr, phase_steps, tokenizer_lr

PREVIEWS, PER_ROW = 16, 8  # images in a preview, and pictures (before | after) in its row
STAGE1_ONLY = ("decoder.ffn_aux", "decoder.conv_out_aux", "quantize.embed_prob")
BUFFERS_AND_POSITIONS = ("decoder.class_embedding", "decoder.latent_token_positional_embedding")
# A collapse: fewer codes in use, in a window with so many tokens per code that chance does not explain it.
MIN_CODEBOOK_USE, MIN_TOKENS_PER_CODE = 0.1, 10
# Codes that hardly depend on the image: a larger agreement of two images, in a window with enough images.
MAX_AGREEMENT, MIN_IMAGES = 0.9, 8


# ---------------------------------------------------------------------- data
@dataclass
class TokenizerData:
    """Training images, held-out images and the evaluator of a run."""

    paths: list[ImagePath]
    source: str  # where they come from, in words
    listed: int  # how many there are, of which some may be left out
    identity: dict[str, Any]  # must be the same when the run resumes
    dataset: TrainImages
    validation: list[ImagePath]  # paths of held-out images; may be empty
    evaluator: Optional[Evaluator]  # for rFID


def open_data(options: TokenizerRun, index_folder: Optional[Path] = None) -> TokenizerData:
    """List the images of a run; `index_folder` keeps indexes of tars.

    Raises InputError if there are none, if `resize` is too small, or if a list or the first held-out
    image cannot be read.
    """
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
    if is_path_list(params.train_dir):  # without classes
        listed = on_main(lambda: list_paths(params.train_dir, params.train_root))
        labels, source = np.zeros(len(listed), np.int64), f"a list of {len(listed)} images"
    else:
        listing = scan_images(params.train_dir, index_folder=index_folder)
        listed, labels, source = listing.paths, listing.labels, listing.describe()
    chosen = spread_over_classes(labels, options.experiment.max_train_examples or len(listed))
    paths = [listed[i] for i in chosen]
    validation = []
    if params.val_dir:
        validation = list_paths(params.val_dir, params.train_root, index_folder)
    for path in validation[:1]:  # a mistake shows now, not at the first evaluation
        load_image(path)
    evaluator = in_training.open_evaluator(
        options.experiment.fid_reference, len(validation), "dataset.params.val_dir", size
    )
    dataset = TrainImages(paths, size, resize, params.random_flip, options.training.seed)
    identity = {"images": len(paths), **identity_for_all(listed)}
    return TokenizerData(paths, source, len(listed), identity, dataset, validation, evaluator)


# ---------------------------------------------------------------------- what is trained
def build_tokenizer(options: TokenizerRun) -> Tokenizer:
    """A tokenizer with random weights; in stage 2 its encoder and codebook are frozen."""
    tokenizer = Tokenizer(options.model.vq_model)
    tokenizer.encoder.recompute = tokenizer.decoder.recompute = options.model.use_checkpoint
    if options.model.stage == 2:
        tokenizer.freeze_encoder()
    return tokenizer


def load_stage1(run: Run, tokenizer: Tokenizer) -> None:
    """Load encoder, codebook and, by default, decoder of stage 1 into the tokenizer of a new run of stage 2.

    Raises InputError if they are missing or do not fit.
    """
    stage1, model = run.options.experiment.stage1_checkpoint, run.options.model
    if stage1 is None:
        raise InputError(
            "stage 2 needs the tokenizer of stage 1: set experiment.stage1_checkpoint=RUN_DIR or a "
            "weights file, or experiment.init_weights to continue from a tokenizer of stage 2"
        )
    weights = open_on_all(stage1, TOKENIZER)
    from_stage1 = model.decoder_init == "stage1"
    sizes, new = ENCODER, ("decoder.",)  # the sizes that must agree, the tensors that start anew
    if from_stage1:
        sizes, new = ENCODER + DECODER, BUFFERS_AND_POSITIONS
    here = about_model(TOKENIZER, model.vq_model).config
    chosen = {name: here[name] for name in sizes}
    weights.sizes(chosen, "model.vq_model.{}={}".format)
    load_tensors(tokenizer, weights.state, str(weights.file), STAGE1_ONLY + new, new)
    if from_stage1 and weights.about.stage != 1:
        raise InputError(
            f"{weights.file} is not a checkpoint of stage 1 but {describe(weights.state)}: pass stage "
            f"1's run, or set model.decoder_init=scratch to take only encoder and codebook from it"
        )
    folder = Path(stage1)
    unfinished = not (folder / "tokenizer.pth").is_file()
    if unfinished and weights.file.is_relative_to(folder / "checkpoints"):
        run.checkpoint.warnings.append(
            f"{folder} has not finished: stage 2 keeps the encoder of {weights.file.parent.name} for good"
        )
    taken = "encoder, codebook and decoder" if from_stage1 else "encoder and codebook"
    run.notes.append(f"{taken} from {weights.file}")


def load_initial(run: Run, tokenizer: Tokenizer, weights: Opened) -> None:
    """Load `experiment.init_weights` into the tokenizer of a new run.

    Raises InputError if they differ in encoder or codebook from `experiment.stage1_checkpoint`.
    """
    stage1, source = run.options.experiment.stage1_checkpoint, weights.file
    load_tensors(tokenizer, weights.state, str(source))
    if stage1 is not None:
        first = open_on_all(stage1, TOKENIZER)
        if fingerprint(weights.state) != fingerprint(first.state):
            raise InputError(
                f"experiment.init_weights ({source}) and experiment.stage1_checkpoint={stage1} differ "
                f"in encoder or codebook: leave stage1_checkpoint out; both come with init_weights"
            )
    run.notes.append(f"starts from {source}: {describe(weights.state)}")


def build_discriminator(run: Run) -> Discriminator:
    """A new discriminator or, with `model.critic_init=stage1`, that of stage 1's checkpoint or of the
    initial weights; the published trainer's last.pth has one too."""
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
    """Counts of codes since the last report, on the device, and warnings of a collapse."""

    def __init__(self, config: TokenizerConfig, accelerator: Accelerator):
        self.accelerator = accelerator
        shape = config.num_tokens, config.codebook_size
        self.counts = torch.zeros(shape, dtype=torch.float64, device=accelerator.device)
        self.clustering, self.latents = config.clustering, []
        self.warned: set[str] = set()

    def add(self, out: TokenizerOutput) -> None:
        """Count the codes of a micro-batch, and keep its latents for clustering."""
        if self.clustering:
            self.latents.append(out.latents.detach().flatten(0, 1))
        count_codes(self.counts, out.codes)

    def state_dict(self) -> dict[str, Tensor]:
        """Counts (T, codebook_size) of all ranks."""
        return {"positions": self.accelerator.reduce(self.counts, "sum").cpu()}  # type: ignore[union-attr]

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        if self.accelerator.is_main_process:
            self.counts += state_dict["positions"].to(self.accelerator.device)

    def report(self, run: Run) -> dict[str, float]:
        """Share of codes used, perplexity and agreement since the last report; empty without codes."""
        counts = self.state_dict()["positions"]  # (T, codebook_size)
        self.counts.zero_()
        images, codes = counts[0].sum(), counts.shape[1]
        if not images:  # all steps were the discriminator's
            return {}
        found, problems = code_figures(counts), {}
        use, agreement = found["codebook_use"], found.get("code_agreement", 0.0)
        if use < MIN_CODEBOOK_USE and counts.sum() >= MIN_TOKENS_PER_CODE * codes:
            problems["the codebook has collapsed"] = (
                f"{use:.2%} of {codes} codes are used, perplexity {found['perplexity']:.1f}; lower the "
                f"learning rate, or train stage 1 with clustering"
            )
        if agreement > MAX_AGREEMENT and images >= MIN_IMAGES:
            problems["the codes hardly depend on the image"] = (
                f"two images have the same code at {agreement:.1%} of positions; lower the learning "
                f"rate, and look at the previews"
            )
        for problem in problems.keys() - self.warned:  # each once
            run.log.say(f"warning: {problem}: {problems[problem]}")
        self.warned |= problems.keys()
        names = {"codebook_use": "codes used", "code_agreement": "code agreement"}
        return {names.get(name, name): value for name, value in found.items()}


class TrainState:
    """Tokenizer, discriminator, their optimizers, the average and the frozen networks of the losses.

    Their state comes from the checkpoint that `run` resumes, if any, or from the weights `initial` of a new
    run. `critic` is the discriminator as wrapped by the accelerator, None without an
    adversarial phase.
    """

    def __init__(self, run: Run, evaluates: bool, initial: Optional[Opened] = None):
        options: TokenizerRun = run.options
        training, accelerator = options.training, run.accelerator
        self.options, self.accelerator, saved = options, accelerator, run.checkpoint
        self.config = options.model.vq_model
        about = about_model(TOKENIZER, self.config, stage=options.model.stage)
        # The same initial weights on every rank, whatever was built before.
        torch.manual_seed(training.seed)
        self.tokenizer = build_tokenizer(options)
        if initial is not None:
            load_initial(run, self.tokenizer, initial)
        elif options.model.stage == 2 and not run.resumed:
            load_stage1(run, self.tokenizer)
        adversarial = any(phase.gan_weight for phase in options.phases)
        self.discriminator = build_discriminator(run) if adversarial else None
        # One rank reads the disk, the others its cache.
        with accelerator.local_main_process_first():
            self.networks = FrozenNetworks(options.phases, WEIGHTS, accelerator.device)
            self.lpips = self.networks.lpips
            if self.lpips is None and evaluates:
                with suppress(MissingFile):  # then there is no val/lpips
                    self.lpips = LPIPS(WEIGHTS).to(accelerator.device)
        if not all(gather_object([self.lpips is not None])):  # a node may lack the files
            self.lpips = None
        self.ema = None
        if training.use_ema:
            self.ema = EMA(self.tokenizer, training.ema_decay, training.ema_warmup)
        saved.register_model("tokenizer", self.tokenizer, about, self.ema)
        if self.discriminator is not None:
            about = about_model(DISCRIMINATOR)
            # Optional, because a resumed run may add its first adversarial phase.
            saved.register_model("discriminator", self.discriminator, about, optional=True)

        params = options.optimizer.params
        trained = [p for p in self.tokenizer.parameters() if p.requires_grad]
        self.compiled = compiles(training.compile, "training.compile")
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
        """Compile what trains. A frozen encoder stays eager, because it computes in full float32
        (`Tokenizer.exact_latents`) and compiled code keeps the precision of its compilation."""
        tokenizer: Any = self.tokenizer
        stacks = [tokenizer.decoder.transformer]
        if not tokenizer.encoder_frozen:
            stacks.append(tokenizer.encoder.transformer)
        compile_blocks(*stacks)
        if self.discriminator is not None:
            critic: Any = self.discriminator
            critic.logits = torch.compile(critic.logits, dynamic=False, backend=inductor_or_eager)

    def reset_optimizers(self) -> None:
        """Reset Adam, as the published programs do at every phase."""
        for optimizer in (self.optimizer, self.critic_optimizer):
            if optimizer is not None:
                optimizer.optimizer.state.clear()

    def judge(self, images: Tensor) -> Tensor:
        """The discriminator's logits for the tokenizer's loss, float32.

        Its weights get no gradients. DDP would wait for them, so this calls the unwrapped module.
        """
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)  # in this pass; the backward pass may come later
        with self.accelerator.autocast():
            logits = self.discriminator(images).float()
        self.discriminator.requires_grad_(True)
        return logits


# ---------------------------------------------------------------------- reports
def enter_phase(run: Run, phases: list[Phase], step: int) -> tuple[Phase, int, int]:
    """The phase of a step, its number and the step's number in it, both from 1; logs a new phase."""
    phase, step_in_phase = phase_at(phases, step)
    number = 1 + sum(steps.stop <= step for steps in phase_steps(phases))
    if step_in_phase == 1 or step == run.first_step:
        run.log.say(f"phase {phase.name}: step {step_in_phase} of {phase.steps}")
    return phase, number, step_in_phase


def describe_run(run: Run, state: TrainState, data: TokenizerData) -> None:
    """Log the header of a run: data, hardware, phases, and what is missing or unusual."""
    options, log = state.options, run.log
    params = options.dataset.params
    if data.validation and state.lpips is None:
        log.say("no val/lpips: it needs VGG16 and its heads (weights/README.md)")
    log.say(f"{printable(params.train_dir)}: {data.source}")
    if data.validation:
        run.warn_of_same_data(params.val_dir, identity_for_all(data.validation))
    run.describe(state.tokenizer, state.compiled, len(data.paths))
    phases = " + ".join(f"{p.name} {p.steps}" for p in options.phases)
    log.say(f"stage {options.model.stage}: {phases} steps")


def report(run: Run, step: int, due: Due, state: TrainState, data: TokenizerData) -> None:
    """The validation metrics, rFID and previews that are due after a step."""
    tokenizer: Any = run.checkpoint.weights["tokenizer"][0]  # the average, if there is one
    with run.reporting(step, due):
        if due.evaluate and data.validation:
            run.log.metrics(step, evaluate(run, tokenizer, state.lpips, data))
        if due.generate:
            paths = data.validation or data.paths
            pictures = run.attempt("preview", lambda: preview(tokenizer, paths))
            if pictures is not None:
                run.log.images(step, "reconstruction", pictures, PER_ROW)


def evaluate(
    run: Run, tokenizer: Tokenizer, lpips: Optional[LPIPS], data: TokenizerData
) -> Optional[dict[str, float]]:
    """Metrics of the held-out reconstructions, and rFID with a reference; None, after a warning, if an
    image cannot be read or a figure cannot be computed."""
    paths, accelerator = data.validation, run.accelerator
    scores = in_training.reconstruction_scores(tokenizer, len(paths), lpips, data.evaluator)
    size, batch = tokenizer.config.image_size, run.training.per_gpu_batch_size
    workers = worker_count(run.options.dataset.params.num_workers_per_gpu)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = image_batches(paths, size, batch, workers, rank, world)
    figures = run.attempt(
        "evaluation", lambda: reconstruct(tokenizer, batches, scores), lambda _: figures_of(scores)
    )
    return figures and {f"val/{name}": value for name, value in figures.items()}


def preview(tokenizer: Tokenizer, paths: list[ImagePath]) -> Tensor:
    """Evenly spaced images before and after: (2N, 3, S, S) in [0, 1]; empty except on the main process."""
    processes, pictures = PartialState(), Preview(PREVIEWS)
    if processes.is_main_process:
        chosen = torch.linspace(0, len(paths) - 1, min(PREVIEWS, len(paths))).long().tolist()
        size = tokenizer.config.image_size
        batches = image_batches([paths[i] for i in chosen], size, PREVIEWS, workers=0)
        reconstruct(tokenizer, batches, [pictures])
    return pictures.pairs


# ---------------------------------------------------------------------- the program
def critic_loss(state: TrainState, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's weighted hinge loss on images and reconstructions, and values to log."""
    # A compiled block needs another program without gradients. The one with gradients exists already and
    # costs little more: it keeps the activations.
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
    """The weighted sum of the phase's terms, values to log, and the tokenizer's output."""
    out = state.model(images)
    options = state.options
    terms = tokenizer_terms(
        out, images, state.config, options.model.stage, phase, options.losses, state.networks,
        state.judge,
    )  # fmt: skip
    loss: Any = sum(weight * value for weight, value in terms.values())
    return loss, {"loss": loss, **{name: value for name, (_, value) in terms.items()}}, out


def learning_rate(options: TokenizerRun, step: int, train_critic: bool) -> float:
    """The rate of a step; the discriminator's is that of the phase unless an option sets it."""
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
    accelerator = start_training(training)
    torch.backends.cudnn.benchmark = True  # times its algorithms once per shape; shapes are fixed
    kept = None if dry_run else Path(options.experiment.output_dir)
    options, initial = open_start(options, TOKENIZER)
    data = open_data(options, index_folder=kept)
    run = Run(accelerator, options, phases, data.identity, dry_run)
    state = TrainState(run, bool(data.validation), initial)
    run.start(data.dataset, len(data.paths), data.listed)
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
            run.window.add(**values)

        # The update of the weights, after clustering, as published
        if state.codes.latents:
            state.tokenizer.quantize.before_update(torch.cat(state.codes.latents))
            state.codes.latents.clear()
        norm = clip_gradients(accelerator, model, training.max_grad_norm)
        adversarial = bool(phase.gan_weight)
        run.watch(step, norm, optimizer, "critic " if train_critic else "", alternates=adversarial)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        if state.ema is not None and not train_critic:
            state.ema.update(state.tokenizer)

        # What is due: the log, a checkpoint and, after it, reports
        due = run.due(step)
        if due.log:
            rates = {"lr": learning_rate(options, step, False)}
            if adversarial:
                rates["critic lr"] = learning_rate(options, step, True)
            run.log_window(step, {**rates, "phase": number, **state.codes.report(run)})
        if due.save:
            run.save(step, due.stop)
        report(run, step, due, state, data)

    run.finish("tokenizer", ".pth")


if __name__ == "__main__":
    run_program(main)
