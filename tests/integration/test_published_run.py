"""A run folder as the published generator trainer leaves it, sampled, scored and started from."""

import json

import numpy as np
import pytest
import torch
import yaml

import evaluate
import sample_imagenet
import train_ar
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import TOKENIZER, about_model
from modeling.weights.tensors import fingerprint, read_state_dict, write_state_dict
from runtime.errors import InputError
from tests.tiny import tiny_cache, tiny_generator, tiny_tokenizer

GENERATOR, SIZES = tiny_generator(), tiny_tokenizer()
CODES = ("codebook_size", "token_size", "image_size", "patch_size")


@pytest.fixture
def files(tmp_path, fill):
    """Their run, a tokenizer and a cache."""
    run, tokenizer = tmp_path / "run", fill(Tokenizer(SIZES)).state_dict()
    (run / "checkpoint-20/unwrapped_model").mkdir(parents=True)
    state = fill(Generator(GENERATOR)).state_dict()
    torch.save(state, run / "checkpoint-20/unwrapped_model/pytorch_model.bin")
    (run / "checkpoint-20/metadata.json").write_text(json.dumps({"global_step": 20}))
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_seq_len",
             "condition_num_classes")  # fmt: skip
    config = {
        "config": "configs/alitok_b.yaml",
        "experiment": {"name": "theirs", "logging_dir": f"{run}/logs", "output_dir": str(run)},
        "model": {
            "vq_model": {name: getattr(SIZES, name) for name in CODES},
            "generator": {name: getattr(GENERATOR, name) for name in sizes},
        },
        "training": {"per_gpu_batch_size": 4, "max_train_steps": 1},
        "dataset": {"params": {"num_workers_per_gpu": 0}},
        "lr_scheduler": {"params": {"warmup_steps": 0}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    write_state_dict(tokenizer, tmp_path / "t.pth", about_model(TOKENIZER, SIZES))
    codes = np.random.default_rng(0).integers(0, GENERATOR.codebook_size, (6, 1, 7))
    labels, mark = [i % 3 for i in range(6)], fingerprint(tokenizer)
    tiny_cache(tmp_path / "cache", codes, labels, codebook=16, crops="center", tokenizer=mark)
    return tmp_path, state


def test_a_published_run_is_sampled_scored_and_started_from(files, monkeypatch, capsys):
    folder, state = files
    monkeypatch.chdir(folder)
    for number, weights in enumerate(("run", "run/checkpoint-20")):
        sample_imagenet.main([
            "config=run", f"experiment.generator_checkpoint={weights}",
            "experiment.tokenizer_checkpoint=t.pth", f"experiment.output_dir=samples{number}",
            "experiment.num_fid_samples=3", "experiment.save_png=false",
        ])  # fmt: skip
    images = [np.load(f"samples{number}.npz")["arr_0"] for number in (0, 1)]
    assert np.array_equal(*images) and images[0].shape == (3, 16, 16, 3)
    evaluate.main(["--generator=run", "--cache=cache", "--num_workers=0", "--device=cpu"])
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert scored["metrics"]["nats_per_code"] > 0
    given = ["config=run", "dataset.params.pretokenization=cache", "experiment.generate_every=0",
             "experiment.output_dir=ours"]  # fmt: skip
    with pytest.raises(InputError, match=r"set experiment\.init_weights=run/checkpoint-20"):
        train_ar.main([*given, "experiment.resume=run/checkpoint-20"])
    zero = ["optimizer.params.learning_rate=0", "lr_scheduler.params.end_lr=0"]
    train_ar.main([*given, *zero, "experiment.init_weights=run"])
    ours = read_state_dict("ours/generator.bin")
    assert all(torch.equal(ours[name], value) for name, value in state.items())
