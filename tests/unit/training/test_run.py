import re

import pytest
import torch
from accelerate import Accelerator

from configs.schema import GeneratorRun
from runtime.errors import InputError
from training import checkpoint
from training.run import RunFolder

RUN = {"lr": 1.0}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def folder_of(accelerator, path, resume=True):
    options = GeneratorRun()
    options.experiment.output_dir, options.experiment.resume = str(path), resume
    folder = RunFolder(accelerator, options.experiment)
    folder.options = options
    return folder


def save(folder, step):
    folder.save(step, {"generator": {"w": torch.full((2,), float(step))}}, {"run": RUN})


@pytest.fixture
def run_dir(accelerator, tmp_path):
    """A run with checkpoints of steps 10 and 20."""
    folder = folder_of(accelerator, tmp_path / "run")
    assert folder.source is None and folder.first_step == 1
    folder.open(folder.options)
    save(folder, 10)
    save(folder, 20)
    return tmp_path / "run"


def test_it_goes_on_after_the_newest(accelerator, run_dir):
    folder = folder_of(accelerator, run_dir)
    assert folder.source.name == "step-00000020" and folder.first_step == 21
    assert folder.state(RUN, ()) == {"run": RUN}
    assert torch.equal(folder.weights("generator")["w"], torch.full((2,), 20.0))
    assert (run_dir / "config.yaml").exists()


def test_other_options_are_refused(accelerator, run_dir):
    with pytest.raises(InputError, match=r"lr \(1\.0 there, 2\.0 now\)"):
        folder_of(accelerator, run_dir).state({"lr": 2.0}, ())


def test_a_checkpoint_given_by_name_may_differ_and_is_said(accelerator, run_dir, tmp_path):
    folder = folder_of(accelerator, tmp_path / "new", str(run_dir))
    folder.state({"lr": 2.0}, ())
    assert any("lr (1.0 there, 2.0 now)" in line for line in folder.warnings)


def test_the_command_that_named_a_checkpoint_goes_on_with_what_came_of_it(
    accelerator, run_dir, tmp_path
):
    first = str(run_dir / "checkpoints/step-00000010")
    for output in (tmp_path / "new", run_dir):  # into another folder, and back in the same
        folder = folder_of(accelerator, output, first)
        assert folder.first_step == 11 and folder.forks
        save(folder, 15)
        assert [checkpoint.step_of(p) for p in checkpoint.all_checkpoints(output)][-1] == 15
        for resume in (first, True):
            again = folder_of(accelerator, output, resume)
            assert again.first_step == 16 and not again.forks
            with pytest.raises(InputError, match="lr"):
                again.state({"lr": 2.0}, ())
        save(again, 25)  # plainly resumed in between, it still knows where it came from
        assert folder_of(accelerator, output, first).first_step == 26


def test_a_folder_of_another_run_is_no_place_to_start_into(accelerator, run_dir, tmp_path):
    other = folder_of(accelerator, tmp_path / "other")
    save(other, 30)
    with pytest.raises(InputError, match=r"did not come from experiment\.resume"):
        folder_of(accelerator, tmp_path / "other", str(run_dir))
    assert len(checkpoint.all_checkpoints(tmp_path / "other")) == 1


def test_a_checkpoint_saved_by_another_run_since_is_not_passed_over(accelerator, run_dir):
    folder = folder_of(accelerator, run_dir)
    save(folder_of(accelerator, run_dir), 30)
    with pytest.raises(InputError, match="another run has just saved"):
        folder.open(folder.options)


def test_a_checkpoint_of_an_earlier_version_is_named(accelerator, tmp_path):
    folder = folder_of(accelerator, tmp_path)
    folder.save(5, {"generator": {"w": torch.zeros(1)}}, {"step": 5})
    with pytest.raises(InputError, match=r"step-00000005 is of an earlier version"):
        folder_of(accelerator, tmp_path).state(RUN, ())


def test_options_that_an_earlier_version_did_not_have_count_as_its_behaviour(accelerator, tmp_path):
    folder = folder_of(accelerator, tmp_path)
    earlier = {"phases[0].steps": 5}
    folder.save(5, {"generator": {"w": torch.zeros(1)}}, {"run": earlier})
    as_before = {
        **earlier,
        "training.numerics": "auto",
        "training.ema_warmup": False,
        "phases[0].critic_after": 1,
    }
    folder_of(accelerator, tmp_path).state(as_before, ())
    for name, value in (("training.numerics", "published"), ("phases[0].critic_after", 2)):
        with pytest.raises(InputError, match=re.escape(name)):
            folder_of(accelerator, tmp_path).state({**as_before, name: value}, ())


def test_loss_scaling_goes_on(accelerator, tmp_path):
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
    folder = folder_of(accelerator, tmp_path)
    save(folder, 5)
    saved = accelerator.scaler.state_dict()
    assert saved["scale"] == 4.0

    accelerator.scaler = scaler(1024.0)
    folder_of(accelerator, tmp_path).state(RUN, ())
    assert accelerator.scaler.state_dict() == saved


def test_a_checkpoint_by_name_of_a_run_without_loss_scaling_starts_it_anew(accelerator, run_dir):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    folder_of(accelerator, run_dir, str(run_dir)).state(RUN, ())
    assert accelerator.scaler.get_scale() == 16.0
