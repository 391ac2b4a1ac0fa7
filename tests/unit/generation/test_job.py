from dataclasses import replace

import pytest
import torch

from configs.schema import GeneratorExperiment, GeneratorModels, GeneratorOptions, GeneratorRun
from generation import job as module
from generation.job import sampling_job, sampling_precision
from modeling.sampling import NO_CLASS
from modeling.weights.class_names import ClassNames
from tests.refusals import refusal

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "precision, device, expected",
    [
        ("auto", CPU, "fp32"),
        ("auto", CUDA, "bf16"),
        ("bf16", CPU, "bf16"),
        ("tf32", CUDA, "tf32"),
        ("fp32", CUDA, "fp32"),
    ],
)
def test_precision_is_decided_by_the_device_where_it_is_open(
    precision, device, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert sampling_precision(precision, device) == expected


def test_gpu_before_ampere_samples_in_float32_by_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert sampling_precision("auto", CUDA) == "fp32"


def test_tf32_on_a_cpu_is_refused():
    refusal(lambda: sampling_precision("tf32", CPU), "experiment.precision=tf32", "fp32 or bf16")


def options_of(**experiment):
    return GeneratorRun(experiment=GeneratorExperiment(**experiment))


def test_job_takes_the_options(monkeypatch):
    monkeypatch.setattr(module, "compiles", lambda value, _: value is True)
    options = options_of(
        classes=[207, 3], num_fid_samples=9, precision="bf16", per_proc_batch_size=4
    )
    generator = GeneratorOptions(guidance_scale=3.5, seed=7)
    options = replace(options, model=GeneratorModels(generator=generator))
    job = sampling_job(options, CPU)
    assert (job.classes, job.count, job.chunk, job.seed) == ((207, 3), 9, 4, 7)
    assert job.sampling.guidance_scale == 3.5 and job.dtype == torch.bfloat16
    assert sampling_job(GeneratorRun(), CPU).classes == tuple(range(1000))
    refusal(lambda: sampling_job(options_of(classes=[1000]), CPU), "class 1000")


def test_classes_go_by_name_and_none_is_an_image_without_a_class():
    options = options_of(classes=["otter", 3, "none"])
    job = sampling_job(options, CPU)
    assert job.classes == (360, 3, NO_CLASS) and job.sampling.guided
    names = ClassNames(1000, {0: "ant", 1: "otter"})  # of a run
    assert sampling_job(options, CPU, names).classes == (1, 3, NO_CLASS)
    refusal(lambda: sampling_job(options_of(classes=["oter"]), CPU), "oter", "otter")


def test_images_without_a_class_alone_are_sampled_without_guidance():
    job = sampling_job(options_of(classes=["none"]), CPU)
    assert job.classes == (NO_CLASS,) and not job.sampling.guided
    assert job.labels(range(3)).tolist() == [NO_CLASS] * 3
