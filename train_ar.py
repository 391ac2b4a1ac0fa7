"""Train the generator on a token cache: `accelerate launch train_ar.py config=FILE option=value …`.

The same command resumes an interrupted run. `--dry-run` runs a few steps, prints what the whole run
needs, and writes nothing.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.utils.data import Dataset

import configs.load
from configs.schema import GeneratorRun, Phase
from configs.sizes import with_classes, with_start, with_weights
from data.classes import describe_classes, printable
from data.identity import hash_of_texts
from data.imagenet import misnumbered
from data.images import (
    VIEWS,
    ImageListing,
    TrainViews,
    identity_for_all,
    scan_images,
    to_float,
)
from data.order import EpochDraws
from data.subset import KeyedSubset, evenly_spaced, spread_over_classes
from data.tokens import TokenCache, TrainTokens, open_tokens
from data.tree import describe_left_out, refuse_inside
from evaluation import in_training
from evaluation.evaluator import Evaluator
from evaluation.likelihood import Likelihood, Share, likelihood_sums
from evaluation.metrics import summed
from generation.job import in_options
from modeling.compiling import compile_training
from modeling.generator import Generator, build_generator
from modeling.randomness import image_uniforms
from modeling.tokenizer import Tokenizer
from modeling.weights.class_names import ClassNames
from modeling.weights.metadata import GENERATOR, TOKENIZER, About, about_model
from modeling.weights.opened import Opened, load_tokenizer
from modeling.weights.tensors import describe, fingerprint, load_tensors
from runtime.errors import InputError
from runtime.processes import check_same, compiles, device_name, on_main
from runtime.program import run as run_program
from runtime.published import WEIGHTS
from runtime.randomness import seed_step
from runtime.weights import open_on_all
from training.accelerator import describe_precision, start_training
from training.checkpoint import WHOLE, WholeOptimizer
from training.dry_run import split_dry_run
from training.initial import fit_classes, open_initial
from training.optim import EMA, adamw, clip_gradients, set_learning_rate
from training.run import Due, Run
from training.schedule import generator_lr
from training.utilisation import training_flops

GRID_CLASSES, GRID_PER_CLASS = 10, 4  # of a sample grid
PROBED = 16  # images whose codes are checked when a cache is opened


# ---------------------------------------------------------------------- data
@dataclass
class TrainingSet:
    """The training data: a token cache or image folder, or a part of it."""

    source: str
    dataset: Dataset  # (codes or image, label) by (epoch, index)
    listed: int  # images in the source
    views: int  # per image
    labels: np.ndarray  # (images,), of those that are used for training
    classes: list[str]  # names; a label is an index into them
    skip_unreadable: Optional[int]  # None for codes
    identity: dict[str, str]  # of the source's images or codes
    left_out: str = ""  # a description of other files in the source

    @property
    def images(self) -> int:
        """How many are used for training."""
        return len(self.labels)


@dataclass
class GeneratorData:
    """The data of training and validation, and what scores need."""

    options: GeneratorRun  # the run's, with the data's number of classes and `experiment.classes` as labels
    train: TrainingSet
    names: ClassNames  # of its classes
    tokenizer_hash: Optional[str]  # of the codes' tokenizer; a published cache states none
    tokenizer: Optional[Tokenizer]  # for samples and to encode images; on the device, frozen
    encoder: Optional[Tokenizer]  # the tokenizer, if the dataset yields images to encode
    validation: Optional[TokenCache]  # its labels are the training set's
    evaluator: Optional[Evaluator]  # for gFID

    def identity(self) -> dict[str, Any]:
        """Must be the same when the run resumes."""
        train = self.train
        return {
            "images": train.images, "views": train.views, "tokenizer": str(self.tokenizer_hash),
            "classes": hash_of_texts(train.classes), **train.identity,
        }  # fmt: skip


def open_data(
    options: GeneratorRun,
    accelerator: Accelerator,
    weights: Optional[Opened] = None,
    index_folder: Optional[Path] = None,
) -> GeneratorData:
    """Open the training data of a run, and what it is evaluated with.

    `weights` are the tokenizer's (`open_tokenizer`); `index_folder` keeps the index of a tar. Raises
    InputError if data and models do not fit.
    """
    params, experiment = options.dataset.params, options.experiment
    tokenizer = encoder = None
    known = heads = None  # fingerprint and heads of the encoder that a cache must be from, if known
    if weights is not None:
        tokenizer = load_tokenizer(weights, options.model.vq_model).requires_grad_(False)
        tokenizer.to(accelerator.device)
        known, heads = fingerprint(weights.state), options.model.vq_model.encoder_heads
    if params.train_dir is None:
        if index_folder is not None:
            refuse_inside(index_folder, params.pretokenization)
        store = open_cache(params.pretokenization, options, known, heads)
        options = with_classes(options, params.pretokenization, len(store.classes))
        tokenizer_hash = store.manifest["tokenizer"]
        known, heads = known or tokenizer_hash, heads or store.manifest.get("encoder_heads")
        train = train_on_codes(store, options)
    else:
        listing, encoder = scan_images(params.train_dir, index_folder=index_folder), tokenizer
        assert encoder is not None, "images need a tokenizer (`open_tokenizer`)"
        encoder.freeze_encoder()  # then it computes in full float32, as pretokenization
        options = with_classes(options, params.train_dir, len(listing.classes))
        tokenizer_hash = known
        train = train_on_images(listing, options)
    limit, validation = experiment.max_train_examples or train.images, None
    if limit < train.images:
        chosen = spread_over_classes(train.labels, limit)
        dataset = KeyedSubset(train.dataset, chosen)
        train = replace(train, dataset=dataset, labels=train.labels[chosen])
    if params.val_pretokenization is not None:
        validation = open_cache(params.val_pretokenization, options, known, heads)
        validation.use_classes(train.classes)
    scored, needed = experiment.num_fid_samples, "experiment.num_fid_samples"
    if not experiment.generate_every:
        scored, needed = 0, "experiment.generate_every"
    evaluator = in_training.open_evaluator(
        experiment.fid_reference, scored, needed, WEIGHTS, options.model.vq_model.image_size
    )
    names = ClassNames(
        options.model.generator.condition_num_classes, dict(enumerate(train.classes))
    )
    if experiment.classes is not None:  # by number from here on
        labels = in_options(names.labels(experiment.classes))
        options = options.changed(experiment=replace(experiment, classes=labels))
    if experiment.generate_every:  # refused now, not at the first samples
        in_training.job_in_training(options, accelerator.device)
    return GeneratorData(
        options, train, names, tokenizer_hash, tokenizer, encoder, validation, evaluator
    )


def train_on_codes(store: TokenCache, options: GeneratorRun) -> TrainingSet:
    """The images of a token cache."""
    if options.dataset.params.skip_unreadable:
        raise InputError(
            f"dataset.params.skip_unreadable={options.dataset.params.skip_unreadable}: a token cache "
            f"holds no images; leave it out, or set dataset.params.train_dir to train on images "
            f"(pretokenization.py has --skip_unreadable)"
        )
    files = store.manifest.get("files", [])  # none in the published layout
    check_same({"codes": hash_of_texts(file["sha256"] for file in files)}, "another cache")
    return TrainingSet(
        str(store.folder), TrainTokens(store, draws_of(options, store.images, store.views)),
        store.images, store.views, store.labels, store.classes, skip_unreadable=None, identity=on_main(store.identity),
    )  # fmt: skip


def train_on_images(listing: ImageListing, options: GeneratorRun) -> TrainingSet:
    """The ten crops of the images of a folder or tar."""
    paths, labels, views = listing.paths, listing.labels, VIEWS["ten_crop"]
    draws = draws_of(options, len(paths), views)
    return TrainingSet(
        str(listing.root), TrainViews(paths, labels, options.model.vq_model.image_size, draws),
        len(paths), views, labels, listing.classes,
        options.dataset.params.skip_unreadable, identity_for_all(listing.paths),
        describe_left_out(listing.left_out),
    )  # fmt: skip


def draws_of(options: GeneratorRun, images: int, views: int) -> EpochDraws:
    config, seed = options.model.generator, options.training.seed
    return EpochDraws(images, views, seed, config.class_label_dropout, config.no_class)


def open_tokenizer(options: GeneratorRun) -> Optional[Opened]:
    """`experiment.tokenizer_checkpoint`, if the run decodes samples or encodes images."""
    if not (options.experiment.generate_every or options.dataset.params.train_dir):
        return None
    return open_on_all(options.experiment.tokenizer_checkpoint, TOKENIZER)


def open_cache(
    path: str, options: GeneratorRun, tokenizer: str | None, encoder_heads: int | None
) -> TokenCache:
    """A token cache; labels and some codes are checked now. Raises InputError if it does not fit the
    configured models, or the tokenizer's fingerprint and encoder heads, if known."""
    store, sizes = open_tokens(path), options.model.vq_model
    store.check(sizes.codebook_size, sizes.num_tokens, tokenizer, encoder_heads)
    store.check_labels()
    for image in evenly_spaced(store.images, min(store.images, PROBED)).tolist():
        store.codes(image, 0)
    return store


