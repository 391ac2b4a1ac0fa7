import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from configs.schema import Experiment
from training.log import RunLog, Window, due


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def open_log(accelerator, tmp_path):
    opened = []

    def start(first_step=1):
        log = RunLog(accelerator, Experiment(output_dir=str(tmp_path)), {}, first_step, 100)
        opened.append(log)
        return log

    yield start
    for log in opened:
        log.file.close()
        log.close()


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- metrics.jsonl
def test_metrics_are_one_record_a_call_and_on_disk_at_once(open_log, tmp_path):
    log = open_log()
    log.metrics(1, {"loss": 2.5, "lr": 1e-4})
    log.metrics(1, {"val/loss": 3.0})
    assert records(tmp_path) == [
        {"step": 1, "loss": 2.5, "lr": 1e-4},
        {"step": 1, "val/loss": 3.0},
    ]


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_saving_when_it_is_asked_to_stop(
    open_log, tmp_path, monkeypatch
):
    """Ctrl-C in `… | tee log` ends tee too."""
    log = open_log()

    def gone(text):
        raise BrokenPipeError

    monkeypatch.setattr("training.log.tqdm.write", gone)
    with pytest.raises(BrokenPipeError):
        log.say("a line")
    log.asked_to_stop = lambda: True
    log.metrics(1, {"loss": 2.0})
    assert records(tmp_path) == [{"step": 1, "loss": 2.0}]


def write_steps(log, steps):
    for step in steps:
        log.metrics(step, {"loss": float(step)})


def test_records_that_a_resumed_run_makes_again_are_dropped(open_log, tmp_path):
    write_steps(open_log(), range(1, 9))
    resumed = open_log(first_step=5)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]
    write_steps(resumed, [5])
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]


