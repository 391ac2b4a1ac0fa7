"""`pip install .` gives the models alone, as `alitok`."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import modeling
from tests.tiny import tiny_tokenizer

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