# ---------------------------------------------------------------------- what is trained
def parameter_groups(model: Generator, weight_decay: float) -> list[dict]:
    """Weight decay only for `Generator.decayed`."""
    decayed = model.decayed()
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def load_initial(run: Run, generator: Generator, data: GeneratorData) -> str:
    """Load `experiment.init_weights` into the generator of a new run; returns a line for the log.

    Raises InputError if the weights do not fit; classes may differ (`fit_classes`), and so may the tokenizer,
    with a warning.
    """
    weights = run.initial
    if weights is None:
        return ""
    if data.tokenizer_hash not in (None, weights.about.tokenizer or data.tokenizer_hash):
        run.checkpoint.warnings.append(
            f"{weights.file} was trained on the codes of another tokenizer, whose meaning it has learnt"
        )
    state, words = fit_classes(weights, generator.config, data.train.classes)
    load_tensors(generator, state, str(weights.file))
    return f"starts from {weights.file}: {describe(state)}{words}"


class TrainState:
    """The generator, its optimizer and its average, from the checkpoint that `run` resumes, if any.

    `start` describes initial weights from a file; `about` is the metadata of the weights.
    """

    def __init__(self, run: Run, options: GeneratorRun, data: GeneratorData):
        training, accelerator = options.training, run.accelerator
        self.accelerator, self.config = accelerator, options.model.generator
        self.about = about_generator(options, data)
        # The same initial weights on every rank, whatever was built before.
        torch.manual_seed(training.seed)
        self.generator = build_generator(self.config)
        self.start = load_initial(run, self.generator, data)
        self.ema = None
        if training.use_ema:
            self.ema = EMA(self.generator, training.ema_decay, training.ema_warmup)
        run.checkpoint.register_model("generator", self.generator, self.about, self.ema)

        groups = parameter_groups(self.generator, options.optimizer.params.weight_decay)
        optimizer = adamw(groups, options.optimizer.params)
        self.model, self.optimizer = accelerator.prepare(self.generator, optimizer)
        if self.ema is not None:
            self.ema.prepare(accelerator)
        self.compiled = bool(compiles(training.compile, "training.compile"))
        if self.compiled:
            compile_training(self.generator)
        run.checkpoint.register("optimizer", WholeOptimizer(self.generator, self.optimizer))
        self.model.train()

    @property
    def averaged(self) -> nn.Module:
        """The generator to evaluate, sample and export: the average, if there is one."""
        return self.generator if self.ema is None else self.ema.model

    def to_evaluate(self) -> Generator:
        """`averaged`; under FSDP a whole copy, because no rank can run its shards alone."""
        part: Any = self.averaged
        if not self.accelerator.is_fsdp2:
            return part
        whole = build_generator(self.config).to(self.accelerator.device)
        whole.load_state_dict(get_model_state_dict(part, options=WHOLE))
        return whole


