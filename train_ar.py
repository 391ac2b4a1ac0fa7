"""Train the generator on a token cache: `accelerate launch train_ar.py config=FILE option=value …`.

The same command resumes an interrupted run. `--dry-run` runs a few steps, prints what the whole run
needs, and writes nothing.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional
from unicodedata import normalize

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.utils.data import Dataset

import configs.load
from configs.schema import GeneratorRun, Phase
from configs.sizes import open_start, with_classes, with_weights
from data.classes import describe_classes, first_names, misnumbered, printable
from data.identity import hash_of_texts
from data.images import VIEWS, TrainViews, identity_for_all, scan_images, to_float
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
from modeling.generator import NO_CLASS, Generator, GeneratorConfig, build_generator
from modeling.sampling import image_uniforms
from modeling.tokenizer import Tokenizer
from modeling.weights.class_names import ClassNames
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.opened import Opened, load_tokenizer
from modeling.weights.tensors import describe, fingerprint, load_tensors
from runtime.errors import InputError
from runtime.processes import check_same, compiles, on_main, open_on_all
from runtime.program import run as run_program
from runtime.randomness import seed_step
from training.accelerator import start_training
from training.checkpoint import WHOLE, WholeOptimizer
from training.dry_run import split_dry_run
from training.optim import EMA, adamw, clip_gradients, set_learning_rate
from training.run import Due, Run
from training.schedule import generator_lr
from training.utilisation import training_flops

GRID_CLASSES, GRID_PER_CLASS = 10, 4  # of a sample grid
PROBED = 16  # images whose codes are checked when a cache is opened


# ---------------------------------------------------------------------- data
@dataclass
class GeneratorData:
    """The data of training and validation, and what scores need."""

    options: GeneratorRun  # the run's, with the data's number of classes and `experiment.classes` as labels
    source: str  # the token cache, image folder or tar
    listed: int  # images in it
    left_out: str  # a description of its other files
    views: int  # per image
    dataset: Dataset  # (codes or image, label) by (epoch, index), of the images used for training
    labels: np.ndarray  # (images,), of these
    classes: list[str]  # names; a label is an index into them
    names: ClassNames  # of the same classes
    identity: dict[str, Any]  # must be the same when the run resumes
    tokenizer_hash: Optional[str]  # of the codes' tokenizer; a published cache states none
    tokenizer: Optional[Tokenizer]  # for samples and to encode images; on the device, frozen
    encoder: Optional[Tokenizer]  # the tokenizer, if the dataset yields images to encode
    validation: Optional[TokenCache]  # its labels are the training set's
    evaluator: Optional[Evaluator]  # for gFID

    @property
    def images(self) -> int:
        """How many are used for training."""
        return len(self.labels)


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
    params, experiment, sizes = options.dataset.params, options.experiment, options.model.vq_model
    tokenizer = encoder = validation = None
    known = heads = None  # fingerprint and heads of the encoder that a cache must be from, if known
    if weights is not None:
        tokenizer = load_tokenizer(weights, sizes).requires_grad_(False).to(accelerator.device)
        known, heads = fingerprint(weights.state), sizes.encoder_heads
    if params.train_dir is None:
        if params.skip_unreadable:
            raise InputError(
                f"dataset.params.skip_unreadable={params.skip_unreadable}: a token cache holds no images; "
                f"leave it out, or set dataset.params.train_dir to train on images (pretokenization.py has "
                f"--skip_unreadable)"
            )
        if index_folder is not None:
            refuse_inside(index_folder, params.pretokenization)
        store = open_cache(params.pretokenization, options, known, heads)
        files = store.manifest.get("files", [])  # none in the published layout
        check_same({"codes": hash_of_texts(file["sha256"] for file in files)}, "another cache")
        source, left_out, views = store.folder, "", store.views
        labels, classes, identity = store.labels, store.classes, on_main(store.identity)
        dataset_of: Callable[[EpochDraws], Dataset] = partial(TrainTokens, store)
        tokenizer_hash = store.manifest["tokenizer"]
        known, heads = known or tokenizer_hash, heads or store.manifest.get("encoder_heads")
    else:
        listing = scan_images(params.train_dir, index_folder=index_folder)
        source, left_out = listing.root, describe_left_out(listing.left_out)
        labels, classes, views = listing.labels, listing.classes, VIEWS["ten_crop"]
        identity = identity_for_all(listing.paths)
        dataset_of = partial(TrainViews, listing.paths, sizes.image_size)
        encoder, tokenizer_hash = tokenizer, known
        assert encoder is not None, "images need a tokenizer (`open_tokenizer`)"
        encoder.freeze_encoder()  # then it computes in full float32, as pretokenization
    options = with_classes(options, str(source), len(classes))
    config, listed = options.model.generator, len(labels)
    draws = EpochDraws(labels, views, options.training.seed, config.class_label_dropout, NO_CLASS)
    dataset, limit = dataset_of(draws), experiment.max_train_examples or listed
    if limit < listed:
        used = spread_over_classes(labels, limit)
        dataset, labels = KeyedSubset(dataset, used), labels[used]
    identity = {
        "images": len(labels), "views": views, "tokenizer": str(tokenizer_hash),
        "classes": hash_of_texts(classes), **identity,
    }  # fmt: skip
    if params.val_pretokenization is not None:
        validation = open_cache(params.val_pretokenization, options, known, heads)
        validation.use_classes(classes)
    scored, needed = experiment.num_fid_samples, "experiment.num_fid_samples"
    if not experiment.generate_every:
        scored, needed = 0, "experiment.generate_every"
    evaluator = in_training.open_evaluator(
        experiment.fid_reference, scored, needed, sizes.image_size
    )
    names = ClassNames(config.condition_num_classes, dict(enumerate(classes)))
    if experiment.classes is not None:  # by number from here on
        chosen = in_options(names.labels(experiment.classes))
        options = options.changed(experiment=replace(experiment, classes=chosen))
    if experiment.generate_every:  # refused now, not at the first samples
        in_training.job_in_training(options, accelerator.device)
    return GeneratorData(
        options, str(source), listed, left_out, views, dataset, labels, classes, names, identity,
        tokenizer_hash, tokenizer, encoder, validation, evaluator,
    )  # fmt: skip


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


def load_initial(run: Run, generator: Generator, data: GeneratorData, weights: Opened) -> None:
    """Load `experiment.init_weights` into the generator of a new run.

    Raises InputError if the weights do not fit; classes may differ (`fit_classes`), and so may the tokenizer,
    with a warning.
    """
    if data.tokenizer_hash not in (None, weights.about.tokenizer or data.tokenizer_hash):
        run.checkpoint.warnings.append(
            f"{weights.file} was trained on another tokenizer's codes, so it must learn these anew"
        )
    state, words = fit_classes(weights, generator.config, data.classes)
    load_tensors(generator, state, str(weights.file))
    run.notes.append(f"starts from {weights.file}: {describe(state)}{words}")


def fit_classes(
    weights: Opened, config: GeneratorConfig, classes: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """A generator's tensors for the classes of a training set, and a description for the log.

    The rows of the codes and of "no class" are copied, and a class has the row of its name. A label that has
    no name on one of the sides keeps its row if both have equally many classes. Any other class starts at
    the mean of the old rows. Raises InputError if another size differs from `config`.
    """
    here = about_model(GENERATOR, config).config
    before, after = weights.about.config["condition_num_classes"], here.pop("condition_num_classes")
    weights.sizes(here, "model.generator.{}={}".format)
    rows = [row if before == after else None for row in range(after)]  # by label
    if weights.about.classes is not None:
        named = {normalize("NFC", name): row for row, name in enumerate(weights.about.classes)}
        rows[: len(classes)] = [named.get(normalize("NFC", name)) for name in classes]
    if rows == list(range(before)):
        return weights.state, ""
    state, name = weights.state, "embeddings.weight"
    table, first = state[name], int(config.condition_rows(torch.tensor(0)))
    old, no_class = table[first:-1], table[-1:]
    mean = old.float().mean(0).to(table.dtype)
    made = [mean if row is None else old[row] for row in rows]
    fitted = torch.cat([table[:first], torch.stack(made), no_class])
    names = [*classes, *map(str, range(len(classes), after))]
    new = [name for name, row in zip(names, rows) if row is None]
    words = f"; {after} instead of {before} classes" * (before != after)
    if new:
        words += f"; {len(new)} new, at the mean of the old ones: {first_names(new)}"
    return {**state, name: fitted}, words


class TrainState:
    """The generator, its optimizer and its average, from the checkpoint that `run` resumes, if any.

    `initial` are the weights that a new run starts from.
    """

    def __init__(self, run: Run, data: GeneratorData, initial: Optional[Opened] = None):
        options, accelerator = run.options, run.accelerator
        training, classes = options.training, data.classes
        self.accelerator, self.config = accelerator, options.model.generator
        untrained = np.setdiff1d(np.arange(len(classes)), data.labels).tolist()
        about = about_model(
            GENERATOR, self.config, data.tokenizer_hash, classes=classes, untrained=untrained
        )
        # The same initial weights on every rank, whatever was built before.
        torch.manual_seed(training.seed)
        self.generator = build_generator(self.config)
        if initial is not None:
            load_initial(run, self.generator, data, initial)
        self.ema = None
        if training.use_ema:
            self.ema = EMA(self.generator, training.ema_decay, training.ema_warmup)
        run.checkpoint.register_model("generator", self.generator, about, self.ema)

        groups = parameter_groups(self.generator, options.optimizer.params.weight_decay)
        optimizer = adamw(groups, options.optimizer.params)
        self.model, self.optimizer = accelerator.prepare(self.generator, optimizer)
        if self.ema is not None:
            self.ema.prepare(accelerator)
        self.compiled = compiles(training.compile, "training.compile")
        if self.compiled:
            compile_training(self.generator)
        run.checkpoint.register("optimizer", WholeOptimizer(self.generator, self.optimizer))
        self.model.train()

    def to_evaluate(self) -> Generator:
        """The average, if there is one, or the generator; under FSDP a whole copy, because no rank can run
        its shards alone."""
        part: Any = self.generator if self.ema is None else self.ema.model
        if not self.accelerator.is_fsdp2:
            return part
        whole = build_generator(self.config).to(self.accelerator.device)
        whole.load_state_dict(get_model_state_dict(part, options=WHOLE))
        return whole


# ---------------------------------------------------------------------- reports
def describe_run(run: Run, state: TrainState, data: GeneratorData) -> None:
    """Log the header of a run: data, hardware and length."""
    describe_data(run, state, data)
    run.describe(state.generator, state.compiled, data.images)
    samples = run.total_steps * run.global_batch
    run.log.say(
        f"{samples / data.images / data.views:.1f} epochs of all views ({data.views} per image), "
        f"{samples * state.config.image_seq_len / 1e9:.3g}G codes"
    )


def describe_data(run: Run, state: TrainState, data: GeneratorData) -> None:
    """Log images and classes, with warnings of missing or renumbered classes."""
    configured = state.config.condition_num_classes
    shown = [data.classes[label] for label in np.unique(data.labels)]
    classes = describe_classes(shown, configured)
    run.log.say(f"{printable(data.source)}: {data.listed} images, {classes}{data.left_out}")
    unlike = misnumbered(data.classes)
    if unlike is not None:
        run.log.say(f"warning: {printable(data.source)}: {unlike}")
    if len(shown) < configured:
        known = len(data.classes)
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
        generator = state.to_evaluate()
        if validation is not None:
            report_validation(run, step, generator, validation)
        if generates:
            report_samples(run, step, generator, data)


def report_validation(run: Run, step: int, generator: Generator, store: TokenCache) -> None:
    """Log the loss of held-out codes, and export the weights with the lowest one."""
    sums = run.attempt("validation", lambda: validate(run, generator, store), summed)
    if sums is None:
        return
    found = Likelihood(sums.cpu(), store.images * store.views)
    figures, since = found.figures(), run.checkpoint.values.get("best since", 1)
    if figures["nats"] < on_main(lambda: run.log.lowest("val/loss", since)):
        run.export("generator", "generator_best", ".bin")
    # The record comes last, because it says that the export is done.
    run.log.metrics(step, {"val/loss": figures["nats"], "val/accuracy": figures["top1"]})


def note_held_out(run: Run, validation: Optional[TokenCache]) -> None:
    """Note the identity of the held-out codes, and from which step on the log has losses of them. Warns if they
    are the training data."""
    if validation is None:
        return
    values, held_out = run.checkpoint.values, on_main(validation.identity)
    if not run.checkpoint.own or values.get("held out", held_out) != held_out:
        values["best since"] = run.first_step
    values["held out"] = held_out
    run.warn_of_same_data(validation.folder, held_out)


def report_samples(run: Run, step: int, generator: Generator, data: GeneratorData) -> None:
    """Log a grid of samples and, with a reference, their gFID."""
    assert data.tokenizer is not None, "generate_every loads the tokenizer"
    tokenizer, evaluator, options = data.tokenizer, data.evaluator, run.options
    last = options.model.generator.condition_num_classes - 1  # of the classes of every row
    labels = torch.linspace(0, last, GRID_CLASSES).long().repeat(GRID_PER_CLASS)
    grid = run.attempt("sampling", lambda: sample_grid(run, generator, tokenizer, labels))
    if grid is not None:
        captions = [data.names.caption(label) for label in labels.tolist()]
        run.log.images(step, "samples", grid, GRID_CLASSES, captions)
    if evaluator is not None:
        values = run.attempt(
            "gFID",
            lambda: in_training.collect_samples(evaluator, generator, tokenizer, options),
            lambda share: in_training.metrics_of(evaluator, share, "gFID"),
        )
        run.log.metrics(step, values and {f"val/{name}": value for name, value in values.items()})


def validate(run: Run, model: nn.Module, store: TokenCache) -> Tensor:
    """This rank's share of the likelihood of the held-out views, in the precision of training."""
    with run.accelerator.autocast():
        return likelihood_sums(model, store, Share(run.training.per_gpu_batch_size))


