from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from PIL import Image

import evaluation.evaluator
from configs.schema import GeneratorExperiment, GeneratorModels, GeneratorOptions, GeneratorRun
from evaluation import in_training
from evaluation.evaluator import Evaluator
from evaluation.in_training import (
    collect_samples,
    job_in_training,
    metrics_of,
    open_evaluator,
    reconstruction_scores,
)
from evaluation.reconstruction import figures_of, image_batches, reconstruct
from evaluation.statistics import digests_of
from generation import job
from generation.images import sample_images
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from runtime.processes import matmul_precision
from tests.inception import TinyFeatures
from tests.refusals import refusal
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")
SIZES = tiny_tokenizer()
GENERATOR = GeneratorOptions(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    codebook_size=16,
    image_seq_len=7,
    condition_num_classes=3,
    guidance_scale=2.0,
)


@pytest.fixture
def options():
    experiment = GeneratorExperiment(num_fid_samples=14, per_proc_batch_size=4)
    return GeneratorRun(experiment=experiment, model=GeneratorModels(SIZES, GENERATOR))


def changed(options, **experiment):
    return replace(options, experiment=replace(options.experiment, **experiment))


@pytest.fixture
def evaluator(tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", TinyFeatures)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "r.npz", rng.integers(0, 256, (15, 16, 16, 3), dtype=np.uint8))
    return Evaluator(tmp_path / "r.npz")


@pytest.fixture
def models(fill):
    return fill(Generator(GENERATOR)), fill(Tokenizer(SIZES))


def scored_images(evaluator, models, options, monkeypatch):
    """Digests of the images that `collect_samples` scores, by index, and their metrics."""
    digests = {}

    class Collector(in_training.Collector):
        def add(self, first, images, known=None):
            for i, digest in enumerate(digests_of(images.permute(0, 2, 3, 1).numpy())):
                digests[first + i] = digest.tobytes()
            super().add(first, images, known)

    with monkeypatch.context() as patch:
        patch.setattr(in_training, "Collector", Collector)
        metrics = metrics_of(evaluator, collect_samples(evaluator, *models, options), "gFID")
    return [digests[i] for i in range(len(digests))], metrics


def test_generated_images_are_those_of_the_options(evaluator, models, options, monkeypatch):
    generator, tokenizer = models
    scored = {}
    for classes in (None, [2, 0]):
        options = changed(options, classes=classes)
        digests, metrics = scored_images(evaluator, models, options, monkeypatch)
        job = job_in_training(options, CPU)
        assert job.classes == tuple(classes or range(3))
        engine = in_training.job_in_training(options, torch.device("cpu")).sampler(generator, 14)
        (batch,) = sample_images(engine, tokenizer, job, [range(14)])
        assert digests == [digest.tobytes() for digest in digests_of(batch.images)]
        scored[classes is None] = metrics["gFID"]
        assert metrics.keys() >= {"sFID", "IS", "precision", "recall"}
    assert scored[True] != scored[False]


def test_precision_is_that_of_the_options_and_leaves_that_of_training(
    evaluator, models, options, monkeypatch
):
    dtypes, precisions = [], []

    class Engine(job.Engine):
        def __init__(self, model, batch, sampling, dtype, *rest):
            dtypes.append(dtype)
            precisions.append(torch.backends.cuda.matmul.allow_tf32)
            super().__init__(model, batch, sampling, dtype, *rest)

    monkeypatch.setattr(job, "Engine", Engine)
    with matmul_precision("tf32"):  # that of the training
        for precision in ("bf16", "fp32"):
            collect_samples(evaluator, *models, changed(options, precision=precision))
            assert torch.backends.cuda.matmul.allow_tf32
    assert dtypes == [torch.bfloat16, torch.float32] and precisions == [True, False]


def test_measuring_generated_images_waits_for_no_other_rank(
    evaluator, models, options, monkeypatch
):
    def collective(*args, **kwargs):
        raise AssertionError("a collective")

    functions = ("all_reduce", "all_gather", "all_gather_object", "barrier", "broadcast",
                 "broadcast_object_list", "all_gather_into_tensor")  # fmt: skip
    for function in functions:
        monkeypatch.setattr(torch.distributed, function, collective)
    # Of one process, accelerate would not call them.
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.MULTI_CPU)
    monkeypatch.setattr(in_training.Collector, "finish", collective)
    collected = collect_samples(evaluator, *models, options)
    with pytest.raises(AssertionError, match="a collective"):
        metrics_of(evaluator, collected, "gFID")


@pytest.mark.parametrize(
    "values, named",
    [(dict(precision="tf32"), "experiment.precision=tf32"), (dict(classes=[3]), "class 3")],
)
def test_what_cannot_be_sampled_is_refused_before_training(options, values, named):
    refusal(lambda: job_in_training(changed(options, **values), CPU), named)


# ---------------------------------------------------------------------- reconstructions
class Distance:
    def distance(self, images, targets):
        return (images - targets).abs().mean()


def test_one_pass_gives_all_metrics(evaluator, models, tmp_path, monkeypatch):
    _, tokenizer = models
    paths = []
    rng = np.random.default_rng(1)
    for i in range(11):
        paths.append(str(tmp_path / f"{i:02d}.png"))
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(paths[-1])
    encoded = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda x: encoded.append(len(x)) or encode(x))

    def score(batch, *networks):
        scores = reconstruction_scores(tokenizer, len(paths), *networks)
        reconstruct(tokenizer, image_batches(paths, 16, batch, workers=0), scores)
        return figures_of(scores)

    values = score(4, Distance(), evaluator)
    assert encoded == [4, 4, 3]  # every image once
    expected = {"psnr", "codebook_use", "perplexity", "lpips", "rFID", "sFID", "precision"}
    assert values.keys() >= expected and not values.keys() & {"gFID", "IS", "IS_std"}
    alone = score(11, None, None)
    assert alone.keys() == {"psnr", "codebook_use", "perplexity", "code_agreement"}
    assert alone == pytest.approx({name: values[name] for name in alone})


def test_a_reference_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", TinyFeatures)
    assert open_evaluator(None, 0, "x", 16) is None
    file = str(tmp_path / "r.npz")
    np.savez(file, np.zeros((5, 8, 8, 3), np.uint8))
    for images, named in (
        (0, ["experiment.fid_reference", "experiment.eval_every"]),
        (3, ["experiment.fid_reference", "experiment.eval_every", "4 images"]),
        (4, ["16x16", "8x8"]),
    ):
        call = partial(open_evaluator, file, images, "experiment.eval_every", 16)
        refusal(call, file, *named)