# ---------------------------------------------------------------------- reports
def about_generator(options: GeneratorRun, data: GeneratorData) -> About:
    """The metadata of the run's weights."""
    config, classes = options.model.generator, data.train.classes
    untrained = sorted(set(range(len(classes))) - set(np.unique(data.train.labels).tolist()))
    return about_model(GENERATOR, config, data.tokenizer_hash, classes=classes, untrained=untrained)


def describe_run(run: Run, state: TrainState, data: GeneratorData) -> None:
    """Log the header of a run: data, size, hardware, batch and length."""
    training, world = run.training, run.accelerator.num_processes
    parameters = sum(p.numel() for p in state.generator.parameters())
    samples = run.total_steps * run.global_batch
    epochs = samples / data.train.images
    describe_data(run, state, data.train)
    if data.validation is not None:
        held_out = run.checkpoint.values["held out"]
        run.warn_of_same_data(data.validation.folder, lambda: held_out)
    if state.start:
        run.log.say(state.start)
    run.log.say(
        f"{parameters / 1e6:.1f}M parameters on {world} x {device_name(run.accelerator.device)}, "
        f"autocast {describe_precision(training)}{', compiled' * state.compiled}"
    )
    run.log.say(
        f"{data.train.images} images x {data.train.views} views; {run.global_batch} images per step = "
        f"{training.per_gpu_batch_size} x {world} ranks x {training.gradient_accumulation_steps}; "
        f"steps {run.first_step} to {run.total_steps}, {epochs:.1f} epochs of the images or "
        f"{epochs / data.train.views:.1f} of all views, {samples * state.config.image_seq_len / 1e9:.3g}G codes"
    )