def test_records_before_the_resumed_step_are_untouched(open_log, tmp_path):
    write_steps(open_log(), range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    open_log(first_step=5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_record_that_lost_its_newline_ends_its_line_all_the_same(open_log, tmp_path):
    write_steps(open_log(), range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(open_log(first_step=4), [4])
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]


def test_the_lowest_value_is_that_since_a_step(open_log):
    log = open_log()
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
        log.metrics(step, {"val/loss": loss})
    assert [log.lowest("val/loss", since) for since in (1, 2, 4)] == [1.0, 2.0, float("inf")]


def test_a_record_cut_short_by_a_kill_is_dropped(open_log, tmp_path):
    write_steps(open_log(), range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    open_log(first_step=4)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]


# ---------------------------------------------------------------------- previews
def test_images_become_one_png_of_the_right_size(open_log, tmp_path):
    open_log().images(12, "samples", torch.rand(7, 3, 8, 10), per_row=4)
    picture = Image.open(tmp_path / "previews" / "samples-00000012.png")
    # Four to a row, so two rows; two pixels of margin around each.
    assert picture.size == (4 * 12 + 2, 2 * 10 + 2) and picture.mode == "RGB"


def test_images_stand_in_reading_order_with_their_colours(open_log, tmp_path):
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    images = colours[:, :, None, None].expand(3, 3, 8, 10)
    open_log().images(1, "samples", images, per_row=2)
    picture = np.asarray(Image.open(tmp_path / "previews" / "samples-00000001.png"))
    centres = [picture[6, 7], picture[6, 19], picture[16, 7]]
    assert (np.stack(centres) == colours.numpy() * 255).all()


def test_values_beyond_the_unit_interval_are_clamped(open_log, tmp_path):
    images = torch.stack([torch.full((3, 8, 8), -0.5), torch.full((3, 8, 8), 1.5)])
    open_log().images(1, "samples", images, per_row=2)
    picture = np.asarray(Image.open(tmp_path / "previews" / "samples-00000001.png"))
    assert (picture[6, 6] == 0).all() and (picture[6, 16] == 255).all()


# ---------------------------------------------------------------------- windows
def test_window_gives_the_mean_of_what_was_added(accelerator):
    window = Window(accelerator)
    for loss in (1.0, 2.0, 6.0):
        window.add(loss=torch.tensor(loss), accuracy=torch.tensor(0.5))
    values = window.close()
    assert values["loss"] == 3.0 and values["accuracy"] == 0.5


def test_window_divides_by_the_steps_that_had_the_value(accelerator):
    window = Window(accelerator)
    for loss in (1.0, 3.0):
        window.add(loss=torch.tensor(loss))
    window.add(grad_norm=torch.tensor(4.0))
    values = window.close()
    assert values["loss"] == 2.0 and values["grad_norm"] == 4.0


def test_window_starts_anew_once_closed(accelerator):
    window = Window(accelerator)
    window.add(loss=torch.tensor(1.0))
    window.images += 1000
    window.close()
    window.add(loss=torch.tensor(5.0))
    values = window.close()
    assert values["loss"] == 5.0 and values["images/s"] == 0


def test_window_keeps_no_graph(accelerator):
    window = Window(accelerator)
    window.add(loss=torch.ones((), requires_grad=True) * 2)
    assert not window.sums["loss"].requires_grad


def test_window_goes_on_from_its_state_bit_by_bit(accelerator):
    values = torch.rand(7)
    whole, first, second = Window(accelerator), Window(accelerator), Window(accelerator)
    for value in values:
        whole.add(loss=value)
    for value in values[:3]:
        first.add(loss=value)
    second.load_state_dict(first.state_dict())
    for value in values[3:]:
        second.add(loss=value)
    assert second.close()["loss"] == whole.close()["loss"]


def test_window_of_two_ranks_goes_on_with_their_mean_on_one(accelerator):
    state = {"names": ["loss"], "sums": torch.tensor([[2.0], [6.0]]), "counts": {"loss": 2}}
    window = Window(accelerator)
    window.load_state_dict(state)
    assert window.close()["loss"] == 2.0


def test_empty_window_has_an_empty_state(accelerator):
    window = Window(accelerator)
    window.load_state_dict(window.state_dict())
    assert window.state_dict() == {} and window.sums == {}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_window_gives_rate_and_share_of_waiting(accelerator, clock):
    window = Window(accelerator)
    clock[0] += 4
    window.waited += 1
    window.images += 20
    window.add(loss=torch.tensor(1.0))
    values = window.close()
    assert values["images/s"] == 5.0 and values["data wait"] == 0.25


def test_paused_time_does_not_count(accelerator, clock):
    window = Window(accelerator)
    clock[0] += 4
    with window.paused():
        clock[0] += 100
    window.images += 20
    window.add(loss=torch.tensor(1.0))
    assert window.close()["images/s"] == 5.0


@pytest.mark.parametrize(
    "step, every, expected", [(10, 5, True), (11, 5, False), (5, 10, False), (10, 0, False)]
)
def test_due(step, every, expected):
    assert due(step, every) is expected


# ---------------------------------------------------------------------- restarts
def test_a_record_of_the_last_step_before_is_not_repeated(open_log, tmp_path):
    write_steps(open_log(), range(1, 5))
    resumed = open_log(first_step=5)
    resumed.metrics(4, {"loss": 4.0})
    resumed.metrics(4, {"val/loss": 1.0})  # of the same step, but another record
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 4]


def test_a_run_goes_on_at_its_page_of_wandb(accelerator, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(accelerator, "log_with", ["wandb"])
    monkeypatch.setattr(
        accelerator, "init_trackers", lambda *_, init_kwargs, **__: starts.append(init_kwargs)
    )
    log = RunLog(accelerator, Experiment(output_dir=str(tmp_path)), {}, 1, 9, "ab12")
    log.file.close(), log.bar.close()
    assert starts[0]["wandb"]["id"] == "ab12" and starts[0]["wandb"]["resume"] == "allow"


@pytest.mark.parametrize("broken", ["log", "log_images", "finish"])
def test_a_failure_of_wandb_is_a_warning_and_only_its_end_is_sent_after_it(
    accelerator, tmp_path, capsys, monkeypatch, broken
):
    sent = []

    def send(name):
        def call(*arguments, **options):
            sent.append(name)
            if name == broken:
                raise BrokenPipeError("wandb is gone")

        return call

    tracker = SimpleNamespace(name="wandb", log_images=send("log_images"), finish=send("finish"))
    monkeypatch.setattr(accelerator, "log", send("log"))
    monkeypatch.setattr(accelerator, "trackers", [tracker])
    log = RunLog(accelerator, Experiment(output_dir=str(tmp_path)), {}, 1, 100)
    log.metrics(1, {"loss": 2.0})
    log.images(1, "samples", torch.rand(4, 3, 8, 8), 2)
    log.metrics(2, {"loss": 1.0})
    log.close()
    calls = ["log", "log_images", "log", "finish"]
    before = calls[: calls.index(broken) + 1]
    assert sent == (before if broken == "finish" else [*before, "finish"])
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
    said = capsys.readouterr().out
    assert said.count("warning: wandb failed (BrokenPipeError('wandb is gone'))") == 1


def test_without_writing_it_only_prints(accelerator, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerator, "log_with", ["wandb"])
    monkeypatch.setattr(accelerator, "init_trackers", lambda *_, **__: pytest.fail("wandb"))
    log = RunLog(accelerator, Experiment(output_dir=str(tmp_path / "run")), {}, 1, 9, write=False)
    log.metrics(1, {"loss": 1.0})
    log.images(1, "samples", torch.rand(2, 3, 4, 4), 2)
    log.close()
    assert "step 1 loss 1" in capsys.readouterr().out and not list(tmp_path.iterdir())
