"""The run of all GPU figures: its steps, what it reads from their outputs, where it writes them."""

import io
import json
import time

import pytest

from benchmarks import h100
from benchmarks.tables import fill
from tests.integration.conftest import server

SAMPLING = "\n".join(
    f"  ours   batch {batch}, compiled, captured, fused attention, {streams} streams: "
    f"{rate}.500 images/s; codes 350.000/s\n"
    f"  roofline batch {batch}, {streams} streams: 480.000 images/s (codes 509.0/s): ours reaches "
    f"{share}% of it"
    for batch, streams, rate, share in ((256, 1, 301, 63), (256, 2, 302, 64), (512, 1, 351, 73))
)
TABLE = "\n".join(
    f"| {mode} | 100.0 | 1.00× | 35.0% | 1% | 2% | 3% | 4% | 5% | 6% |"
    for mode in ("exact", "fast, compiled")
)
# One line or table of each program's output, as it prints on CUDA.
OUTPUTS = {
    "rates": "copy 2900 GB/s, product 710.25 TFLOP/s",
    "tests": "12 passed, 3 skipped, 900 deselected in 61.20s",
    "attention": "\n".join(
        f"head size {h}, {cache} cache: rows 512, largest difference 0.0031; GB/s at 16 64 137 272: "
        f"1 warps 900 1900 2300 2400, 4 warps 500 900 1900 2100{plain}; copy 2900"
        for h in (48, 64, 80)
        for cache, plain in (("bf16", "; PyTorch at 272 900"), ("int8", ""))
    ),
    "sampling, the plain way": "  ratio  15.10 (rounds 14.90 … 15.20), codes alone 16.00",
    "sampling": SAMPLING,
    "training, the plain way": "b batch 128 plain: 400.1 images/s, MFU 15.0%, 60.1 GiB\n"
    "b: ours is 2.75 x as fast (median of 3)",
    "training": "\n".join(
        f"b batch {batch} ours: 1100.2 images/s, MFU 41.2%, 40.2 GiB\n"
        "b: 500000 steps on 16 such GPUs, if they scale without loss: 16 h, 259 GPU-hours, 646 USD"
        for batch in (32, 64, 128)
    ),
    "tokenizer, fast": "fast: the discriminator on 48 images and as many reconstructions, forward and "
    "backward: eager 90.1 ms, compiled 50.2 ms",
    "tokenizer": TABLE,
    "pretokenization": "2 views, fp32, 12 layers: published forward 40.000 images/s, ours 44.000, ratio "
    "1.100 (1.000 … 1.200), 100.00% of codes equal\n"
    + "\n".join(
        f"  {name}: encoder alone 90.00 images/s (1.00 x fp32), end to end 85.00 images/s, ratio 0.94"
        for name in ("fp32", "tf32", "bf16")
    ),
    "evaluation": """
features from .npz: 1500.00 images/s
share of the network's own rate: 95.0%
precision and recall, 5000 x 5000: 1.0 s, 900 MB more
Fréchet distance of 2048 features: 2.0 s
""",
    "DINOv2": """
features from .npz: 700.00 images/s
share of the network's own rate: 97.0%
""",
    "loss of a generator": "b, batch 64: forward 600000 codes/s, score 570000 codes/s, share 95.0%",
}


def output_of(step):
    return next(text for name, text in OUTPUTS.items() if step.name.startswith(name))


