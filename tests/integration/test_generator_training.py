"""Generator training as clusters run it: FSDP, several nodes, torch.compile, images without a cache."""

import shutil

import numpy as np
import pytest

from modeling.weights.tensors import read_state_dict
from tests.integration.conftest import ROOT, execute, free_port
from tests.integration.test_pipeline import equal_weights, losses, records

TWO = dict(ranks=2)
DRY = [f"model.generator.{d}=0" for d in ("dropout", "attn_drop", "tok_dropout")]
HALF = ["training.per_gpu_batch_size=2", "training.use_ema=True", *DRY]


@pytest.fixture(scope="module")
def fsdp():
    """The environment that accelerate's own launcher makes of configs/accelerate_fsdp.yaml.

    The launcher itself starts several processes on GPUs only.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = str(ROOT / "configs/accelerate_fsdp.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", config, "train_ar.py"])
    arguments = _validate_launch_command(arguments)[0]
    arguments.main_process_port = 0
    environment = prepare_multi_gpu_env(arguments)
    found = {k: v for k, v in environment.items() if k.startswith(("FSDP_", "ACCELERATE_"))}
    assert found["ACCELERATE_USE_FSDP"] == "true" and found["FSDP_VERSION"] == "2"
    return found


@pytest.fixture(scope="module")
def ddp_run(workspace):
    return workspace.made("ddp", lambda output: workspace.train_ar(output, *HALF, **TWO))


@pytest.mark.slow
def test_fsdp_trains_saves_and_samples_as_ddp(workspace, ddp_run, fsdp, tmp_path):
    workspace.train_ar(tmp_path / "fsdp", *HALF, **TWO, env=fsdp)
    np.testing.assert_allclose(losses(tmp_path / "fsdp"), losses(ddp_run), rtol=1e-6)
    ours, theirs = (
        [r[name] for r in records(run) for name in ("val/loss", "val/accuracy") if name in r]
        for run in (tmp_path / "fsdp", ddp_run)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    preview = "previews/samples-00000006.png"
    assert (tmp_path / "fsdp" / preview).read_bytes() == (ddp_run / preview).read_bytes()
    checkpoint = tmp_path / "fsdp/checkpoints/step-00000006"
    assert equal_weights(checkpoint / "generator.safetensors", tmp_path / "fsdp/generator.bin")
    assert (checkpoint / "generator_raw.safetensors").is_file()
    # A checkpoint of FSDP goes on under DDP, and the other way round.
    for run, env in ((tmp_path / "fsdp", {}), (tmp_path / "ddp", fsdp)):
        if not run.exists():
            shutil.copytree(ddp_run, run)
        shutil.rmtree(run / "checkpoints/step-00000006")
        done = workspace.train_ar(run, *HALF, **TWO, env=env)
        assert ("parameters sharded" in done.stdout) == bool(env)
        np.testing.assert_allclose(losses(run), losses(ddp_run), rtol=1e-6)


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one(workspace, warm, ddp_run, tmp_path):
    agent = [
        "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1",
        "train_ar.py", f"config={workspace.root}/generator.yaml",
        f"experiment.output_dir={tmp_path}/run",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
        f"dataset.params.pretokenization={workspace.cache}",
        f"dataset.params.val_pretokenization={workspace.cache}", *HALF,
    ]  # fmt: skip
    nodes = [warm.start(*agent) for _ in range(2)]
    assert [node.end(within=200) for node in nodes] == [0, 0], nodes[0].output()[-2000:]
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(ddp_run), rtol=1e-6)


def test_images_without_a_cache_train_as_their_ten_crop_cache(workspace, tmp_path):
    cached = workspace.generator.parent
    workspace.train_ar(
        tmp_path / "run", f"dataset.params.train_dir={workspace.root}/train",
        "dataset.params.pretokenization=null", "experiment.generate_every=0",
        "dataset.params.num_workers_per_gpu=1",
    )  # fmt: skip
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(cached), rtol=1e-5)


def test_non_finite_loss_stops_two_ranks_in_one_line(workspace, tmp_path):
    done = workspace.train_ar(
        tmp_path / "run", "optimizer.params.learning_rate=9e18", "lr_scheduler.params.warmup_steps=1", "optimizer.params.weight_decay=1000", "experiment.log_every=4",
        "training.per_gpu_batch_size=2", **TWO, check=False,
    )  # fmt: skip
    lines = {line.partition("error: ")[2] for line in done.stderr.splitlines() if "error: " in line}
    assert done.returncode != 0 and len(lines) == 1
    assert "not finite at step 2: loss" in lines.pop()
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_compiled_training_is_the_same_training(workspace, ddp_run, fsdp, tmp_path, kind):
    launch = {"one": {}, "ddp": TWO, "fsdp": {**TWO, "env": fsdp}}[kind]
    halves = ["training.gradient_accumulation_steps=2"] * (kind == "one")
    recompute = ["model.generator.use_checkpoint=True"] * (kind == "ddp")
    options = [*HALF, *halves, *recompute, "training.compile=True"]
    done = workspace.train_ar(tmp_path / "run", *options, **launch)
    assert ", compiled" in done.stdout and "not compiled" not in done.stdout + done.stderr
    assert ("parameters sharded" in done.stdout) == (kind == "fsdp")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(ddp_run), rtol=1e-5)
    weights = tmp_path / "run/generator.bin"
    assert read_state_dict(weights).keys() == read_state_dict(ddp_run / "generator.bin").keys()


@pytest.mark.slow
def test_compiled_training_in_bfloat16_stays_near_float32(workspace, ddp_run, tmp_path):
    """accelerate wraps the forward pass in autocast; compiling traces through that, as on CUDA."""
    options = [
        "training.per_gpu_batch_size=4",
        "training.compile=True",
        "training.mixed_precision=bf16",
    ]
    done = workspace.train_ar(tmp_path / "run", *HALF, *options)
    assert ", compiled" in done.stdout and "not compiled" not in done.stdout + done.stderr
    found, exact = losses(tmp_path / "run"), losses(ddp_run)
    np.testing.assert_allclose(found, exact, rtol=2e-2)
    assert not np.allclose(found, exact, rtol=1e-6)


def test_plot_draws_the_curves_of_several_runs(workspace, ddp_run, tmp_path):
    from PIL import Image

    pytest.importorskip("matplotlib")
    runs = [workspace.generator.parent, ddp_run]
    execute("training.plot", *runs, "--output", tmp_path / "curves.png")
    assert min(Image.open(tmp_path / "curves.png").size) > 400


def test_plot_names_a_folder_without_records(tmp_path):
    pytest.importorskip("matplotlib")
    done = execute("training.plot", tmp_path, check=False)
    assert done.returncode == 2 and f"no metrics.jsonl in {tmp_path}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_previews_change_nothing_of_the_training(workspace, tmp_path):
    # Their tokenizer is built first, and draws random numbers for it.
    workspace.train_ar(tmp_path / "run", "experiment.generate_every=0")
    assert losses(tmp_path / "run") == losses(workspace.generator.parent)
