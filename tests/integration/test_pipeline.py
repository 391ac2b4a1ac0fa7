"""The real programs in miniature: images -> codes -> generator -> images."""

import json
import shutil

import numpy as np
import torch
from PIL import Image

from modeling.weights.tensors import read_model, read_state_dict


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [r["loss"] for r in records(run) if "loss" in r]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def equal_weights(a, b):
    a, b = read_state_dict(a), read_state_dict(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stage1_reports_saves_and_previews(workspace):
    run = workspace.stage1_run
    assert len(losses(run)) == 6
    assert {"mse", "aux", "quantizer", "lr", "images/s", "codes used"} <= records(run)[0].keys()
    assert {"val/psnr", "val/codebook_use"} <= records(run)[-1].keys()
    assert (run / "previews/reconstruction-00000006.png").exists()
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006"]


def test_stage2_keeps_encoder_and_codebook_and_makes_the_published_format(workspace):
    first = read_state_dict(workspace.stage1_run / "tokenizer.pth")
    second = read_state_dict(workspace.tokenizer)
    assert not any("aux" in k or "embed_prob" in k for k in second)
    frozen = [k for k in second if not k.startswith("decoder.")]
    assert all(torch.equal(first[k], second[k]) for k in frozen)
    shared = "decoder.transformer.0.mlp.c_fc.weight"
    assert not torch.equal(first[shared], second[shared])


def test_stage2_decoder_starts_from_stage1_or_from_scratch(workspace, tmp_path):
    first = read_state_dict(workspace.stage1_run / "tokenizer.pth")["decoder.decoder_embed.weight"]
    starts = {}
    for init in ("stage1", "scratch"):
        output = tmp_path / init
        phase = "phases=[{steps: 1, learning_rate: 0.0}]"
        workspace.stage2(output, workspace.stage1_run, f"model.decoder_init={init}", phase)
        starts[init] = read_state_dict(output / "tokenizer.pth")["decoder.decoder_embed.weight"]
    assert torch.equal(starts["stage1"], first)
    assert not torch.equal(starts["scratch"], first)


def about(path):
    return read_model(path, "tokenizer")[1]


def test_export_writes_the_newest_checkpoint(workspace, tmp_path):
    from tests.integration.conftest import execute

    run = workspace.tokenizer.parent
    for name in ("a.pth", "a.safetensors"):
        execute("train_tokenizer.export", run, tmp_path / name)
        assert equal_weights(tmp_path / name, workspace.tokenizer)
        assert about(tmp_path / name) == about(workspace.tokenizer) is not None
    step = run / "checkpoints/step-00000003"
    execute("train_tokenizer.export", step, tmp_path / "b.pth")
    assert equal_weights(tmp_path / "b.pth", step / "tokenizer.safetensors")


def test_token_cache_is_the_same_bytes_from_one_and_two_ranks(workspace, tmp_path):
    workspace.pretokenize(tmp_path / "two", ranks=2)
    assert files(tmp_path / "two") == files(workspace.cache)
    assert not (tmp_path / "two.partial").exists()


def test_finished_cache_is_left_alone_and_other_settings_are_refused(workspace):
    before = files(workspace.cache)
    again = workspace.pretokenize(workspace.cache)
    assert "complete" in again.stdout
    other = workspace.pretokenize(workspace.cache, "--batch_size", 5, check=False)
    assert other.returncode == 2 and "batch_size (3 there, 5 now)" in other.stderr
    assert files(workspace.cache) == before


def test_generator_run_reports_evaluates_and_draws_samples(workspace):
    run = workspace.generator.parent
    assert len(losses(run)) == 6
    assert {"val/loss", "val/accuracy"} <= records(run)[-1].keys()
    assert Image.open(run / "previews/samples-00000006.png").size == (10 * 18 + 2, 4 * 18 + 2)
    assert equal_weights(
        run / "checkpoints/step-00000006/generator.safetensors", workspace.generator
    )


def test_generator_resumed_is_generator_uninterrupted(workspace, tmp_path):
    options = ["training.use_ema=True"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    workspace.train_ar(whole, *options)
    workspace.train_ar(halves, *options)
    # As if killed after step 3: the newest checkpoint and the final files are not there.
    shutil.rmtree(halves / "checkpoints/step-00000006")
    (halves / "generator.bin").unlink()
    # Another seed of hashes, and so another order of sets.
    workspace.train_ar(halves, *options, env={"PYTHONHASHSEED": "1"}, fresh=True)
    assert losses(halves) == losses(whole)
    assert equal_weights(halves / "generator.bin", whole / "generator.bin")
    raw = "checkpoints/step-00000006/generator_raw.safetensors"
    assert equal_weights(halves / raw, whole / raw)


def test_stage1_resumed_is_stage1_uninterrupted(workspace, tmp_path):
    halves = tmp_path / "halves"
    shutil.copytree(workspace.stage1_run, halves)
    shutil.rmtree(halves / "checkpoints/step-00000006")
    (halves / "tokenizer.pth").unlink()
    workspace.stage1(halves)
    assert losses(halves) == losses(workspace.stage1_run)
    assert equal_weights(halves / "tokenizer.pth", workspace.stage1_run / "tokenizer.pth")


def test_accelerate_launch_trains_as_the_plain_command(workspace, tmp_path):
    workspace.stage1(tmp_path / "1", launcher="accelerate")
    assert losses(tmp_path / "1") == losses(workspace.stage1_run)
    workspace.train_ar(tmp_path / "2", launcher="accelerate")
    assert losses(tmp_path / "2") == losses(workspace.generator.parent)


def test_two_ranks_train_as_one_at_the_same_global_batch(workspace, tmp_path):
    workspace.stage1(tmp_path / "t", "training.per_gpu_batch_size=2", ranks=2)
    np.testing.assert_allclose(losses(tmp_path / "t"), losses(workspace.stage1_run), rtol=1e-4)
    dry = [f"model.generator.{d}=0" for d in ("dropout", "attn_drop", "tok_dropout")]
    workspace.train_ar(tmp_path / "one", *dry)
    workspace.train_ar(tmp_path / "two", "training.per_gpu_batch_size=2", *dry, ranks=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


def test_samples_are_the_same_from_one_and_two_ranks(workspace, tmp_path):
    # 8 images in chunks of 3: neither ranks nor chunks divide them.
    workspace.sample(tmp_path / "one", "experiment.num_fid_samples=8")
    two = {"ranks": 2, "launcher": "torchrun", "fresh": True}
    workspace.sample(tmp_path / "two", "experiment.num_fid_samples=8", **two)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert (tmp_path / "one_codes.npz").read_bytes() == (tmp_path / "two_codes.npz").read_bytes()
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_samples_are_written_as_the_adm_evaluator_reads_them(workspace, tmp_path):
    import zipfile

    workspace.sample(tmp_path / "s", "experiment.num_fid_samples=4")
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        assert archive.namelist() == ["arr_0.npy"]
        with archive.open("arr_0.npy") as stream:
            assert np.lib.format.read_magic(stream) == (1, 0)
            header = np.lib.format.read_array_header_1_0(stream)
            pixels = np.frombuffer(stream.read(), np.uint8)
    assert header == ((4, 16, 16, 3), False, np.dtype("uint8"))
    images = pixels.reshape(header[0])
    assert (images == np.load(tmp_path / "s.npz")["arr_0"]).all()
    pictures = [np.asarray(Image.open(tmp_path / f"s/{i:06d}.png")) for i in range(4)]
    assert (images == np.stack(pictures)).all()


def test_sampling_refuses_other_settings_in_a_folder_and_repeats_its_own(workspace, tmp_path):
    options = ["experiment.num_fid_samples=8", "experiment.save_png=False"]
    workspace.sample(tmp_path / "a", *options)
    whole = (tmp_path / "a.npz").read_bytes()
    assert "complete" in workspace.sample(tmp_path / "a", *options).stdout
    (tmp_path / "a.npz").unlink()
    other = workspace.sample(tmp_path / "a", *options, "model.generator.seed=7", check=False)
    assert other.returncode == 2 and "seed (42 there, 7 now)" in other.stderr
    workspace.sample(tmp_path / "a", *options)
    assert (tmp_path / "a.npz").read_bytes() == whole


def test_wandb_runs_offline_and_disabled(workspace, tmp_path):
    options = ["training.enable_wandb=True", "training.max_train_steps=2"]
    workspace.train_ar(tmp_path / "off", *options, env={"WANDB_MODE": "offline"})
    assert list((tmp_path / "off/wandb").glob("offline-run-*"))
    workspace.train_ar(tmp_path / "dis", *options, env={"WANDB_MODE": "disabled"})
    assert not list((tmp_path / "dis").glob("wandb/offline-run-*"))
