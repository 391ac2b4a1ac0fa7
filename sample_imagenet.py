"""Sample images for FID: `torchrun --nproc_per_node=8 sample_imagenet.py config=FILE option=value …`.

Image i has class i mod (number of classes) and randomness from (seed, i) alone. The work is cut
into fixed chunks of consecutive indices, so the images are the same on any number of processes.
A killed run resumes with the same command; `OUTPUT_DIR.npz` appears when all images are there.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

from pathlib import Path

import configs.load
from configs.schema import GeneratorRun
from evaluation.in_training import open_evaluator
from evaluation.report import print_result
from evaluation.sources import open_images
from generation.folder import SampleFolder
from generation.job import open_job
from runtime.processes import start_processes
from runtime.program import run


def main(argv: list[str]) -> None:
    options = configs.load.load(GeneratorRun, argv, "sample_imagenet")
    experiment = options.experiment
    start_processes()
    job, models = open_job(options)
    output = Path(experiment.output_dir)
    folder = SampleFolder(output, job, models, experiment.save_png, experiment.grid)
    # A mistake in the reference shows now, not after hours of sampling.
    side = models.tokenizer.config.image_size
    scored = "experiment.codes" if experiment.codes else "experiment.num_fid_samples"
    evaluator = open_evaluator(experiment.fid_reference, job.count, scored, side)
    images = folder.fill()
    if evaluator is not None:
        print_result(evaluator.evaluate(open_images(images), job.count))


if __name__ == "__main__":
    run(main)
