"""Tokenizers without prefix tokens (T = g²) through the real programs: images -> codes -> generator -> images."""

import json

import numpy as np
import pytest

from data.tokens import open_tokens
from modeling.weights.tensors import read_state_dict
from tests.integration.conftest import Workspace, execute
from tests.integration.test_bad_input import refused


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class WithoutPrefix(Workspace):
    """The miniature without prefix tokens: 16 codes of a 4x4 grid.

    `stage2`: codes are decoded by a stage 2 of its own, whose stage 1 did not cluster its codebook either,
    so that only its config tells its stage. Otherwise they are decoded by stage 1, which the generator's
    config describes.
    """

    def __init__(self, root, causal, stage2):
        super().__init__(root)
        self.with_stage2 = stage2
        decoder = f"causal: {causal}\n    clustering: {not stage2}"
        for name in ("stage1", "stage2", "generator"):
            file = root / f"{name}.yaml"
            text = file.read_text()
            text = text.replace("patch_size: 4", "patch_size: 4\n    num_latent_tokens: 16")
            text = text.replace(
                "causal: true\n    prefix_head: true\n    clustering: true", decoder
            )
            text = text.replace("image_seq_len: 21", "image_seq_len: 16")
            if name == "generator" and not stage2:
                text = text.replace("num_buffer_tokens: 2", f"num_buffer_tokens: 1\n    {decoder}")
            file.write_text(text)

    @property
    def tokenizer(self):
        return super().tokenizer if self.with_stage2 else self.stage1_run / "tokenizer.pth"


@pytest.fixture(scope="module", params=["bidirectional", "causal", "causal, stage 2"])
def alone(request, tmp_path_factory):
    causal, stage2 = request.param != "bidirectional", request.param.endswith("stage 2")
    return WithoutPrefix(tmp_path_factory.mktemp("alone"), causal, stage2)


@pytest.mark.slow
def test_images_become_codes_a_generator_and_images(alone, tmp_path):
    last = records(alone.stage1_run)[-1]
    assert {"val/psnr", "val/codebook_use"} <= last.keys()
    assert not any("aux" in record for record in records(alone.stage1_run))
    assert not any("aux" in name for name in read_state_dict(alone.tokenizer))
    cache = open_tokens(alone.cache)
    assert (cache.tokens, cache.images, cache.views) == (16, 14, 10)
    cache.verify()
    run = alone.generator.parent
    assert "val/loss" in records(run)[-1]
    assert (run / "previews/samples-00000006.png").exists()
    alone.sample(tmp_path / "samples", "experiment.num_fid_samples=4")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 16, 16, 3)
    assert np.load(tmp_path / "samples_codes.npz")["arr_0"].shape == (4, 16)
    alone.sample(
        tmp_path / "again", f"experiment.codes={tmp_path}/samples_codes.npz",
        "experiment.num_fid_samples=4", "experiment.save_png=False",
    )  # fmt: skip
    pixels = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("samples", "again")]
    assert (pixels[0] == pixels[1]).all()


@pytest.mark.slow
def test_generators_and_caches_with_and_without_prefix_do_not_mix(
    workspace, tmp_path, tmp_path_factory
):
    alone = WithoutPrefix(tmp_path_factory.mktemp("alone"), causal=True, stage2=False)
    done = workspace.train_ar(
        tmp_path / "run", f"dataset.params.pretokenization={alone.cache}", check=False
    )
    refused(done, f"{alone.cache} is another tokenizer's cache", "16 there, 21 here")
    done = execute(
        "evaluate.py", "--generator", workspace.generator, "--cache", alone.cache, check=False
    )
    refused(done, "another tokenizer's cache: codes per image 16 there, 21 here")
    done = alone.sample(
        tmp_path / "s", f"experiment.generator_checkpoint={workspace.generator}", check=False
    )
    refused(done, "expects 21 codes from a codebook of 32", "16 from 32: pass the tokenizer")
    done = workspace.stage2(tmp_path / "run2", alone.stage1_run, check=False)
    refused(done, "num_latent_tokens=21 contradicts", "weights have num_latent_tokens=16")
    assert not list(tmp_path.iterdir())
