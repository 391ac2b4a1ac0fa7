"""A file with code in it is refused by name, and the code does not run, wherever a file is read."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from evaluation.features import INCEPTION_FILE
from evaluation.lpips import LPIPS_FILE
from tests.integration.conftest import without_weights
from tests.payload import Payload, forge
from train_tokenizer.losses import CONVNEXT_FILE


@pytest.fixture
def marker(tmp_path):
    """What must not be there at the end of a test."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(path)))  # it works …
    path.rmdir()
    yield path
    assert not path.exists()  # … and did not run


@pytest.fixture
def bomb(marker, tmp_path):
    """bomb(NAME): a file with that payload, in the format that NAME's suffix asks for."""

    def make(path):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            objects = np.array([Payload(marker)], dtype=object)
            keys = ("arr_0", "codes", "images", "skipped", "mu")
            np.savez(path, **dict.fromkeys(keys, objects))
        elif path.suffix == ".yaml":
            call = f"!!python/object/apply:os.mkdir ['{marker}']"
            path.write_text(f"model: {call}\nexperiment: {call}\n")
        elif path.suffix in (".pth", ".bin", ".pt"):
            torch.save({"w": Payload(marker)}, path)
        else:
            path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
        return path

    return make


def options(workspace, program, folder):
    """A command that would succeed; options given after it override its own."""
    config = f"config={workspace.root}/generator.yaml"
    tokenizer = f"experiment.tokenizer_checkpoint={workspace.tokenizer}"
    return {
        "train_ar.py": [
            config, tokenizer, f"dataset.params.pretokenization={workspace.cache}",
            f"experiment.output_dir={folder}/run",
        ],
        "train_tokenizer": [
            f"config={workspace.root}/stage1.yaml", f"experiment.output_dir={folder}/run",
            f"dataset.params.train_dir={workspace.root}/train",
        ],
        "pretokenization.py": [
            "--config", workspace.root / "generator.yaml", "--img_size", 16, "--num_workers", 0,
            "--data_path", workspace.root / "train", "--cached_path", folder / "cache",
            "--tokenizer_checkpoint", workspace.tokenizer,
        ],
        "sample_imagenet.py": [
            config, tokenizer, f"experiment.generator_checkpoint={workspace.generator}",
            f"experiment.output_dir={folder}/run", "experiment.num_fid_samples=4",
        ],
        "evaluate.py": ["--num_workers", 0],
        "data.tokens": [], "train_tokenizer.export": [],
    }[program]  # fmt: skip


GIVEN = [  # programs and the options that name a file
    ("train_ar.py", "config={}", "bad.yaml"),
    ("train_ar.py", "experiment.tokenizer_checkpoint={}", "bad.pth"),
    ("train_ar.py", "experiment.tokenizer_checkpoint={}", "bad.safetensors"),
    ("train_tokenizer", "config={}", "bad.yaml"),
    ("train_tokenizer", "dataset.params.train_dir={}", "images.txt"),
    ("pretokenization.py", "--config {}", "bad.yaml"),
    ("pretokenization.py", "--tokenizer_checkpoint {}", "bad.pth"),
    ("sample_imagenet.py", "config={}", "bad.yaml"),
    ("sample_imagenet.py", "experiment.generator_checkpoint={}", "bad.bin"),
    ("sample_imagenet.py", "experiment.tokenizer_checkpoint={}", "bad.pth"),
    ("sample_imagenet.py", "experiment.codes={}", "bad.npz"),
    ("sample_imagenet.py", "experiment.prefix={}", "bad.npz"),
    ("evaluate.py", "--samples {} --reference none.npz", "bad.npz"),
    ("evaluate.py", "--reconstruction --data_path . --tokenizer {}", "bad.pth"),
    ("train_tokenizer.export", "{} out.pth", "bad.pth"),
]


@pytest.mark.slow
@pytest.mark.parametrize("program, option, name", GIVEN)
def test_file_that_is_given(workspace, warm, tmp_path, bomb, program, option, name):
    path = bomb(name)
    given = [
        a
        for a in options(workspace, program, tmp_path)
        if name != "bad.yaml" or "config=" not in str(a)
    ]
    line = warm.refused(program, *given, *option.format(path).split())
    assert str(path) in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_config_of_a_tokenizer_to_evaluate(workspace, warm, bomb):
    path = bomb("bad.yaml")
    line = warm.refused(
        "evaluate.py", "--reconstruction", "--data_path", workspace.root / "train",
        "--tokenizer", workspace.tokenizer, "--config", path,
    )  # fmt: skip
    assert str(path) in line