def describe_data(run: Run, state: TrainState, train: TrainingSet) -> None:
    """Log images and classes, with warnings of missing or renumbered classes."""
    configured = state.config.condition_num_classes
    shown = [train.classes[label] for label in np.unique(train.labels)]
    sample = "" if train.images == train.listed else f"{train.images}, spread over all classes, of "
    run.log.say(
        f"{printable(train.source)}: {sample}{train.listed} images, "
        f"{describe_classes(shown, configured)}{train.left_out}"
    )
    if sample:
        run.log.say(f"warning: experiment.max_train_examples={train.images} leaves images out")
    unlike = misnumbered(train.classes)
    if unlike is not None:
        run.log.say(f"warning: {printable(train.source)}: {unlike}")
    if len(shown) < configured:
        known = len(train.classes)
        fewer = known < configured and not run.resumed  # a resumed run keeps its number
        remedy = f"; set it to {known} for a model of the data's classes" * fewer
        run.log.say(
            f"warning: {configured - len(shown)} of model.generator.condition_num_classes="
            f"{configured} classes have no image to train on: samples of them will be meaningless{remedy}"
        )


def report(run: Run, step: int, due: Due, state: TrainState, data: GeneratorData) -> None:
    """The validation, samples and gFID that are due after a step."""
    validation = data.validation if due.evaluate else None
    generates = due.generate and bool(run.experiment.generate_every)
    with run.reporting(step, due):
        if validation is None and not generates:
            return
        # Eager: odd batch sizes are not worth compiling for.
        with torch.compiler.set_stance("force_eager"):
            generator = state.to_evaluate()
            if validation is not None:
                report_validation(run, step, generator, validation, state.about)
            if generates:
                report_samples(run, step, generator, data)


def report_validation(
    run: Run, step: int, generator: Generator, store: TokenCache, about: About
) -> None:
    """Log the loss of held-out codes, and export the weights with the lowest one."""
    sums = run.attempt("validation", lambda: validate(run, generator, store), summed)
    if sums is None:
        return
    found = Likelihood(sums.cpu(), store.images * store.views)
    figures, values = found.figures(), run.checkpoint.values
    logged = on_main(lambda: run.log.lowest("val/loss", values.get("best since", 1)))
    if figures["nats"] < min(values.get("best", float("inf")), logged):
        values["best"] = figures["nats"]
        run.export(generator, "generator_best", ".bin", about)
    # The record comes last, because it says that the export is done.
    run.log.metrics(step, {"val/loss": figures["nats"], "val/accuracy": figures["top1"]})


def forget_other_best(run: Run, validation: Optional[TokenCache]) -> None:
    """Note the identity of the held-out codes, and forget the lowest loss of other ones, or of weights that a
    fork left in another folder."""
    if validation is None:
        return
    values, held_out = run.checkpoint.values, on_main(validation.identity)
    if run.checkpoint.forks or values.get("held out", held_out) != held_out:
        values.pop("best", None)
        values["best since"] = run.first_step
    values["held out"] = held_out


def report_samples(run: Run, step: int, generator: Generator, data: GeneratorData) -> None:
    """Log a grid of samples and, with a reference, their gFID."""
    assert data.tokenizer is not None, "generate_every loads the tokenizer"
    tokenizer, evaluator, options = data.tokenizer, data.evaluator, run.options
    grid = run.attempt(
        "sampling", lambda: sample_grid(run.accelerator, generator, tokenizer, options)
    )
    if grid is not None:
        captions = [data.names.caption(label) for label in grid_labels(options).tolist()]
        run.log.images(step, "samples", grid, GRID_CLASSES, captions)
    if evaluator is not None:
        values = run.attempt(
            "gFID",
            lambda: in_training.collect_samples(evaluator, generator, tokenizer, options),
            lambda share: in_training.metrics_of(evaluator, share, "gFID"),
        )
        if values is not None:
            run.log.metrics(step, {f"val/{name}": value for name, value in values.items()})


