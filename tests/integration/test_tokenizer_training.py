"""Options of the tokenizer's trainer, each by its effect on a whole miniature run.

Most runs happen in this process, which saves the import of everything; those on two ranks do not.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed

from configs.load import load
from configs.schema import TokenizerRun
from data.images import CenterImages
from modeling.weights.tensors import read_state_dict, write_state_dict
from runtime.errors import InputError
from tests.compilations import count_by_step
from tests.host_syncs import count_in
from tests.integration.conftest import STAGE2, VQ_MODEL, execute
from train_tokenizer import __main__ as trainer
from train_tokenizer import export
from train_tokenizer.discriminator import Discriminator

EMA = ["training.use_ema=True", "training.ema_decay=0.5", "training.ema_warmup=False"]


@pytest.fixture
def train(workspace, capsys):
    """Run the trainer in this process; returns what it printed."""

    def start(stage, output, *options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        config = f"config={workspace.root}/stage{stage}.yaml"
        config = [] if any(o.startswith("config=") for o in options) else [config]
        paths = [
            f"dataset.params.{split}_dir={workspace.root}/{split}" for split in ("train", "val")
        ]
        trainer.main([*config, f"experiment.output_dir={output}", *paths, *options])
        return capsys.readouterr().out

    return start


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [r.get("loss", r.get("critic")) for r in records(run) if "lr" in r]


def tensors(run, name="tokenizer", step=6):
    return read_state_dict(run / f"checkpoints/step-{step:08d}/{name}.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(train, *args):
    with pytest.raises(InputError) as caught:
        train(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- numerics
@pytest.mark.parametrize(
    "options, tolerance",
    [
        (["model.use_checkpoint=True"], 1e-6),
        (["training.mixed_precision=bf16"], 1e-3),
    ],
    ids=["recompute", "bf16"],
)
def test_option_of_speed_or_memory_leaves_the_losses(
    workspace, train, tmp_path, options, tolerance
):
    train(1, tmp_path, *options)
    np.testing.assert_allclose(losses(tmp_path), losses(workspace.stage1_run), rtol=tolerance)


HALVES = ["training.per_gpu_batch_size=2", "training.gradient_accumulation_steps=2"]


def test_accumulation_leaves_the_losses(train, tmp_path):
    # Clustering moves several unused codes to the same vector. Which of these twins is nearest
    # depends on rounding, and the optimizer then moves another one. So this test is without it.
    options = ["model.vq_model.clustering=False"]
    train(1, tmp_path / "whole", *options)
    train(1, tmp_path / "halves", *options, *HALVES)
    np.testing.assert_allclose(losses(tmp_path / "halves"), losses(tmp_path / "whole"), rtol=1e-6)


def test_accumulation_clusters_by_the_whole_batch(train, tmp_path):
    # The codebook after one step, before it has twins; the first learning rate is 0.
    keep = ["experiment.save_every=1", "experiment.keep_checkpoints=6"]
    train(1, tmp_path / "whole", *keep)
    train(1, tmp_path / "halves", *keep, *HALVES)
    whole, halves = (tensors(tmp_path / run, step=1) for run in ("whole", "halves"))
    for name in ("quantize.embedding.weight", "quantize.embed_prob"):
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["training.mixed_precision=fp16"],
        ["training.mixed_precision=fp16", "training.gradient_accumulation_steps=2"],
        ["training.compile=True"],
    ],
)
def test_cuda_modes_train_through_an_adversarial_phase(workspace, tmp_path, options):
    phases = "phases=[{steps: 4, learning_rate: 1e-3}, {steps: 4, gan_weight: 0.005}]"
    workspace.stage1(tmp_path, phases, *options, env={"CUDA_VISIBLE_DEVICES": "0"}, fresh=True)
    assert len(losses(tmp_path)) == 8 and np.isfinite(losses(tmp_path)).all()


def test_fp16_without_cuda_is_refused(train, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    message = refusal(train, 1, tmp_path / "run", "training.mixed_precision=fp16")
    assert "training.mixed_precision=fp16 needs a CUDA device" in message


# ---------------------------------------------------------------------- speed
@pytest.mark.parametrize("stage, programs", [(1, 3), (2, 1)])
def test_nothing_is_compiled_after_the_first_step_of_a_kind(
    train, workspace, tmp_path, monkeypatch, stage, programs
):
    """One program serves a stack of blocks, but the encoder's last block has its own. The
    discriminator has one for the tokenizer's loss and one for its own steps, of which the first does
    not compile the tokenizer again. Evaluations compile nothing."""
    before_step = count_by_step(trainer, monkeypatch)
    phases = "phases=[{steps: 1, learning_rate: 1e-3}, {steps: 4, gan_weight: 0.005}]"
    deep, stage1 = "model.vq_model.encoder_layers=2", workspace.stage1_run
    train(
        stage, tmp_path / "run", phases, "training.compile=True", "experiment.eval_every=1",
        deep if stage == 1 else f"experiment.stage1_checkpoint={stage1}",
    )  # fmt: skip
    assert before_step == [0, programs, programs + 1, programs + 2, programs + 2]


def test_only_reporting_steps_wait_for_the_device(train, tmp_path, monkeypatch, random_networks):
    phases = (
        "phases=[{steps: 1, learning_rate: 1e-3, perceptual_weight: 0.1, lpips_weight: 1.0}, "
        "{steps: 4, gan_weight: 0.005, lpips_weight: 1.0}]"  # its second and last: discriminator's
    )
    periods = [f"experiment.{name}_every=100" for name in ("eval", "generate", "save", "log")]
    syncs = count_in(trainer, monkeypatch)
    with syncs:
        out = train(
            1, tmp_path, phases, *periods, *EMA,
            "model.cluster_in_critic_steps=True", "training.max_grad_norm=1.0",
            "training.gradient_accumulation_steps=2", "training.per_gpu_batch_size=2",
            "experiment.log_grad_norm_every=1",
        )  # fmt: skip
    assert {step: found for step, found in syncs.found.items() if step != 5} == {}
    assert 5 in syncs.found  # the last step reports
    assert {"critic", "gan", "lpips", "perceptual", "quantizer"} <= records(tmp_path)[0].keys(), out


# ---------------------------------------------------------------------- average of the weights


def test_average_is_that_of_the_steps_and_is_what_the_run_shows(workspace, train, tmp_path):
    run = tmp_path / "run"
    train(1, run, *EMA, "experiment.save_every=1", "experiment.keep_checkpoints=6")
    assert losses(run) == losses(workspace.stage1_run)
    assert equal(tensors(run, "tokenizer_raw"), tensors(workspace.stage1_run))
    name = "decoder.ffn.0.weight"
    set_seed(42)
    average = trainer.build_tokenizer(load(TokenizerRun, [f"config={workspace.root}/stage1.yaml"]))
    average = average.state_dict()[name]
    for step in range(1, 7):
        average = 0.5 * average + 0.5 * tensors(run, "tokenizer_raw", step)[name]
    torch.testing.assert_close(tensors(run)[name], average)
    assert equal(read_state_dict(run / "tokenizer.pth"), tensors(run))
    export.main([str(run), str(tmp_path / "out.safetensors")])
    assert equal(read_state_dict(tmp_path / "out.safetensors"), tensors(run))
    averaged, plain = (r[-1]["val/psnr"] for r in (records(run), records(workspace.stage1_run)))
    assert averaged != plain


@pytest.mark.parametrize("warmup", [False, True])
def test_run_with_an_average_resumed_is_the_run_uninterrupted(train, tmp_path, warmup):
    # A decay that the warm-up does not reach, so that every update depends on their number.
    options = [*EMA, *["training.ema_warmup=True", "training.ema_decay=0.9"] * warmup]
    train(1, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoints/step-00000006")
    train(1, tmp_path / "halves", *options)
    for name in ("tokenizer", "tokenizer_raw"):
        assert equal(tensors(tmp_path / "halves", name), tensors(tmp_path / "whole", name))


def test_average_begins_where_a_run_without_one_is_resumed(workspace, train, tmp_path):
    shutil.copytree(workspace.stage1_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    # Another run than before, so the checkpoint is named.
    train(1, tmp_path / "run", *EMA, f"experiment.resume={tmp_path}/run")
    assert equal(tensors(tmp_path / "run", "tokenizer_raw"), tensors(workspace.stage1_run))
    assert not equal(tensors(tmp_path / "run"), tensors(workspace.stage1_run))


def test_stage2_average_keeps_encoder_and_codebook_to_the_bit(workspace, train, tmp_path):
    train(2, tmp_path / "run", f"experiment.stage1_checkpoint={workspace.stage1_run}", *EMA)
    first, second = tensors(workspace.stage1_run), read_state_dict(tmp_path / "run/tokenizer.pth")
    assert all(torch.equal(first[k], second[k]) for k in second if not k.startswith("decoder."))


# ---------------------------------------------------------------------- data
def test_list_file_trains_as_the_folder_that_it_lists(workspace, train, tmp_path):
    paths = sorted((workspace.root / "train").rglob("*.png"))
    (tmp_path / "train.txt").write_text("\n".join(map(str, paths)))
    train(1, tmp_path / "run", f"dataset.params.train_dir={tmp_path}/train.txt")
    assert losses(tmp_path / "run") == losses(workspace.stage1_run)


def test_list_files_relative_paths_are_found_below_train_root(workspace, train, tmp_path):
    root = workspace.root
    for split in ("train", "val"):
        paths = [str(p.relative_to(root)) for p in sorted((root / split).rglob("*.png"))]
        (tmp_path / f"{split}.txt").write_text("\n".join(paths))
    lists = [f"dataset.params.{split}_dir={tmp_path}/{split}.txt" for split in ("train", "val")]
    said = train(1, tmp_path / "run", *lists, f"dataset.params.train_root={root}")
    assert losses(tmp_path / "run") == losses(workspace.stage1_run)
    assert f"{tmp_path}/train.txt: a list of 14 images" in said
    message = refusal(train, 1, tmp_path / "other", *lists)
    assert "train.txt, line 1: there is no file" in message
    message = refusal(train, 1, tmp_path / "other", f"dataset.params.train_root={root}")
    assert "train_root" in message and "leave train_root out" in message
    assert not (tmp_path / "other").exists()


def test_unreadable_training_images_are_replaced_and_listed(workspace, train, tmp_path):
    shutil.copytree(workspace.root / "train", tmp_path / "train")
    broken = sorted((tmp_path / "train").rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    folder = f"dataset.params.train_dir={tmp_path}/train"
    message = refusal(train, 1, tmp_path / "other", folder)
    assert f"unreadable image {broken}" in message
    assert "dataset.params.skip_unreadable=N" in message
    said = train(1, tmp_path / "run", folder, "dataset.params.skip_unreadable=1")
    assert (tmp_path / "run/unreadable.txt").read_text() == f"{broken}\n"
    assert "warning: 1 unreadable image is replaced by others" in said
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    train(1, tmp_path / "run", folder, "dataset.params.skip_unreadable=2")  # may change
    assert losses(tmp_path / "run") == whole


def test_other_images_of_the_same_number_are_refused_and_equal_held_out_ones_warned_of(
    workspace, train, tmp_path
):
    short = ["phases=[{steps: 1, learning_rate: 1e-3}]", f"dataset.params.val_dir={tmp_path}/train"]
    shutil.copytree(workspace.root / "train", tmp_path / "train")
    said = train(1, tmp_path / "run", *short)
    assert f"warning: {tmp_path}/train: the validation data equals the training data" in said
    changed = sorted((tmp_path / "train").rglob("*.png"))[3]
    changed.write_bytes(sorted((workspace.root / "train").rglob("*.png"))[0].read_bytes() + b"x")
    other = f"dataset.params.train_dir={tmp_path}/train"
    message = refusal(train, 1, tmp_path / "run", *short, other)
    assert "with other options or data: image sizes (" in message and "names" not in message
    longer = ["phases=[{steps: 1, learning_rate: 1e-3}, {steps: 1}]", short[1], other]
    said = train(1, tmp_path / "fork", *longer, f"experiment.resume={tmp_path}/run")
    assert "warning: resumes from" in said and "image sizes (" in said


def test_fewer_examples_are_of_all_classes(workspace, train, tmp_path):
    few = ["experiment.max_train_examples=6", "phases=[{steps: 1, learning_rate: 1e-3}]"]
    said = train(1, tmp_path, *few)
    assert f"{workspace.root}/train: 14 images, 3 classes (class0, class1, class2)" in said
    assert "leaves images out: 8 of 14" in said and " 6 images; 4 per step" in said
    options = load(
        TokenizerRun,
        [
            f"config={workspace.root}/stage1.yaml", *few,
            f"dataset.params.train_dir={workspace.root}/train",
        ],
        "train_tokenizer",
    )  # fmt: skip
    folders = [Path(path).parent.name for path in trainer.open_data(options).paths]
    assert folders == ["class0"] * 2 + ["class1"] * 2 + ["class2"] * 2
    message = refusal(train, 1, tmp_path, few[1])
    assert "images (6 there, 14 now)" in message


def test_fewer_images_than_a_global_batch_are_refused(train, tmp_path):
    message = refusal(train, 1, tmp_path / "run", "training.per_gpu_batch_size=15")
    assert "14 images are fewer than the 15" in message
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- losses and phases
STITCHED = ["model.vq_model.num_latent_tokens=20", "losses.aux=stitched", "losses.aux_weight=1.0"]


def test_stitched_aux_term_trains_both_stages(train, tmp_path):
    train(1, tmp_path / "1", *STITCHED)
    assert losses(tmp_path / "1")[-1] != losses(tmp_path / "1")[0]
    train(
        2, tmp_path / "2", "model.vq_model.num_latent_tokens=20",
        f"experiment.stage1_checkpoint={tmp_path}/1",
    )  # fmt: skip
    assert len(losses(tmp_path / "2")) == 4


@pytest.mark.slow
def test_all_loss_terms_train_unattended_through_both_stages(train, tmp_path, random_networks):
    phases = (
        "phases=[{name: warm, steps: 1, perceptual_weight: 0.1, lpips_weight: 1.0},"
        "{name: main, steps: 1, perceptual_weight: 1.0},"
        "{name: adversarial, steps: 4, gan_weight: 0.005}]"
    )
    options = [phases, "training.per_gpu_batch_size=2"]
    train(1, tmp_path / "1", *options)
    train(2, tmp_path / "2", f"experiment.stage1_checkpoint={tmp_path}/1", *options)
    for run in (tmp_path / "1", tmp_path / "2"):
        steps = [r for r in records(run) if "lr" in r]
        assert {"lpips", "perceptual"} <= steps[0].keys()
        assert "lpips" not in steps[1] and "perceptual" in steps[1]
        assert ["gan" in r for r in steps[2:]] == [True, False, True, False]
        assert ["critic" in r for r in steps[2:]] == [False, True, False, True]
        assert (run / "checkpoints/step-00000006/discriminator.safetensors").exists()


def test_adversarial_phase_may_be_added_to_a_finished_run(workspace, train, tmp_path):
    shutil.copytree(workspace.stage1_run, tmp_path / "run")
    phases = "phases=[{name: mse, steps: 6, learning_rate: 1.0e-3}, {steps: 2, gan_weight: 0.005}]"
    train(1, tmp_path / "run", phases)
    assert losses(tmp_path / "run")[:6] == losses(workspace.stage1_run)
    assert "gan" in records(tmp_path / "run")[-3] and "critic" in records(tmp_path / "run")[-2]
    assert [r["phase"] for r in records(tmp_path / "run") if "lr" in r] == [1] * 6 + [2] * 2


def test_phase_that_has_begun_stays_as_it_was(workspace, train, tmp_path):
    message = refusal(
        train, 1, workspace.stage1_run, "phases=[{name: mse, steps: 6, learning_rate: 2.0e-3}]"
    )
    assert "phases[0].learning_rate (0.001 there, 0.002 now)" in message


@pytest.mark.parametrize("reset, steps", [("true", 2), ("false", 5)])
def test_a_phase_may_start_with_empty_moments_of_adam(train, tmp_path, reset, steps):
    phases = f"{{steps: 3}}, {{steps: 2, reset_optimizer: {reset}}}"
    train(1, tmp_path, f"phases=[{phases}]")
    file = tmp_path / "checkpoints/step-00000005/state.pt"
    state = torch.load(file, weights_only=True)["optimizer"]["state"]
    assert {moments["step"].item() for moments in state.values()} == {steps}


def test_start_says_phases_steps_and_time(train, tmp_path):
    phases = "phases=[{name: one, steps: 2}, {name: two, steps: 3, learning_rate: 1e-5}]"
    said = train(1, tmp_path, phases)
    assert "M parameters, " in said and "one 2 + two 3 steps" in said
    assert "steps 1 to 5, 1.4 epochs" in said
    assert "phase one: step 1 of 2" in said and "phase two: step 1 of 3" in said
    assert said.count("expected time: 0.00 hours for the 3 steps left") == 1
    assert [r["phase"] for r in records(tmp_path) if "lr" in r] == [1, 1, 2, 2, 2]


# ---------------------------------------------------------------------- what a person watches
def test_previews_have_their_own_period_and_need_no_held_out_images(train, tmp_path):
    train(1, tmp_path, "experiment.generate_every=2", "dataset.params.val_dir=null")
    made = sorted(p.name for p in (tmp_path / "previews").iterdir())
    assert made == [f"reconstruction-0000000{step}.png" for step in (2, 4, 6)]
    assert not any("val/psnr" in r for r in records(tmp_path))


def test_gradient_norm_is_logged_by_its_period(train, tmp_path):
    train(1, tmp_path, "experiment.log_grad_norm_every=3")
    logged = [r["step"] for r in records(tmp_path) if "grad_norm" in r]
    assert logged == [3, 6]


def test_collapsed_codebook_is_warned_of_once(train, tmp_path):
    options = ["model.vq_model.clustering=False", "model.vq_model.codebook_size=64"]
    options += ["training.per_gpu_batch_size=14", "phases=[{steps: 9, learning_rate: 0.0}]"]
    # 3 steps of 14 x 21 tokens are 13 tokens a code; all codes but two lie far away.
    stage1 = trainer.build_tokenizer

    def far_codes(given):
        tokenizer = stage1(given)
        with torch.no_grad():
            tokenizer.quantize.embedding.weight[2:] += 1e3
        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_tokenizer", far_codes)
        said = train(1, tmp_path, *options, "experiment.log_every=3")
    assert said.count("warning: the codebook has collapsed: ") == 1
    assert "of 64 codes are used" in said


def test_identical_codes_for_every_image_are_warned_of_once(train, tmp_path):
    options = ["model.vq_model.clustering=False", "phases=[{steps: 6, learning_rate: 0.0}]"]
    options += ["training.per_gpu_batch_size=14"]
    stage1 = trainer.build_tokenizer

    def blind(given):
        tokenizer = stage1(given)
        with torch.no_grad():
            tokenizer.encoder.patch_embed.weight.zero_()
        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_tokenizer", blind)
        said = train(1, tmp_path, *options)
    assert said.count("warning: the codes hardly depend on the image") == 1
    found = [r["code agreement"] for r in records(tmp_path) if "code agreement" in r]
    assert found == [1.0] * 6 and "collapsed" not in said


@pytest.mark.slow
def test_evaluation_measures_lpips_where_its_weights_are(train, tmp_path, monkeypatch):
    import lpips
    from torchvision.models import vgg16

    from evaluation.lpips import LPIPS_FILE, VGG_FILE

    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    with torch.device("meta"):
        shapes = vgg16().state_dict()
    torch.save({k: torch.tensor(1e-3).expand(v.shape) for k, v in shapes.items()}, cache / VGG_FILE)
    heads = f"{lpips.__path__[0]}/weights/v0.1/vgg.pth"
    shutil.copy(heads, cache / LPIPS_FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = train(1, tmp_path / "run", "phases=[{steps: 1}]")
    measured = records(tmp_path / "run")[-1]["val/lpips"]
    assert measured > 0 and "no val/lpips" not in said
    names = [
        k for p in (tmp_path / "run/checkpoints").rglob("*.safetensors") for k in read_state_dict(p)
    ]
    assert names and not any("vgg" in k or "lin0" in k for k in names)  # in no checkpoint


# ---------------------------------------------------------------------- stage 1 for stage 2
def test_stage2_tokenizer_as_stage1_is_refused_but_for_its_encoder(workspace, train, tmp_path):
    given = f"experiment.stage1_checkpoint={workspace.tokenizer}"
    message = refusal(train, 2, tmp_path / "run", given)
    assert (
        f"{workspace.tokenizer} is not a checkpoint of stage 1 but a stage-2 tokenizer" in message
    )
    assert "model.decoder_init=scratch" in message and not (tmp_path / "run").exists()
    train(2, tmp_path / "run", given, "model.decoder_init=scratch")


def test_a_resumed_stage2_needs_no_stage1(workspace, train, tmp_path):
    shutil.copytree(workspace.stage1_run, tmp_path / "stage1")
    given = f"experiment.stage1_checkpoint={tmp_path}/stage1"
    (tmp_path / "stage1/tokenizer.pth").unlink()  # as if it had been stopped
    critic = "model.critic_init=stage1"
    said = train(2, tmp_path / "run", given, critic)
    assert (
        f"warning: {tmp_path}/stage1 has not finished: stage 2 keeps the encoder of step-" in said
    )
    assert f"encoder, codebook and decoder from {tmp_path}/stage1/checkpoints/step-" in said
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "stage1")
    for again in ([given], []):
        shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
        train(2, tmp_path / "run", *again, critic)
        assert losses(tmp_path / "run") == whole
    train(1, tmp_path / "other", "phases=[{steps: 1}]")
    other = f"experiment.stage1_checkpoint={tmp_path}/other"
    message = refusal(train, 2, tmp_path / "run", other, critic)
    assert f"{given}, not {tmp_path}/other" in message and "experiment.output_dir" in message
    assert "no weights at" in refusal(train, 2, tmp_path / "new", given)
    assert "stage 2 needs the tokenizer" in refusal(train, 2, tmp_path / "new")
    phases = "phases=[{name: mse, steps: 4, learning_rate: 1.0e-3}, {steps: 2, gan_weight: 0.005}]"
    message = refusal(train, 2, tmp_path / "run", phases, critic)
    assert f"no weights at {tmp_path}/stage1" in message and "critic_init=scratch" in message
    generators = f"experiment.resume={workspace.generator.parent}"
    assert "pass a run of the right kind" in refusal(train, 2, tmp_path / "new", generators)


def test_stage1_without_a_prefix_head_is_known_by_its_clustering(workspace, train, tmp_path):
    """Of a file that states nothing, as a published last.pth."""
    headless = ["model.vq_model.prefix_head=False", "losses.aux_weight=0", "phases=[{steps: 1}]"]
    train(1, tmp_path / "a", *headless)
    write_state_dict(tensors(tmp_path / "a", step=1), tmp_path / "bare.pth")
    train(2, tmp_path / "b", f"experiment.stage1_checkpoint={tmp_path}/bare.pth", STILL)
    assert (tmp_path / "b/tokenizer.pth").exists()


def test_discriminator_as_stage1_is_refused(train, tmp_path):
    write_state_dict(Discriminator(32).state_dict(), tmp_path / "d.pth")
    message = refusal(train, 2, tmp_path / "run", f"experiment.stage1_checkpoint={tmp_path}/d.pth")
    assert "d.pth is not a tokenizer but a discriminator" in message


def test_stage1_of_another_layout_is_refused(workspace, train, tmp_path):
    options = [f"experiment.stage1_checkpoint={workspace.stage1_run}"]
    message = refusal(train, 2, tmp_path / "run", *options, "model.vq_model.num_latent_tokens=20")
    assert message.startswith("model.vq_model.num_latent_tokens=20 contradicts")
    assert "whose weights have num_latent_tokens=21" in message


# ---------------------------------------------------------------------- weights to start from
STILL = "phases=[{steps: 1, learning_rate: 0.0}]"  # the weights stay as they begin


def test_stage1_starts_from_the_weights_of_a_run(workspace, train, tmp_path):
    still = [STILL, "model.vq_model.clustering=False", "optimizer.params.weight_decay=0"]
    train(1, tmp_path / "a", "model.vq_model.clustering=False", *EMA)
    said = train(1, tmp_path / "b", f"experiment.init_weights={tmp_path}/a", *still, *EMA)
    average = tensors(tmp_path / "a")
    assert equal(tensors(tmp_path / "b", step=1), average)
    assert equal(tensors(tmp_path / "b", "tokenizer_raw", step=1), average)
    assert not equal(average, tensors(tmp_path / "a", "tokenizer_raw"))
    source = f"{tmp_path}/a/checkpoints/step-00000006/tokenizer.safetensors"
    assert f"starts from {source}: a stage-1 tokenizer (codebook_size=" in said
    assert [r["step"] for r in records(tmp_path / "b")] == [1, 1]


def test_stage2_starts_from_a_finished_tokenizer_decoder_and_all(workspace, train, tmp_path):
    init = f"experiment.init_weights={workspace.tokenizer}"
    train(2, tmp_path / "still", init, STILL)
    assert equal(tensors(tmp_path / "still", step=1), read_state_dict(workspace.tokenizer))
    train(2, tmp_path / "run", init)
    first, second = read_state_dict(workspace.tokenizer), tensors(tmp_path / "run", step=4)
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if not name.startswith("decoder.")}
    whole = losses(tmp_path / "run")
    for again in ([init], []):  # neither needs a stage 1
        shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
        train(2, tmp_path / "run", *again)
        assert losses(tmp_path / "run") == whole


def test_initial_weights_bring_the_sizes_of_the_tokenizer(workspace, train, tmp_path):
    """They may be gone when the run resumes."""
    few = tmp_path / "few.yaml"
    few.write_text(
        STAGE2.replace(VQ_MODEL, "").replace("vq_model:", "").replace("num_buffer_tokens: 2", "")
    )
    shutil.copytree(workspace.tokenizer.parent, tmp_path / "first")
    given = [f"config={few}", f"experiment.init_weights={tmp_path}/first"]
    train(2, tmp_path / "run", *given)
    train(2, tmp_path / "stated", given[1])
    whole = losses(tmp_path / "run")
    assert whole == losses(tmp_path / "stated")
    shutil.rmtree(tmp_path / "first")
    for again in (given, given[:1]):
        shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
        train(2, tmp_path / "run", *again)
        assert losses(tmp_path / "run") == whole


def test_stage1_checkpoint_beside_initial_weights_has_to_agree(workspace, train, tmp_path):
    init = f"experiment.init_weights={workspace.tokenizer}"
    train(2, tmp_path / "run", init, f"experiment.stage1_checkpoint={workspace.stage1_run}", STILL)
    train(1, tmp_path / "other", "training.seed=1", "phases=[{steps: 1}]")
    given = f"experiment.stage1_checkpoint={tmp_path}/other"
    message = refusal(train, 2, tmp_path / "b", init, given)
    assert f"stage1_checkpoint={tmp_path}/other differ in encoder or codebook" in message
    assert "leave stage1_checkpoint out" in message and not (tmp_path / "b").exists()


def test_initial_weights_of_another_kind_are_refused(workspace, train, tmp_path):
    init = "experiment.init_weights"
    message = refusal(train, 2, tmp_path / "b", f"{init}={workspace.stage1_run}")
    assert "is a stage-1 tokenizer" in message and "set experiment.stage1_checkpoint" in message
    message = refusal(train, 1, tmp_path / "b", f"{init}={workspace.tokenizer}")
    assert "contradicts" in message and "whose weights have num_buffer_tokens" in message
    run = workspace.tokenizer.parent
    for size in ("encoder_heads", "decoder_heads"):  # no shape shows them
        message = refusal(train, 2, tmp_path / "b", f"{init}={run}", f"model.vq_model.{size}=4")
        assert (
            f"model.vq_model.{size}=4 (the command line) contradicts {run}/checkpoints" in message
        )
    assert not (tmp_path / "b").exists()


def test_a_tokenizers_run_is_not_resumed_with_other_initial_weights(workspace, train, tmp_path):
    shutil.copytree(workspace.stage1_run, tmp_path / "run")
    init = f"experiment.init_weights={workspace.stage1_run}"
    message = refusal(train, 1, tmp_path / "run", init)
    assert f"experiment.init_weights=null, not {workspace.stage1_run}" in message
    message = refusal(train, 1, tmp_path / "run", init, "experiment.resume=False")
    assert "already holds step-00000006" in message


# ---------------------------------------------------------------------- reports and dry runs
def test_unreadable_held_out_image_costs_the_report_and_not_the_training(
    workspace, train, tmp_path
):
    shutil.copytree(workspace.root / "val", tmp_path / "val")
    broken = sorted((tmp_path / "val").rglob("*.png"))[-1]
    broken.write_bytes(broken.read_bytes()[:60])
    said = train(1, tmp_path / "run", f"dataset.params.val_dir={tmp_path}/val")
    assert losses(tmp_path / "run") == losses(workspace.stage1_run)
    assert f"warning: evaluation failed: unreadable image {broken}" in said
    assert not any("val/psnr" in r for r in records(tmp_path / "run"))
    assert (tmp_path / "run/tokenizer.pth").exists()


def test_a_report_that_fails_on_one_rank_fails_on_both(workspace, tmp_path):
    """Otherwise the other rank would wait for the sums of the figures."""
    shutil.copytree(workspace.root / "val", tmp_path / "val")
    sorted((tmp_path / "val").rglob("*.png"))[3].write_bytes(b"no image")  # of the second batch
    done = workspace.stage1(
        tmp_path / "run", f"dataset.params.val_dir={tmp_path}/val",
        "training.per_gpu_batch_size=2", "training.gradient_accumulation_steps=1", ranks=2,
    )  # fmt: skip
    assert "warning: evaluation failed" in done.stdout
    assert not any("val/psnr" in r for r in records(tmp_path / "run"))
    assert (tmp_path / "run/tokenizer.pth").exists()


def test_first_held_out_image_is_read_before_the_first_step(workspace, train, tmp_path):
    shutil.copytree(workspace.root / "val", tmp_path / "val")
    first = sorted((tmp_path / "val").rglob("*.png"))[0]
    first.write_bytes(first.read_bytes()[:60])
    message = refusal(train, 1, tmp_path / "run", f"dataset.params.val_dir={tmp_path}/val")
    assert f"unreadable image {first}" in message
    assert not (tmp_path / "run").exists()


def test_figures_that_fail_cost_the_report_and_not_the_training(train, tmp_path, monkeypatch):
    def fail(*args):
        raise InputError("features that are NaN")

    monkeypatch.setattr(trainer, "figures_of", fail)
    said = train(1, tmp_path, "phases=[{steps: 1, learning_rate: 1e-3}]")
    assert "warning: evaluation failed: features that are NaN; training continues" in said
    assert (tmp_path / "tokenizer.pth").exists()


def test_metrics_and_rfid_come_from_one_pass_over_the_held_out_images(train, tmp_path, monkeypatch):
    loads, added = [], []
    original = CenterImages.__getitem__
    monkeypatch.setattr(
        CenterImages, "__getitem__", lambda s, i: (loads.append(i), original(s, i))[1]
    )
    monkeypatch.setattr(
        trainer.in_training,
        "Collector",
        lambda *_: SimpleNamespace(add=lambda at, x: added.append((at, x))),
    )
    monkeypatch.setattr(
        trainer.in_training, "open_evaluator", lambda *_: SimpleNamespace(network=None)
    )
    monkeypatch.setattr(trainer.in_training, "metrics_of", lambda *_: {"rFID": 1.0})
    train(1, tmp_path, "phases=[{steps: 1, learning_rate: 1e-3}]")
    assert sorted(loads[:5]) == [0, 1, 2, 3, 4] and len(loads) == 5 + 5  # the others: the preview's
    assert [at for at, _ in added] == [0, 4] and [len(x) for _, x in added] == [4, 1]
    assert all(x.dtype == torch.uint8 for _, x in added)
    (record,) = [r for r in records(tmp_path) if "val/psnr" in r]
    assert record["val/rFID"] == 1.0


def test_dry_run_measures_every_phase_and_writes_nothing(train, tmp_path):
    phases = "phases=[{name: mse, steps: 90, learning_rate: 1e-3}, {name: gan, steps: 40, gan_weight: 1e-3}]"
    said = train(1, tmp_path / "run", phases, "--dry-run")
    for words in ("GiB of host memory", "hours for 90 steps", "hours for 40 steps",
                  "hours for the 130 steps left", "nothing was written"):  # fmt: skip
        assert words in said
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- not finite
def test_step_that_is_not_finite_is_never_saved(train, tmp_path, monkeypatch):
    calls, original = [], trainer.tokenizer_terms

    def poisoned(*args):
        terms = original(*args)
        calls.append(1)
        if len(calls) == 2:
            terms["aux"] = (terms["aux"][0], terms["aux"][1] * float("nan"))
        return terms

    monkeypatch.setattr(trainer, "tokenizer_terms", poisoned)
    message = refusal(train, 1, tmp_path, "experiment.log_every=100", "experiment.save_every=1")
    assert "not finite at step 2: aux, loss" in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


POISONED = """
import os
import torch
from tests.host_syncs import count_in
from train_tokenizer import __main__ as trainer
from runtime.program import run

