"""Signals, dead ranks, other ranks, full disks and closed folders, through the real programs."""

import fcntl
import shutil
import signal

import psutil
import pytest

from runtime.signals import SAVED_AND_STOPPED
from tests.integration.test_kills import first_steps, logged, same_run, trainer, wait_for
from training import checkpoint

TRAINERS = ["stage1", "generator"]


def steps(run):
    return [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(run)]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------- signals and locks
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, number",
    [("stage1", signal.SIGUSR1), ("generator", signal.SIGINT), ("generator", signal.SIGHUP)],
)
def test_asked_by_a_signal_it_saves_the_step_and_meanwhile_keeps_others_out(
    workspace, warm, tmp_path, name, number
):
    program, options = trainer(workspace, name, steps=100_000)
    options += ["experiment.log_every=1", "experiment.save_every=0"]
    options += [f"experiment.output_dir={tmp_path}/run"]
    run = warm.start(program, *options)
    assert wait_for(lambda: len(logged(tmp_path / "run")) >= 5, run), run.output()
    assert f"{tmp_path}/run is in use by another run" in warm.refused(program, *options)
    run.signal(number, group=True)
    assert run.end() == SAVED_AND_STOPPED and "asked to stop: saved step" in run.output()
    assert steps(tmp_path / "run") == [logged(tmp_path / "run")[-1]["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretokenization.py", "sample_imagenet.py"])