def validate(run: Run, model: nn.Module, store: TokenCache) -> Tensor:
    """This rank's share of the likelihood of the held-out views, in the precision of training."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    with run.accelerator.autocast():
        return likelihood_sums(model, store, Share(run.training.per_gpu_batch_size, rank, world))


@torch.no_grad()
def sample_grid(
    accelerator: Accelerator, model: Generator, tokenizer: Tokenizer, options: GeneratorRun
) -> Tensor:
    """Images in [0, 1], each row with the same classes; empty except on the main process."""
    if not accelerator.is_main_process:
        return torch.empty(0)
    generator, labels = options.model.generator, grid_labels(options)
    uniforms = image_uniforms(generator.seed, range(len(labels)), generator.image_seq_len)
    engine = in_training.job_in_training(options, accelerator.device).sampler(model, len(labels))
    return tokenizer.decode(engine.sample(labels, uniforms))


def grid_labels(options: GeneratorRun) -> Tensor:
    """The classes of a sample grid, row after row."""
    last = options.model.generator.condition_num_classes - 1
    return torch.linspace(0, last, GRID_CLASSES).long().repeat(GRID_PER_CLASS)


# ---------------------------------------------------------------------- the program
def main(argv: list[str]) -> None:
    dry_run, argv = split_dry_run(argv)
    options = configs.load.load(GeneratorRun, argv, "train_ar")
    training, total_steps = options.training, options.training.max_train_steps

    # Set-up: processes, data, the run's folder, what is trained; from a checkpoint if there is one
    accelerator = start_training(training)
    kept = None if dry_run else Path(options.experiment.output_dir)
    weights = open_tokenizer(options)
    options = with_weights(options, weights)
    initial = open_initial(options.experiment, GENERATOR)
    if initial is not None:
        options = with_start(options, initial)
    data = open_data(options, accelerator, weights, index_folder=kept)
    phases = [Phase("training", total_steps)]
    options = data.options
    run = Run(accelerator, options, phases, data.identity(), dry_run, initial)
    state = TrainState(run, options, data)
    workers = options.dataset.params.num_workers_per_gpu
    run.start(data.train.dataset, data.train.images, workers, data.train.skip_unreadable)
    if isinstance(state.generator, Generator):  # of another backbone, the FLOPs are unknown
        run.flops_per_image = training_flops(state.config)
    forget_other_best(run, data.validation)
    describe_run(run, state, data)
    report(run, run.first_step - 1, run.missing_reports(), state, data)

    for step in run.steps():
        lr = generator_lr(step, total_steps, options.lr_scheduler)
        seed_step(training.seed, accelerator.process_index, step)

        # Gradients of the global batch, one micro-batch after another
        for _ in range(training.gradient_accumulation_steps):
            codes, labels = run.next_batch()
            if data.encoder is not None:  # they are still images
                codes = data.encoder.encode(to_float(codes))
            with accelerator.accumulate(state.model):
                with accelerator.autocast():
                    loss, accuracy = state.model(codes[:, :-1], labels, codes)
                accelerator.backward(loss)
            run.window.add(loss=loss, accuracy=accuracy)

        # The update of the weights and of their average
        norm = clip_gradients(accelerator, state.model, training.max_grad_norm)
        run.watch(step, norm, state.optimizer)
        set_learning_rate(state.optimizer, lr)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(state.generator)

        # What is due: the log, a checkpoint and, after it, reports
        due = run.due(step)
        if due.log:
            run.log_window(step, {"lr": lr})
        if due.save:
            run.save(step)
        if due.stop:
            run.exit_stopped(step)
        report(run, step, due, state, data)

    if run.dry_run is not None:
        return run.report_dry_run({"generator": state.generator})
    run.export(state.averaged, "generator", ".bin", state.about)
    run.finish(f"weights in {run.folder / 'generator.bin'} and .safetensors")


if __name__ == "__main__":
    run_program(main)
