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
from data.classes import first_names, printable
from evaluation.evaluator import Evaluator
from evaluation.report import print_result
from evaluation.sources import open_images
from generation.folder import SampleFolder, read_codes
from generation.job import SamplingJob, sampling_job
from generation.models import load_models, open_models
from generation.prefix import prefix_codes
from modeling.sampling import NO_CLASS
from modeling.weights.class_names import class_names, sorted_as_text
from modeling.weights.opened import Opened
from runtime.processes import on_main, start_processes
from runtime.program import run


def main(argv: list[str]) -> None:
    options = configs.load.load(GeneratorRun, argv, "sample_imagenet")
    processes = start_processes()
    device = processes.device
    assert device is not None  # accelerate's type hint allows it
    options, tokenizer, generator = open_models(options)
    experiment, codes, names = options.experiment, None, None
    if generator is None:
        codes = read_codes(str(experiment.codes), options.model.vq_model)
    else:
        names = class_names(generator.about)
    job = sampling_job(options, device, names)
    if generator is not None:
        warn_of_untrained(generator, job, processes)
        doubt = sorted_as_text(names.folders) if names is not None else None
        if doubt and any(isinstance(item, int) for item in experiment.classes or ()):
            processes.print(f"warning: {doubt}")
    models = load_models(options.model, tokenizer, generator, device)
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


def warn_of_untrained(generator: Opened, job: SamplingJob, processes: PartialState) -> None:
    """Say which classes the job samples that the generator was never trained on, if that is known."""
    classes = set(job.classes) - {NO_CLASS}
    missing = generator.about.without_images(classes)
    if missing:
        names = first_names([str(label) for label in missing])
        processes.print(
            f"warning: {len(missing)} of {len(classes)} classes ({names}) were never trained "
            f"in {printable(generator.file)}: set experiment.classes to those that were"
        )


if __name__ == "__main__":
    run(main)