def test_other_programs_too_keep_a_folder_to_themselves(workspace, warm, tmp_path, program):
    options, folder, _ = writer(workspace, program, tmp_path)
    folder.mkdir()
    with open(folder / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # as a run of the program holds it
        assert f"{folder} is in use by another run" in warm.refused(program, *options)
    warm.ok(program, *options)


# ---------------------------------------------------------------------- ranks
def launched(workspace, warm, folder, *options, restarts=0, until=5):
    """torchrun with two ranks, in the background, having logged step `until`."""
    program, given = trainer(workspace, "generator", ranks=2, workers=2, steps=3000)
    run = warm.start(
        "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        f"--max-restarts={restarts}", program, *given, "experiment.log_every=1",
        f"experiment.output_dir={folder}", *options,
        # Without, ranks that start again may look for dead ones (docs/clusters.md).
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    assert wait_for(
        lambda: any(record["step"] >= until for record in logged(folder)), run, seconds=120
    ), run.output()[-3000:]
    return run


def kill_rank(run, number):
    psutil.Process(run.pids[0]).children()[number].kill()


@pytest.mark.slow
def test_death_of_a_rank_ends_the_job_and_the_same_command_goes_on_until_its_signal(
    workspace, warm, tmp_path
):
    folder = tmp_path / "run"
    run = launched(workspace, warm, folder, "experiment.save_every=2")
    kill_rank(run, 1)
    assert run.end(within=60) != 0
    assert "forcefully exiting" not in run.output()  # torchrun did not have to kill it
    last = logged(folder)[-1]["step"]
    assert last - steps(folder)[-1] <= 2  # steps that are made again
    run = launched(workspace, warm, folder, "experiment.save_every=2", until=last + 3)
    run.signal(signal.SIGTERM)  # torchrun passes it on, and all ranks save one step
    assert run.end(within=60) != 0
    assert first_steps(run.output())[0] > last - 2
    saved = checkpoint.all_checkpoints(folder)[-1]
    assert f"asked to stop: saved step {checkpoint.step_of(saved)}" in run.output()
    assert checkpoint.step_of(saved) == logged(folder)[-1]["step"] > last
    assert checkpoint.damage(saved) is None


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_after_a_death_and_the_result_is_the_same(
    workspace, warm, tmp_path
):
    options = ["experiment.save_every=10", "training.max_train_steps=150"]
    program, given = trainer(workspace, "generator", ranks=2, workers=2)
    whole = [*given, *options, "experiment.log_every=1", f"experiment.output_dir={tmp_path}/whole"]
    warm.ok(program, *whole, ranks=2)
    run = launched(workspace, warm, tmp_path / "run", *options, restarts=1, until=25)
    assert steps(tmp_path / "run")[-1] >= 10
    kill_rank(run, 0)
    assert run.end(within=120) == 0, run.output()[-3000:]
    first, second = first_steps(run.output())
    assert first == 1 and second > 10
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", TRAINERS)
def test_on_other_ranks_it_goes_on_with_the_same_data_and_loss(
    workspace, warm, tmp_path, name, before, after
):
    # Without dropout, whose draws are each rank's own.
    dry = [f"model.generator.{d}=0" for d in ("dropout", "attn_drop", "tok_dropout")]
    dry = dry if name == "generator" else []
    options = {ranks: trainer(workspace, name, ranks)[1] + dry for ranks in (1, 2)}
    program, run = trainer(workspace, name)[0], tmp_path / "run"
    common = ["experiment.log_every=1", "experiment.save_every=10", "experiment.keep_every=10"]
    common += [f"experiment.output_dir={run}"]
    warm.ok(program, *options[before], *common, ranks=before)
    (expected,) = [record for record in logged(run) if record["step"] == 31]
    shutil.rmtree(run / "checkpoints/step-00000040")
    warm.ok(program, *options[after], *common, ranks=after)
    (found,) = [record for record in logged(run) if record["step"] == 31]
    assert found == pytest.approx(expected, rel=1e-5) and "loss" in found


# ---------------------------------------------------------------------- disks
def writer(workspace, program, folder):
    """(options, the folder that is worked in, files of the finished result) of a program that
    writes in parts."""
    if program == "pretokenization.py":
        options = [
            "--config", workspace.root / "generator.yaml", "--img_size", 16, "--batch_size", 1,
            "--data_path", workspace.root / "train", "--cached_path", folder / "out",
            "--tokenizer_checkpoint", workspace.tokenizer, "--num_workers", 0,
        ]  # fmt: skip
        return options, folder / "out.partial", lambda: files(folder / "out")
    options = [
        f"config={workspace.root}/generator.yaml", f"experiment.output_dir={folder}/out",
        f"experiment.generator_checkpoint={workspace.generator}",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}", "experiment.num_fid_samples=8",
    ]  # fmt: skip
    return options, folder / "out", lambda: (folder / "out.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_disk_that_fills_in_a_save_is_one_line_and_costs_nothing(workspace, warm, tmp_path, name):
    program, options = trainer(workspace, name)
    options += ["experiment.log_every=1", "experiment.save_every=10", "experiment.keep_every=10"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    warm.ok(program, *options, f"experiment.output_dir={whole}")
    shutil.copytree(whole, run)
    for step in (20, 30, 40):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    kept = files(run / "checkpoints")
    # The largest file of the next checkpoint does not fit, its smaller ones do.
    next_one = whole / "checkpoints/step-00000020"
    largest = max(file.stat().st_size for file in next_one.iterdir())
    line = warm.refused(
        program, *options, f"experiment.output_dir={run}", largest_file=largest - 1000
    )
    assert f"cannot write {run}/checkpoints/step-00000020" in line and "free some space" in line
    assert files(run / "checkpoints") == kept and steps(run) == [10]
    warm.ok(program, *options, f"experiment.output_dir={run}")
    same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_closed_folder_is_one_line_and_the_last_checkpoint_stays(workspace, warm, tmp_path, name):
    program, options = trainer(workspace, name)
    options += ["experiment.save_every=10", "experiment.keep_every=10"]
    (tmp_path / "closed").mkdir(mode=0o555)
    line = warm.refused(
        program, *options, f"experiment.output_dir={tmp_path}/closed/run", obedient=True
    )
    assert f"cannot write {tmp_path}/closed/run (Permission denied)" in line
    run = tmp_path / "run"
    warm.ok(program, *options, f"experiment.output_dir={run}")
    shutil.rmtree(run / "checkpoints/step-00000040")
    before = files(run / "checkpoints")
    (run / "checkpoints").chmod(0o555)
    line = warm.refused(program, *options, f"experiment.output_dir={run}", obedient=True)
    assert f"cannot write {run}/checkpoints/step-00000040.partial (Permission denied)" in line
    assert files(run / "checkpoints") == before and steps(run) == [10, 20, 30]
    assert checkpoint.choose(run, True) == (run / "checkpoints/step-00000030", [])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretokenization.py", "sample_imagenet.py"])
def test_other_programs_too_say_that_a_folder_is_closed(workspace, warm, tmp_path, program):
    (tmp_path / "closed").mkdir(mode=0o555)
    options, folder, _ = writer(workspace, program, tmp_path / "closed")
    line = warm.refused(program, *options, obedient=True)
    assert f"cannot write {folder}" in line and "Permission denied" in line
    assert not list((tmp_path / "closed").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretokenization.py", "sample_imagenet.py"])
def test_killed_before_any_sync_rename_or_removal_the_result_is_the_same(
    workspace, warm, tmp_path, program
):
    options, _, result = writer(workspace, program, tmp_path / "whole")
    warm.ok(program, *options)
    expected = result()
    for call in range(1, 100):
        options, _, result = writer(workspace, program, tmp_path / str(call))
        status = warm.start(program, *options, die_before=call).end()
        warm.ok(program, *options)
        assert result() == expected
        assert not list((tmp_path / str(call)).rglob("*.partial"))
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert call > 6
