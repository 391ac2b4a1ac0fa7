"""Shared pieces of the tests: the published figures and the weights that reach them."""

import getpass
import json
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.generator import Generator
from modeling.sampling import Sampling
from modeling.tokenizer import Tokenizer
from tests.golden.fill import fill_value
from tests.tiny import tiny_generator, tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"

# Inductor takes graphs from its cache whatever the processor: with those of AVX-512, code compiled for AVX2 computes
# nonsense.
if "ATEN_CPU_CAPABILITY" in os.environ:
    capability = os.environ["ATEN_CPU_CAPABILITY"]
    folder = f"torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/{folder}")

# Every process that compiles would start another Python for Triton's kernels, of which a CPU has none.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A shell's background jobs ignore SIGINT, and those of nohup SIGHUP: so would the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# The longest files, which begin first: with two workers a long one at the end leaves a core idle.
LONGEST = (
    "test_kills", "test_generator_training", "test_fused_attention", "test_reference", "test_reliability",
    "test_alignment", "test_pipeline", "test_h100", "test_tokenizer_training", "test_on_paper", "test_train_ar",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))  # stable
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty folder to run in, and an empty download cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def golden():
    """Load one file of published figures: golden("generator_small.npz")."""

    def load(name):
        path = GOLDEN / name
        return json.loads(path.read_text()) if name.endswith(".json") else np.load(path)

    return load


@pytest.fixture
def fill():
    """Give a model the deterministic weights behind the published figures, in eval mode."""

    def apply(model):
        state = {
            name: torch.from_numpy(fill_value(name, tuple(tensor.shape), 1))
            for name, tensor in model.state_dict().items()
        }
        if "quantize.embed_prob" in state:
            state["quantize.embed_prob"].zero_()
        model.load_state_dict(state)
        return model.eval()

    return apply


@pytest.fixture
def traced(monkeypatch):
    """torch.compile with Dynamo alone: the functions are traced, but no code is generated."""
    compile_function = torch.compile

    def trace(function, **options):
        options.pop("options")
        return compile_function(function, backend="eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", trace)
    yield
    torch._dynamo.reset()


@pytest.fixture
def models(fill):
    """A generator and its tokenizer, as a sampling job has them."""
    from generation.job import Models

    generator = fill(Generator(tiny_generator(num_hidden_layers=1)))
    hashes = {"tokenizer": "t" * 16, "generator": "g" * 16}
    return Models(fill(Tokenizer(tiny_tokenizer())), generator, hashes, torch.device("cpu"))


@pytest.fixture
def job():
    """Eight images of three classes in turn, with guidance."""
    from generation.job import SamplingJob

    return SamplingJob(
        count=8, classes=(0, 1, 2), seed=5, sampling=Sampling(2.0), precision="fp32",
        compiled=False, chunk=None,
    )  # fmt: skip