@pytest.fixture
def readme(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(h100.README.read_text())
    return copy


def test_the_most_telling_steps_fit_into_nine_minutes():
    names = [step.name for step in h100.steps()]
    telling = h100.steps()[: names.index("sampling, the plain way")]
    assert sum(step.limit for step in telling) <= 540
    assert names[2:5] == ["attention", "sampling B", "training B"] and "sampling XL" in names


def test_a_whole_run_leaves_no_cell_that_needs_a_gpu_empty(readme):
    fill(readme, [("## CUDA device", "device", 1, "a GPU")])
    for step in h100.steps():
        assert fill(readme, step.read(output_of(step))) == []
    empty = [
        line
        for line in readme.read_text().splitlines()
        if line.startswith("|") and any(not c.strip() for c in line.strip("|").split("|"))
    ]
    # Without a meaning: headings, and goals and figures that do not apply to a row.
    assert [line.split("|")[1].strip() for line in empty] == [
        "",  # the head of the device's table
        "",  # the head of the discriminator's
        "",  # the head of the token stores' table
        "images/s written",  # has no goal
        "random samples/s",
        "packed / npz, the same samples in turn",
        "open",
        "open at 1,281,167 images (sparse files) and read one",
        "tf32",  # has no goal
        "H100",  # has no goal there
        "small, 64",  # a CPU has no MFU here, nor GPU memory
        *("B, 128, cuDNN's attention first", "B, 128, larger fusions"),  # not compared with plain
        *("L, 64", "L, 128", "XL, 32", "XL, 64"),  # the plain way trains B alone
        "against the plain way, batch 256 (goal 10×)",  # as it samples B alone
        "images/s, batch 256 in two streams",  # of B alone
        "images/s, batch 512, dependent launch",  # of B alone
        *("48, int8", "64, int8", "80, int8"),  # PyTorch attends to no int8 cache
        "plain: cache grown by concatenation",  # the first line brought nothing
        "",  # the head of evaluation's table
        "50,000 images, from that rate",  # not said of a CPU
        "50,000 images, from DINOv2's rate",
    ]


def test_figures_are_in_the_cells_that_their_words_name(readme):
    for step in h100.steps():
        fill(readme, step.read(output_of(step)))
    text = readme.read_text()
    assert "| of the roofline, batch 256 | 63% | 63% | 63% |" in text
    assert "| of the roofline, batch 512 (goal 75 %) | 73% | 73% | 73% |" in text
    assert "| images/s, batch 256 in two streams | 302.500 | | |" in text
    assert "| against the plain way, batch 256 (goal 10×) | 15.10× | | |" in text
    assert "| 400.1 | 1100.2 | 2.75 | 41.2% | 40.2 GiB |" in text
    assert "| product of 8,192² in bf16, TFLOP/s | 710.25 |" in text
    assert "| H100 | 90.1 | 50.2 |" in text
    assert "| B, 500,000 steps × 2048 | 16 | 16 | 259 | 646 USD |" in text
    assert "| 48, bf16 | 0.0031 | 900 1900 2300 2400 | 500 900 1900 2100 | 900 | 2900 |" in text
    assert "| 50,000 images, from that rate | | 33 s |" in text
    assert "| 50,000 images, from DINOv2's rate | | 71 s |" in text
    assert "| loss of a generator, codes/s | 15,909 (small model, batch 64) | 570000 |" in text
    assert "| H100 | 40.000 | 44.000 | 1.100 | |" in text
    assert "| pytest of the kernels and of parity | 12 passed, 3 skipped, 900 deselected |" in text


def test_what_a_cut_step_did_not_print_leaves_its_cells_and_is_named(readme):
    before = readme.read_text()
    for step in h100.steps():
        assert len(fill(readme, step.read(""))) == len(step.read(output_of(step)))
    assert readme.read_text() == before


def test_unknown_cell_is_an_error(readme):
    with pytest.raises(LookupError, match="no row 'M'"):
        fill(readme, [("## Sampling", "M", 1, "1")])
    with pytest.raises(LookupError, match="no column 9"):
        fill(readme, [("## Sampling", "images/s, batch 256", 9, "1")])


def test_step_over_its_limit_is_ended_with_what_it_started_and_its_output_counts(capfd):
    code = (
        "import subprocess, sys, time; print('measured', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    began = time.monotonic()
    output, state = h100.run(["-c", code], 3, io.StringIO())
    assert time.monotonic() - began < 30
    assert output == "measured\n" and state == "cut after 3 s"
    assert "measured" in capfd.readouterr().out


def test_failed_step_says_so(capfd):
    assert h100.run(["-c", "raise SystemExit(3)"], 60, io.StringIO())[1] == "exit 3"


@pytest.mark.skipif(h100.torch.cuda.is_available(), reason="there is CUDA")
def test_without_a_gpu_it_stops_in_one_line_and_the_readme_stays(monkeypatch, capsys):
    before = h100.README.read_text()
    monkeypatch.setattr("sys.argv", ["h100"])
    assert h100.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--tiny" in error
    assert h100.README.read_text() == before


def test_what_a_cpu_does_not_print_is_not_measured(readme):
    training = next(step for step in h100.steps() if step.name == "training B")
    output = "b batch 128 plain: 40.0 images/s\nb batch 128 ours: 41.0 images/s\n"
    assert "B, 128, column 5" in fill(readme, training.read(output))
    assert "None" not in readme.read_text()


def test_a_second_call_resumes_with_what_is_not_done(monkeypatch, tmp_path, capsys):
    def start(minutes, *codes):
        steps = [
            h100.Step(
                str(i),
                60,
                [],
                ["-c", code],
                lambda output: [("## Sampling", "images/s, batch 256", 1, output.strip())],
            )
            for i, code in enumerate(codes)
        ]
        monkeypatch.setattr(h100, "steps", lambda: steps)
        monkeypatch.setattr(
            "sys.argv", ["h100", "--tiny", "--output", str(tmp_path), "--minutes", minutes]
        )
        return h100.main(), json.loads((tmp_path / "steps.json").read_text())

    wait = "import time; print(2, flush=True); time.sleep(60)"
    code, states = start("0.06", "print(1)", wait, "print(3)")
    assert code == 1 and list(states) == ["0", "1"]
    assert states["0"].startswith("done") and states["1"].startswith("cut")
    assert (tmp_path / "1.txt").read_text() == "2\n"  # what it had printed
    assert "| images/s, batch 256 | 2 |" in (tmp_path / "README.md").read_text()
    code, states = start("1", "raise SystemExit('again')", "print(4)", "print(3)")
    assert code == 0 and list(states) == ["0", "1", "2"]
    assert "again" not in (tmp_path / "log.txt").read_text()
    before = (tmp_path / "README.md").read_text()
    monkeypatch.setattr(
        h100, "machine", lambda: "another GPU"
    )  # to which these figures are foreign
    assert start("1", "print(9)")[0] == 2
    assert "tiny" in capsys.readouterr().err and (tmp_path / "README.md").read_text() == before


@pytest.mark.slow
def test_all_steps_run_at_small_sizes_on_a_cpu(monkeypatch, tmp_path, capfd):
    started = h100.run

    def forked(command, limit, log):
        if command[1] == "benchmarks.attention":  # chooses Triton's interpreter before its import
            return started(command, limit, log)
        status, output = server()(*command[1:])
        h100.say(output, log)
        return output, f"exit {status}" if status else "done"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(h100, "run", forked)
    monkeypatch.setattr(
        "sys.argv", ["h100", "--tiny", "--minutes", "15", "--output", str(tmp_path)]
    )
    assert h100.main() == 0, capfd.readouterr().out[-3000:]
    names = {step.name for step in h100.steps()}
    assert names <= {file.stem for file in tmp_path.glob("*.txt")}