calls, original = [], trainer.tokenizer_terms

def poisoned(*args):
    terms = original(*args)
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:  # step 2's first micro-batch, of one rank
        terms["mse"] = (1.0, terms["mse"][1] * float("inf"))
    return terms

trainer.tokenizer_terms = poisoned
run(trainer.main)
"""


def test_loss_not_finite_on_one_rank_stops_both_at_that_step(workspace, tmp_path):
    (tmp_path / "poisoned.py").write_text(POISONED)
    done = execute(
        str(tmp_path / "poisoned.py"), f"config={workspace.root}/stage1.yaml",
        f"experiment.output_dir={tmp_path}/run", "experiment.save_every=1",
        f"dataset.params.train_dir={workspace.root}/train", "training.per_gpu_batch_size=1",
        "training.gradient_accumulation_steps=2",
        ranks=2, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "InputError" not in done.stderr  # no traceback of ours
    # The progress bar may share the line.
    said = {line.split("error: ")[1] for line in done.stderr.splitlines() if "error: " in line}
    assert len(said) == 1 and "not finite at step 2: loss, mse" in said.pop()
    assert [r["step"] for r in records(tmp_path / "run")] == [1]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.slow
def test_two_ranks_train_the_adversarial_phase_as_one(workspace, train, tmp_path):
    phases = "phases=[{steps: 1}, {steps: 4, learning_rate: 1e-3, gan_weight: 0.005}]"
    train(1, tmp_path / "one", phases, "training.use_ema=True")
    workspace.stage1(
        tmp_path / "two", phases, "training.per_gpu_batch_size=1", "training.use_ema=True",
        "training.gradient_accumulation_steps=2", ranks=2,
    )  # fmt: skip
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3)
    for r in records(tmp_path / "two"):
        assert "lr" not in r or ("critic" in r) == (r["step"] in (3, 5))
        assert "lr" not in r or ("critic lr" in r) == (r["step"] > 1)


def test_benchmark_reports_every_mode_and_part(monkeypatch, capsys):
    from benchmarks import tokenizer_training as benchmark

    tiny = ["--no-perceptual", "--batch", "2", "--steps", "1", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["tokenizer_training", *tiny])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark.main()
    about, _, _, *rows = capsys.readouterr().out.splitlines()
    assert "batch 2, without ConvNeXt-S" in about and "GFLOP" in about
    assert [row.split(" | ")[0] for row in rows] == ["| exact", "| fast"]
    for row in rows:
        shares = [int(cell.strip(" |").rstrip("%")) for cell in row.split(" | ")[4:]]
        assert len(shares) == len(benchmark.PARTS) and 97 <= sum(shares) <= 103
