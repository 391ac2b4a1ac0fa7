"""The state of a run: what registers with its checkpoint is saved, restored, and compared."""

import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from configs.schema import (
    GeneratorExperiment,
    GeneratorRun,
    Phase,
    TokenizerExperiment,
    TokenizerRun,
    TokenizerTraining,
)
from modeling.weights.runs import find_weights
from modeling.weights.tensors import read_state_dict
from runtime import processes
from tests.refusals import refusal
from training import checkpoint
from training import run as run_module
from training.checkpoint import Checkpoint
from training.optim import EMA
from training.run import Run


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def options_of(path, resume=True):
    experiment = GeneratorExperiment(output_dir=str(path), resume=resume)
    return GeneratorRun(experiment=experiment)


class State(Checkpoint):
    """A checkpoint of one model whose weights tell the step, with an optimizer and an average."""

    def __init__(self, accelerator, path, resume=True, average=False):
        super().__init__(accelerator, options_of(path, resume).experiment)
        self.model = nn.Linear(2, 1)
        self.average = EMA(self.model, 0.5) if average else None
        self.register_model("generator", self.model, average=self.average)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9)
        self.register("optimizer", self.optimizer)

    def train_and_save(self, step):
        nn.init.constant_(self.model.weight, step)
        if self.average is not None:
            self.average.update(self.model)
        self.values["best"] = -step
        self.save(step)

    def weight(self):
        return self.model.weight.mean().item()


@pytest.fixture
def run_dir(accelerator, tmp_path):
    """A run with checkpoints of steps 10 and 20."""
    state = State(accelerator, tmp_path / "run")
    assert state.source is None and state.first_step == 1
    state.open(options_of(tmp_path / "run"))
    state.train_and_save(10)
    state.train_and_save(20)
    return tmp_path / "run"


def test_what_registers_is_restored_at_once(accelerator, run_dir):
    state = State(accelerator, run_dir)
    assert state.source.name == "step-00000020" and state.first_step == 21
    assert state.weight() == 20.0 and state.values == {"best": -20}
    assert state.optimizer.param_groups[0]["momentum"] == 0.9
    assert (run_dir / "config.yaml").exists()


def test_the_file_to_use_is_the_average_and_training_continues_from_the_raw_weights(
    accelerator, run_dir, tmp_path
):
    state = State(accelerator, tmp_path / "new", str(run_dir), average=True)
    # From a run without an average, it starts at the weights.
    assert state.average.model.weight.mean().item() == state.weight() == 20.0
    state.train_and_save(30)
    again = State(accelerator, tmp_path / "new", average=True)
    assert again.weight() == 30.0 and again.average.model.weight.mean().item() == 25.0
    assert again.average.updates == 1
    used = read_state_dict(find_weights(tmp_path / "new", "generator"))["weight"]
    assert torch.equal(used, again.average.model.weight)
    fork = State(accelerator, tmp_path / "fork", str(tmp_path / "new"))  # keeps no average
    assert fork.weight() == 30.0


def test_what_a_checkpoint_lacks_is_refused_unless_it_is_optional(accelerator, run_dir):
    state = State(accelerator, run_dir)
    fresh = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=3.0)
    state.register("another", fresh, optional=True)
    assert fresh.param_groups[0]["lr"] == 3.0
    refusal(lambda: state.register("another", fresh), "step-00000020", "another")


def test_an_optimizer_of_other_parameters_is_refused(accelerator, run_dir):
    state = Checkpoint(accelerator, options_of(run_dir).experiment)
    fresh = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    refusal(lambda: state.register("optimizer", fresh), "step-00000020", "optimizer")


def test_the_command_that_named_a_checkpoint_resumes_what_came_of_it(
    accelerator, run_dir, tmp_path
):
    first = str(run_dir / "checkpoints/step-00000010")
    for output in (tmp_path / "new", run_dir):  # into another folder, and back in the same
        if output == run_dir:  # only where nothing would be lost
            refusal(lambda: State(accelerator, run_dir, first), run_dir, "step-00000020")
            shutil.rmtree(run_dir / "checkpoints/step-00000020")
        state = State(accelerator, output, first)
        assert state.first_step == 11 and state.forks and state.weight() == 10.0
        state.train_and_save(15)
        assert [checkpoint.step_of(p) for p in checkpoint.all_checkpoints(output)][-1] == 15
        for resume in (first, True):
            again = State(accelerator, output, resume)
            assert again.first_step == 16 and not again.forks
        again.train_and_save(25)  # plainly resumed in between, it still knows where it came from
        assert State(accelerator, output, first).first_step == 26


def test_a_folder_of_another_run_is_no_place_to_start_into(accelerator, run_dir, tmp_path):
    State(accelerator, tmp_path / "other").train_and_save(30)
    start = partial(State, accelerator, tmp_path / "other", str(run_dir))
    refusal(start, tmp_path / "other", f"experiment.resume={run_dir}")
    assert len(checkpoint.all_checkpoints(tmp_path / "other")) == 1


