"""`pip install .` gives the models alone, as `alitok`."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

import modeling
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.tensors import write_state_dict
from tests.tiny import tiny_generator, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The files that a wheel would hold, made by setuptools itself, without a network."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q"]
    subprocess.run(
        [*build, "build_py", f"--build-lib={folder}"], cwd=ROOT, check=True, capture_output=True
    )
    return folder


def test_the_package_holds_the_models_and_nothing_else(installed):
    modules = {path.relative_to(ROOT / "modeling") for path in (ROOT / "modeling").rglob("*.py")}
    assert {path.relative_to(installed / "alitok") for path in installed.rglob("*.py")} == modules
    assert (installed / "alitok/py.typed").is_file()  # type checkers read the annotations


def test_the_package_states_one_version(installed):
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--version"]
    done = subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    version = done.stdout.split()[-1]
    assert version == modeling.__version__
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_module_imports_without_the_checkout(installed, tmp_path):
    names = [
        ".".join(path.relative_to(installed).with_suffix("").parts)
        for path in (installed / "alitok").rglob("*.py")
    ]
    script = f"""
import importlib, sys
sys.path.insert(0, {str(installed)!r})
for name in {names!r}:
    importlib.import_module(name.removesuffix(".__init__"))
rooms = {{"modeling", "runtime", "configs", "data", "accelerate", "omegaconf"}}
print(sorted(rooms & set(sys.modules)))
from alitok.generator import Generator, GeneratorConfig
print(sum(p.numel() for p in Generator(GeneratorConfig(32, 1, 2)).parameters()) > 0)
from PIL import Image
from alitok import Pipeline, Tokenizer
from alitok.tokenizer import TokenizerConfig
tokenizer = Tokenizer(TokenizerConfig(**{vars(tiny_tokenizer())!r}))
print(tokenizer.decode_photos(tokenizer.encode_photos(Image.new("RGB", (20, 20))))[0].size)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["[]", "True", "(16, 16)"], done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The Python of an environment that holds the wheel and the packages that it declares."""
    folder = tmp_path_factory.mktemp("alone")
    source = folder / "source"  # a build leaves files beside the sources
    shutil.copytree(ROOT / "modeling", source / "modeling")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={folder}"]
    subprocess.run([*pip, *build, source], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # `--target` removes nothing; the linked packages belong to the Python that runs the tests.
    install = ["install", "--no-deps", "--no-index", f"--target={site}"]
    subprocess.run([*pip, *install, wheel], check=True)
    linked = folder / "declared"
    linked.mkdir()
    for name in declared_packages():
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (linked / top).exists():
                (linked / top).symlink_to(distribution.locate_file(top))
    (site / "declared.pth").write_text(str(linked))
    return folder / "venv/bin/python"


def declared_packages():
    """What the wheel needs, and what that needs in turn."""
    found, waiting = set(), list(PROJECT["project"]["dependencies"])
    while waiting:
        needed = Requirement(waiting.pop())
        if needed.name not in found and (
            not needed.marker or needed.marker.evaluate({"extra": ""})
        ):
            found.add(needed.name)
            waiting += metadata.requires(needed.name) or []
    return found


@pytest.mark.slow
def test_a_wheel_alone_encodes_a_photo_and_samples(alone, tmp_path):
    for kind, model in (
        (GENERATOR, Generator(tiny_generator())),
        (TOKENIZER, Tokenizer(tiny_tokenizer())),
    ):
        about = about_model(kind, model.config)
        write_state_dict(model.state_dict(), tmp_path / f"{kind}.safetensors", about)
    Image.effect_noise((24, 20), 90).save(tmp_path / "photo.png")
    script = """
from alitok import Pipeline, Tokenizer
tokenizer = Tokenizer.from_pretrained("tokenizer.safetensors")
codes = tokenizer.encode_photos("photo.png")
print(tuple(codes.shape), tokenizer.decode_photos(codes)[0].size)
pipeline = Pipeline.from_pretrained(".", device="cpu")
print(tuple(pipeline([2, None], seed=1, guidance_scale=2.0).shape))
print(pipeline([0], prefix=codes[:, :5], output="pil")[0].size)
import importlib.util
print([name for name in ("modeling", "accelerate", "omegaconf", "scipy") if importlib.util.find_spec(name)])
"""
    done = subprocess.run([alone, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(1, 7) (16, 16)", "(2, 16, 16, 3)", "(16, 16)", "[]"], (
        done.stderr
    )


def test_the_requirements_agree_with_the_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    programs = {line for line in lines if line and not line.startswith("#")}
    core = set(PROJECT["project"]["dependencies"])
    assert core <= programs
    assert {re.split("[><=]", line)[0] for line in core} == {
        "torch",
        "einops",
        "numpy",
        "safetensors",
        "pillow",
    }


def test_the_checks_of_a_commit_are_those_of_the_test_suite():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    suite = (ROOT / "tests/run.sh").read_text()
    for command in ("ruff check", "ruff format", "basedpyright --level error"):
        assert command in hooks and command in suite, command
    assert "bash tests/run.sh" in (ROOT / ".github/workflows/tests.yml").read_text()
