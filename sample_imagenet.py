"""Sample images for FID: `torchrun --nproc_per_node=8 sample_imagenet.py config=FILE option=value …`.

Image i has class i mod (number of classes) and randomness from (seed, i) alone. The work is cut
into fixed chunks of consecutive indices, so the images are the same on any number of processes.
A killed run resumes with the same command; `OUTPUT_DIR.npz` appears when all images are there.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

import configs.load
from configs.schema import GeneratorRun
from data.classes import first_names, printable, untrained_labels
from evaluation.evaluator import Evaluator
from evaluation.report import print_result
from evaluation.sources import open_images
from generation.folder import SampleFolder, read_codes
from generation.job import SamplingJob, sampling_job
from generation.models import check_files, class_names, generator_checkpoint, load_models
from generation.prefix import prefix_codes
from modeling.sampling import NO_CLASS
from modeling.weights.class_names import sorted_as_text
from runtime.processes import on_main, start_processes
from runtime.program import run
from training.checkpoint import read_weights, weights_file


def main(argv: list[str]) -> None:
    options = configs.load.load(GeneratorRun, argv, "sample_imagenet")
    experiment = options.experiment
    codes = generator_file = generator_state = names = None
    if experiment.codes is not None:
        codes = read_codes(experiment.codes, options.model.vq_model)
    else:
        generator_file = weights_file(generator_checkpoint(experiment), "generator")
        generator_state = read_weights(generator_file)
    tokenizer_file = weights_file(experiment.tokenizer_checkpoint, "tokenizer")
    tokenizer_state = read_weights(tokenizer_file)
    about = check_files(options.model, tokenizer_file, tokenizer_state, generator_file)
    if generator_file is not None:
        known = options.model.generator.condition_num_classes
        names = class_names(about, str(generator_file), known)

    processes = start_processes()
    device = processes.device
    assert device is not None  # accelerate's type hint allows it
    job = sampling_job(options, device, names)
    if codes is None:
        warn_of_untrained(generator_checkpoint(experiment), job, processes)
        doubt = sorted_as_text(names.folders) if names is not None else None
        if doubt and any(isinstance(item, int) for item in experiment.classes or ()):
            processes.print(f"warning: {doubt}")
    models = load_models(options.model, experiment, tokenizer_state, generator_state, device)
    job = replace(job, prefix=on_main(lambda: prefix_codes(experiment, models.tokenizer)))
    folder = SampleFolder(
        Path(experiment.output_dir), job, models, processes, codes, experiment.save_png,
        experiment.grid, names,
    )  # fmt: skip
    evaluator = None
    if experiment.fid_reference:
        # A mistake in the reference shows now, not after hours of sampling.
        side = options.model.vq_model.image_size
        evaluator = Evaluator.open(
            experiment.fid_reference, processes, Path("weights"), size=(side, side)
        )
    images = folder.fill()
    if evaluator is not None:
        print_result(evaluator.evaluate(open_images(images), folder.count))


def warn_of_untrained(weights: str, job: SamplingJob, processes: PartialState) -> None:
    """Say which classes the job samples that the generator was never trained on, if that is known."""
    classes = set(job.classes) - {NO_CLASS}
    missing = untrained_labels(weights, classes)
    if missing:
        names = first_names([str(label) for label in missing])
        processes.print(
            f"warning: {len(missing)} of {len(classes)} classes ({names}) were never trained "
            f"in {printable(weights)}: set experiment.classes to those that were"
        )


if __name__ == "__main__":
    run(main)