def test_a_checkpoint_saved_by_another_run_since_is_not_passed_over(accelerator, run_dir):
    state = State(accelerator, run_dir)
    State(accelerator, run_dir).train_and_save(30)
    refusal(lambda: state.open(options_of(run_dir)), run_dir)


def test_loss_scaling_resumes(accelerator, tmp_path):
    def scaler(scale):
        return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)

    accelerator.scaler = scaler(8.0)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    for value in (1.0, float("inf")):  # one step that counts towards growth, one that backs off
        accelerator.scaler.scale(value * weight.sum()).backward()
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
        optimizer.zero_grad()
    State(accelerator, tmp_path).train_and_save(5)
    saved = accelerator.scaler.state_dict()
    assert saved["scale"] == 4.0

    accelerator.scaler = scaler(1024.0)
    State(accelerator, tmp_path)
    assert accelerator.scaler.state_dict() == saved


def test_a_checkpoint_by_name_of_a_run_without_loss_scaling_starts_it_anew(accelerator, run_dir):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    State(accelerator, run_dir, str(run_dir))
    assert accelerator.scaler.get_scale() == 16.0


# ---------------------------------------------------------------------- the same run
def run_of(accelerator, path, resume=True, *, phases, data=None, seed=0, wandb=False, **more):
    options = TokenizerRun(
        experiment=TokenizerExperiment(output_dir=str(path), resume=resume, **more),
        phases=list(phases),
        training=TokenizerTraining(seed=seed, enable_wandb=wandb),
    )
    return Run(accelerator, options, options.phases, data or {"images": 5}, False)


@pytest.mark.parametrize(
    "fact", ["images", "save_every", "autocast", "training.per_gpu_batch_size"]
)
def test_a_rank_of_other_options_or_data_is_refused(accelerator, tmp_path, monkeypatch, fact):
    """DDP would average gradients of weights that drift apart; other periods, other collectives."""
    monkeypatch.setattr(processes, "on_main", lambda work: {**work(), fact: "other"})
    refusal(lambda: run_of(accelerator, tmp_path, phases=PHASES), f"{fact} (other on the main")


def save_run(run, step):
    run.checkpoint.values["run"] = run.settings(step)
    run.checkpoint.save(step)


PHASES = [Phase("a", 10), Phase("b", 20), Phase("c", 1)]


@pytest.mark.parametrize(
    "now, named",
    [
        ({"seed": 7}, "training.seed (0 there, 7 now)"),
        ({"data": {"images": 6}}, "images (5 there, 6 now)"),
        ({"phases": [Phase("a", 10), Phase("b", 30)]}, "phases[1].steps (20 there, 30 now)"),
        ({"phases": [*PHASES[:2], Phase("c", 9), Phase("d", 9)]}, None),  # these have not begun
    ],
)
def test_a_run_resumes_with_its_settings_and_a_fork_is_told_what_differs(
    accelerator, tmp_path, now, named
):
    save_run(run_of(accelerator, tmp_path / "run", phases=PHASES), 30)
    now = {"phases": PHASES, **now}
    if named is None:
        assert run_of(accelerator, tmp_path / "run", **now).checkpoint.warnings == []
        return
    refusal(lambda: run_of(accelerator, tmp_path / "run", **now), named)
    fork = run_of(accelerator, tmp_path / "new", str(tmp_path / "run"), **now)
    (warning,) = fork.checkpoint.warnings
    assert "with other options" in warning and fork.first_step == 31


@pytest.mark.parametrize("recorded", ["a.pth", None])
def test_a_run_is_resumed_with_the_start_that_it_had_or_none(accelerator, tmp_path, recorded):
    run = run_of(accelerator, tmp_path, phases=PHASES)
    run.checkpoint.values["init_weights"] = recorded
    save_run(run, 1)
    for same in (None, recorded, recorded and f"x/../{recorded}/"):
        found = run_of(accelerator, tmp_path, phases=PHASES, init_weights=same)
        assert found.experiment.init_weights == recorded
    began = f"experiment.init_weights={recorded or 'null'}, not b.pth"
    refusal(partial(run_of, accelerator, tmp_path, phases=PHASES, init_weights="b.pth"), began)


def test_ranks_of_other_precision_are_compared(accelerator, tmp_path, monkeypatch):
    """Also two GPUs of one machine, whose first one all ranks have asked."""
    seen = []
    monkeypatch.setattr(run_module, "check_same", lambda facts, what: seen.append(facts))
    run = run_of(accelerator, tmp_path, phases=PHASES)
    monkeypatch.setattr(run_module, "has_bfloat16", lambda device: False)
    gpu = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16", num_processes=1)
    monkeypatch.setattr(run, "accelerator", gpu)
    run._check_ranks()
    here, there = ({"autocast": f["autocast"], "bf16": f["GPU computes in bf16"]} for f in seen)
    assert here == {"autocast": "no", "bf16": True} and there == {"autocast": "bf16", "bf16": False}