@pytest.mark.slow
@without_weights
@pytest.mark.parametrize(
    "program, option, name",
    [
        ("train_ar.py", "experiment.fid_reference=ref.npz", INCEPTION_FILE),
        ("sample_imagenet.py", "experiment.fid_reference=ref.npz", INCEPTION_FILE),
        ("evaluate.py", "--reference ref.npz --save_stats out.npz", INCEPTION_FILE),
        ("train_tokenizer", "phases=[{steps: 1, perceptual_weight: 1.0}]", CONVNEXT_FILE),
        ("train_tokenizer", "phases=[{steps: 1, lpips_weight: 1.0}]", "vgg16-397923af.pth"),
    ],
)
def test_weights_of_a_network_that_is_found(workspace, warm, tmp_path, bomb, program, option, name):
    path = bomb(f"hub/checkpoints/{name}")
    (path.parent / LPIPS_FILE).touch()  # looked for before the other is read
    given = options(workspace, program, tmp_path)
    split = [option] if "{" in option else option.split()
    line = warm.refused(program, *given, *split, env={"TORCH_HOME": str(tmp_path)})
    assert str(path) in line
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- what earlier runs left
@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.pt", "WEIGHTS.safetensors"])
@pytest.mark.parametrize("program", ["train_ar.py", "train_tokenizer"])
def test_checkpoint(workspace, warm, tmp_path, bomb, program, name):
    made = workspace.generator.parent if program == "train_ar.py" else workspace.stage1_run
    name = name.replace("WEIGHTS", "generator" if program == "train_ar.py" else "tokenizer")
    shutil.copytree(made, tmp_path / "run")
    (last,) = (tmp_path / "run/checkpoints").glob("*6")
    forge(last, name, bomb(name).read_bytes())
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    phases = ["phases=[{name: mse, steps: 6, learning_rate: 1.0e-3}, {steps: 2}]"]
    phases = phases if program == "train_tokenizer" else []
    line = warm.refused(program, *options(workspace, program, tmp_path), *phases)
    assert str(last / name) in line
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_checkpoint_to_export_or_to_sample_from(workspace, warm, tmp_path, bomb):
    for program, made, name in (
        ("train_tokenizer.export", workspace.stage1_run, "tokenizer.safetensors"),
        ("sample_imagenet.py", workspace.generator.parent, "generator.safetensors"),
    ):
        run = shutil.copytree(made, tmp_path / name)
        (last,) = (run / "checkpoints").glob("*6")
        forge(last, name, bomb(f"x/{name}").read_bytes())
        own = [run, tmp_path / "out.pth"]
        if program == "sample_imagenet.py":
            own = [f"experiment.generator_checkpoint={run}"]
        line = warm.refused(program, *options(workspace, program, tmp_path), *own)
        assert str(last / name) in line
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.slow
def test_token_cache_of_the_published_layout(workspace, warm, tmp_path, bomb):
    path = bomb("cache/class0/00.png.npz")
    for program, option in (
        ("train_ar.py", f"dataset.params.pretokenization={tmp_path}/cache"),
        ("train_ar.py", f"dataset.params.val_pretokenization={tmp_path}/cache"),
        ("data.tokens", f"verify {tmp_path}/cache"),
    ):
        given = options(workspace, program, tmp_path)
        assert str(path) in warm.refused(program, *given, *option.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("outside", ["../secret.bin", "/etc/hostname"])
def test_manifest_that_leaves_its_folder(workspace, warm, tmp_path, outside):
    cache = shutil.copytree(workspace.cache, tmp_path / "cache")
    (tmp_path / "secret.bin").write_bytes(b"x")
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["files"].append({"name": outside, "bytes": 1, "sha256": ""})
    (cache / "manifest.json").write_text(json.dumps(manifest))
    for program, option in (
        ("train_ar.py", f"dataset.params.pretokenization={cache}"),
        ("data.tokens", f"verify {cache}"),
    ):
        given = options(workspace, program, tmp_path)
        line = warm.refused(program, *given, *option.split())
        assert f"names a file outside its folder: {outside}" in line


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretokenization.py", "sample_imagenet.py"])
def test_part_of_a_stopped_run(workspace, warm, tmp_path, bomb, program):
    given = options(workspace, program, tmp_path)
    work = "cache.partial/parts" if program == "pretokenization.py" else "run/chunks"
    # Parts are written, then what is to join them dies: before its last rename but one.
    for call in range(1, 100):
        shutil.rmtree(tmp_path / work.split("/")[0], ignore_errors=True)
        warm.start(program, *given, die_before=call).end()
        parts = sorted((tmp_path / work).glob("*.npz"))
        if parts:
            break
    path = bomb(f"{work}/{parts[0].name}")
    assert str(path) in warm.refused(program, *given)
    settings = tmp_path / work.split("/")[0]
    settings /= "settings.json" if program == "pretokenization.py" else "sampling.json"
    settings.write_bytes(bomb("x").read_bytes())
    assert str(settings) in warm.refused(program, *given)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretokenization.py", "train_tokenizer"])
def test_image(workspace, warm, tmp_path, bomb, program):
    shutil.copytree(workspace.root / "train", tmp_path / "train")
    path = bomb("train/class1/01.png")
    given = options(workspace, program, tmp_path)
    data = f"dataset.params.train_dir={tmp_path}/train"
    data = f"--data_path {tmp_path}/train" if program == "pretokenization.py" else data
    assert f"unreadable image {path}" in warm.refused(program, *given, *data.split())