@torch.no_grad()
def sample_grid(run: Run, model: Generator, tokenizer: Tokenizer, labels: Tensor) -> Tensor:
    """Images of these labels, in [0, 1]; empty except on the main process."""
    if not run.accelerator.is_main_process:
        return torch.empty(0)
    generator = run.options.model.generator
    uniforms = image_uniforms(generator.seed, range(len(labels)), generator.image_seq_len)
    job = in_training.job_in_training(run.options, run.accelerator.device)
    engine = job.sampler(model, len(labels))
    return tokenizer.decode(engine.sample(labels, uniforms))


# ---------------------------------------------------------------------- the program
def main(argv: list[str]) -> None:
    dry_run, argv = split_dry_run(argv)
    options = configs.load.load(GeneratorRun, argv, "train_ar")
    training, total_steps = options.training, options.training.max_train_steps

    # Set-up: processes, data, the run's folder, what is trained; from a checkpoint if there is one
    accelerator = start_training(training)
    kept = None if dry_run else Path(options.experiment.output_dir)
    weights = open_tokenizer(options)
    options, initial = open_start(with_weights(options, weights), GENERATOR)
    data = open_data(options, accelerator, weights, index_folder=kept)
    options = data.options
    run = Run(accelerator, options, [Phase("training", total_steps)], data.identity, dry_run)
    state = TrainState(run, data, initial)
    run.start(data.dataset, data.images, data.listed)
    if isinstance(state.generator, Generator):  # of another backbone, the FLOPs are unknown
        run.flops_per_image = training_flops(state.config)
    note_held_out(run, data.validation)
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
            run.save(step, due.stop)
        report(run, step, due, state, data)

    run.finish("generator", ".bin")


if __name__ == "__main__":
    run_program(main)