def test_a_fork_without_steps_left_is_refused(accelerator, tmp_path):
    save_run(run_of(accelerator, tmp_path / "run", phases=PHASES), 31)
    assert run_of(accelerator, tmp_path / "run", phases=PHASES).first_step == 32  # exports again
    fork = partial(run_of, accelerator, tmp_path / "new", str(tmp_path / "run"))
    refusal(lambda: fork(phases=PHASES).start([], 0, 0), "step 31 of 31", "init_weights")
    longer = fork(phases=[*PHASES, Phase("d", 5)])
    # Not another run, though named.
    own = run_of(accelerator, tmp_path / "run", str(tmp_path / "run"), phases=PHASES)
    for run in (longer, own):  # refused later: there are no images
        assert "no step is left" not in refusal(partial(run.start, [], 0, 0))


def test_checkpoints_on_another_disk_are_the_runs_own(accelerator, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    save_run(run_of(accelerator, run, phases=PHASES), 10)
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    resumed = run_of(accelerator, run, phases=PHASES)
    assert resumed.first_step == 11 and not resumed.checkpoint.forks


def test_a_fork_of_a_run_that_once_named_itself_is_a_fork(accelerator, tmp_path):
    run = tmp_path / "run"
    save_run(run_of(accelerator, run, phases=PHASES), 10)
    save_run(run_of(accelerator, run, str(run), phases=PHASES), 20)
    assert not run_of(accelerator, run, str(run), phases=PHASES).checkpoint.forks  # it resumes
    assert run_of(accelerator, tmp_path / "new", str(run), phases=PHASES).checkpoint.forks


def test_all_starts_of_a_run_have_one_page_at_wandb_and_a_fork_has_its_own(accelerator, tmp_path):
    def page(name, resume=True):
        run = run_of(accelerator, tmp_path / name, resume, phases=PHASES, wandb=True)
        if not run.resumed:
            save_run(run, 1)
        return run.checkpoint.values["wandb"]

    first = page("run")
    assert page("run") == first != page("other")
    assert page("fork", str(tmp_path / "run")) != first
    assert page("run", str(tmp_path / "run/checkpoints/step-00000001")) != first  # it goes back


def test_another_precision_of_the_device_is_warned_of(accelerator, tmp_path):
    run = run_of(accelerator, tmp_path, phases=PHASES)
    run.checkpoint.values["autocast"] = "bf16"
    save_run(run, 1)
    (warning,) = run_of(accelerator, tmp_path, phases=PHASES).checkpoint.warnings
    assert "was trained with autocast bf16" in warning


@pytest.mark.parametrize(
    "autocast, asked, words",
    [
        ("fp16", "auto", "autocast fp16 (this GPU does not compute in bf16)"),
        ("fp16", "fp16", "autocast fp16"),
        ("bf16", "auto", "autocast bf16"),
    ],
)
def test_the_header_says_why_a_gpu_before_ampere_trains_in_fp16(
    accelerator, tmp_path, autocast, asked, words
):
    run, said = run_of(accelerator, tmp_path, phases=PHASES), []
    run.training = replace(run.training, mixed_precision=asked)
    run.log = SimpleNamespace(say=said.append)
    facts = {"num_processes": 1, "is_fsdp2": False, "device": torch.device("cpu")}
    run.accelerator = SimpleNamespace(**facts, mixed_precision=autocast)
    run.describe(nn.Linear(2, 1), compiled=False, images=5)
    assert said[0].endswith(words)


def test_norms_of_both_models_of_alternating_steps_are_logged(accelerator, tmp_path):
    run = run_of(accelerator, tmp_path, phases=PHASES)
    run.experiment = replace(run.experiment, log_grad_norm_every=4)
    run.guard = SimpleNamespace(watch=lambda *_: None)
    prepared = SimpleNamespace(optimizer=None)
    for step in range(1, 5):
        model = "" if step % 2 else "critic "
        run.watch(step, torch.tensor(float(step)), prepared, model, alternates=True)
    assert run.window.sums == {"grad_norm": 3.0, "critic grad_norm": 4.0}
    assert run._terms() == {}


@pytest.mark.parametrize("step, names", [(0, ""), (1, "a"), (10, "a"), (11, "ab"), (30, "ab")])
def test_settings_hold_the_phases_that_have_begun(accelerator, tmp_path, step, names):
    settings = run_of(accelerator, tmp_path, phases=PHASES).settings(step)
    assert "".join(settings.get(f"phases[{i}].name", "") for i in range(3)) == names
