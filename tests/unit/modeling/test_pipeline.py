import copy
import dataclasses
import inspect
import json
import pickle
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import modeling
from modeling.engine import Engine
from modeling.generator import Generator
from modeling.image_decoder import ImageDecoder
from modeling.pipeline import Pipeline, class_labels
from modeling.sampling import Sampling, draw_codes, image_uniforms
from modeling.tokenizer import Tokenizer
from modeling.weights.class_names import ClassNames
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.tensors import fingerprint, write_state_dict
from tests.refusals import refusal
from tests.tiny import STAGE1, sample_codes, tiny_generator, tiny_tokenizer
from training import checkpoint

SMALL = tiny_tokenizer()
TINY = tiny_generator(num_hidden_layers=3)


@pytest.fixture
def made(fill, tmp_path):
    generator, tokenizer = fill(Generator(TINY)), fill(Tokenizer(SMALL))
    write_state_dict(generator.state_dict(), tmp_path / "g.bin")
    write_state_dict(tokenizer.state_dict(), tmp_path / "t.pth")
    return generator, tokenizer, str(tmp_path / "g.bin"), str(tmp_path / "t.pth")


def test_pipeline_reads_the_sizes_and_makes_the_images_of_its_parts(made):
    generator, tokenizer, *files = made
    pipeline = Pipeline(*files, tokenizer_config=SMALL, device="cpu")
    assert pipeline.generator.config == TINY
    images = pipeline([2, 0], seed=5, guidance_scale=4.0, guidance_scale_pow=1.5)
    uniforms = image_uniforms(5, range(2), 7)
    codes = sample_codes(generator, torch.tensor([2, 0]), uniforms, Sampling(4.0, 1.5))
    assert torch.equal(images, ImageDecoder(tokenizer, torch.float32)(codes))
    assert images.shape == (2, 16, 16, 3)
    assert not torch.equal(pipeline([2, 0], seed=6, guidance_scale=4.0), images)


def test_pipeline_samples_codes_without_prefix_tokens(fill, tmp_path):
    small = dataclasses.replace(SMALL, num_latent_tokens=4)  # 2 x 2
    generator = fill(Generator(dataclasses.replace(TINY, image_seq_len=4)))
    tokenizer = fill(Tokenizer(small))
    write_state_dict(generator.state_dict(), tmp_path / "g.bin")
    write_state_dict(tokenizer.state_dict(), tmp_path / "t.pth")
    files = str(tmp_path / "g.bin"), str(tmp_path / "t.pth")
    pipeline = Pipeline(*files, tokenizer_config=small, device="cpu")
    images = pipeline([2, 0], seed=5, guidance_scale=4.0, guidance_scale_pow=1.5)
    uniforms = image_uniforms(5, range(2), 4)
    codes = sample_codes(generator, torch.tensor([2, 0]), uniforms, Sampling(4.0, 1.5))
    assert codes.shape == (2, 4)
    assert torch.equal(images, ImageDecoder(tokenizer, torch.float32)(codes))
    named = "num_latent_tokens=7", "num_latent_tokens=4"
    refusal(lambda: Pipeline(*files, tokenizer_config=SMALL), *named)


def test_pipeline_refuses_files_in_the_wrong_order(made, stated):
    *_, generator, tokenizer = made
    for files in ((tokenizer, generator), (stated[1], stated[0])):
        named = files[0], "not a generator", "a stage-2 tokenizer"
        refusal(lambda files=files: Pipeline(*files, tokenizer_config=SMALL), *named)
    named = generator, "not a tokenizer", "a generator"
    refusal(lambda: Pipeline(generator, generator, tokenizer_config=SMALL), *named)


@pytest.mark.parametrize(
    "classes, words",
    [
        ([], "list"),
        (1, "list"),
        ("cat", "list"),
        ([0.5], "0.5 is neither"),
        ([-1], "-1"),
        ([9], "class 9"),
    ],
)
def test_pipeline_refuses_classes_that_make_no_images(made, classes, words):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    refusal(lambda: pipeline(classes), words)


@pytest.mark.parametrize("seed", [-1, 1.5, "1"])
def test_pipeline_refuses_seeds_that_are_not_whole_numbers(made, seed):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    refusal(lambda: pipeline([0], seed=seed), f"seed {seed}")


def test_pipeline_warns_of_numbers_that_are_the_names_of_other_classes(recwarn):
    names = ClassNames(3, {0: "0", 1: "10", 2: "2"})
    assert class_labels(["10", 2], names).tolist() == [1, 2]
    assert "class 1 is the one called 10" in str(recwarn.pop(UserWarning).message)
    class_labels(["10"], names)
    assert not recwarn


def test_pipeline_refuses_unknown_settings_and_devices_that_are_not_there(made, monkeypatch):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    refusal(lambda: pipeline([0], guidance=4.0), "guidance", "guidance_scale, guidance_scale_pow")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(
        lambda: Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cuda"), "device=cuda"
    )


def test_an_image_does_not_depend_on_what_is_made_with_it(made):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    assert torch.equal(pipeline([1, 2, 0], seed=3)[:2], pipeline([1, 2], seed=3))


# ---------------------------------------------------------------------- files that say what they are
@pytest.fixture
def stated(made, tmp_path):
    """The models of `made` as files that say what they are."""
    generator, tokenizer, *_ = made
    about = about_model(TOKENIZER, SMALL, stage=2)
    write_state_dict(tokenizer.state_dict(), tmp_path / "t.safetensors", about)
    known = fingerprint(tokenizer.state_dict())
    about = about_model(GENERATOR, TINY, known, classes=["ant", "bee", "cat"])
    write_state_dict(generator.state_dict(), tmp_path / "g.safetensors", about)
    return str(tmp_path / "g.safetensors"), str(tmp_path / "t.safetensors")


def test_files_that_say_what_they_are_need_no_config(made, stated):
    expected = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    pipeline = Pipeline(*stated, device="cpu")
    assert pipeline.generator.config == TINY
    assert torch.equal(pipeline([2, 0], seed=5), expected([2, 0], seed=5))
    assert torch.equal(pipeline(["cat", "ant"], seed=5), expected([2, 0], seed=5))
    fitting = Pipeline(*stated, tokenizer_config=SMALL, device="cpu")
    assert torch.equal(fitting([1]), pipeline([1]))


def test_a_stage_1_tokenizer_that_says_so_needs_no_config(made, stated, fill, tmp_path):
    config = tiny_tokenizer(**STAGE1)
    tokenizer = fill(Tokenizer(config))
    about = about_model(TOKENIZER, config, stage=1)
    write_state_dict(tokenizer.state_dict(), tmp_path / "t1.safetensors", about)
    pipeline = Pipeline(made[2], tmp_path / "t1.safetensors", device="cpu")
    codes = sample_codes(made[0], torch.tensor([1]), image_uniforms(0, range(1), 7), Sampling(1.0))
    assert torch.equal(pipeline([1]), ImageDecoder(tokenizer, torch.float32)(codes))
    # Both stages make the same codes.
    assert torch.equal(
        Pipeline(stated[0], tmp_path / "t1.safetensors", device="cpu")([1]), pipeline([1])
    )


def test_a_config_that_contradicts_the_file_is_refused_by_name(stated):
    other = replace(SMALL, encoder_heads=4)
    named = "tokenizer config: encoder_heads=4", "t.safetensors"
    refusal(lambda: Pipeline(*stated, tokenizer_config=other, device="cpu"), *named)


def test_files_that_do_not_belong_together_are_refused(made, stated, fill, tmp_path):
    other = fill(Tokenizer(SMALL))
    with torch.no_grad():
        other.latent_tokens.add_(1)
    another, few = tmp_path / "other.pth", tmp_path / "fewer.pth"
    write_state_dict(other.state_dict(), another)
    named = stated[0], another, "fingerprint"
    refusal(lambda: Pipeline(stated[0], another, SMALL, device="cpu"), *named)
    Pipeline(made[2], another, SMALL, device="cpu")  # a .bin says nothing
    fewer = replace(SMALL, num_latent_tokens=6)
    write_state_dict(fill(Tokenizer(fewer)).state_dict(), few)
    named = stated[0], "7 codes from a codebook of 16", few, "6 from 16"
    refusal(lambda: Pipeline(stated[0], few, fewer, device="cpu"), *named)


def test_runs_bring_all_that_a_pipeline_needs(made, tmp_path):
    generator, tokenizer, *files = made
    codes = fingerprint(tokenizer.state_dict())
    about = about_model(GENERATOR, TINY, codes)
    raw = {name: torch.zeros_like(value) for name, value in generator.state_dict().items()}
    weights = {"generator_raw": (raw, None), "generator": (generator.state_dict(), about)}
    checkpoint.save(tmp_path / "run_ar", 2, weights, {}, keep=2)
    weights = {"tokenizer": (tokenizer.state_dict(), about_model(TOKENIZER, SMALL, stage=2))}
    checkpoint.save(tmp_path / "run", 4, weights, {}, keep=2)
    pipeline = Pipeline(tmp_path / "run_ar", tmp_path / "run", device="cpu")
    expected = Pipeline(*files, tokenizer_config=SMALL, device="cpu")
    assert torch.equal(pipeline([1, 2]), expected([1, 2]))


# ---------------------------------------------------------------------- images without a class
def test_images_without_a_class_come_from_the_row_that_no_class_has(made):
    generator, tokenizer, *files = made
    pipeline = Pipeline(*files, tokenizer_config=SMALL, device="cpu")
    images = pipeline([None, None], seed=3, guidance_scale=9.0)
    assert len(pipeline.engine.rows) == 2  # no second branch
    labels = torch.full((2,), TINY.condition_num_classes)
    codes = codes_of_row(generator, labels, image_uniforms(3, range(2), 7))
    assert torch.equal(images, ImageDecoder(tokenizer, torch.float32)(codes))
    mixed = pipeline([None, 1], seed=3, guidance_scale=9.0)
    assert torch.equal(mixed[0], images[0])
    assert torch.equal(mixed[1], pipeline([1, 1], seed=3, guidance_scale=9.0)[1])
    assert not torch.equal(images, pipeline([0, 0], seed=3))


def codes_of_row(generator, labels, uniforms):
    """Codes by the generator's own forward pass, without cache, engine or guidance."""
    codes = torch.zeros(len(labels), 0, dtype=torch.int64)
    for t in range(uniforms.shape[1]):
        logits = generator(codes, labels)[:, -1]
        codes = torch.cat([codes, draw_codes(logits, uniforms[:, t], 1.0)[:, None]], 1)
    return codes


# ---------------------------------------------------------------------- folders and the hub
class Hub:
    """What `modeling.weights.hub` uses of huggingface_hub, on a local folder: {commit: files}."""

    def __init__(self, root):
        self.root, self.asked, self.made = root, [], []

    def create_repo(self, name, private=None, exist_ok=False):
        assert exist_ok
        self.made.append((name, private))

    def create_branch(self, name, branch, exist_ok=False):
        self.made.append((name, branch))

    def file_exists(self, name, file, revision=None):
        return any((commit / file).exists() for commit in self.root.iterdir())

    def upload_folder(self, repo_id, folder_path, revision, commit_message, ignore_patterns):
        commit = f"{len(list(self.root.iterdir())):040x}"
        ignore = shutil.ignore_patterns(*ignore_patterns or ())
        shutil.copytree(folder_path, self.root / commit, ignore=ignore)
        return SimpleNamespace(oid=commit)

    def snapshot_download(self, name, revision=None, allow_patterns=None):
        self.asked.append((name, revision, allow_patterns))
        commit = revision or max(path.name for path in self.root.iterdir())
        if not (self.root / commit).is_dir():
            raise ConnectionError("no route to the hub\nsecond line")
        return str(self.root / commit)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("modeling.weights.hub.client", lambda: made)
    return made


def test_a_saved_folder_makes_the_same_pipeline(stated, tmp_path):
    pipeline = Pipeline(*stated, device="cpu")
    pipeline.save_pretrained(tmp_path / "saved")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    weights = ["generator.safetensors", "tokenizer.safetensors"]
    assert names == ["README.md", "config.json", *weights]
    again = Pipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again(["bee"]), pipeline(["bee"])) and again.revision is None
    for file, mine in zip(stated, weights):
        assert (tmp_path / "saved" / mine).read_bytes() == Path(file).read_bytes()
    refusal(lambda: Pipeline.from_pretrained(tmp_path / "saved", revision="v1"), "revision=v1")


def test_a_saved_folder_has_a_model_card_and_a_config(stated, tmp_path, monkeypatch):
    pipeline = Pipeline(*stated, device="cpu")
    pipeline.save_pretrained(tmp_path / "saved", "me/ants")
    card = (tmp_path / "saved/README.md").read_text()
    known = pipeline.about[TOKENIZER].tokenizer
    for words in ("license: unknown", "# me/ants", 'from_pretrained("me/ants")', "16×16 pixels",
                  "7 of 16", '3: "ant", "bee", "cat"', f"`{known}`", "stage 2"):  # fmt: skip
        assert words in card, words
    code = card.split("```")[1].removeprefix("python\n").replace("me/ants", f"{tmp_path}/saved")
    monkeypatch.setitem(sys.modules, "alitok", modeling)  # as installed
    exec(code.replace("image.png", f"{tmp_path}/image.png"))
    assert (tmp_path / "image.png").is_file()
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["tokenizer"] == pipeline.about[TOKENIZER].entry()
    assert config["generator"] == pipeline.about[GENERATOR].entry()
    (tmp_path / "saved/README.md").write_text("mine")
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_text() == "mine"


def test_weights_that_say_nothing_are_saved_as_the_pair_that_they_are(made, tmp_path):
    Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu").save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.about[GENERATOR].tokenizer == again.about[TOKENIZER].tokenizer
    assert again.about[GENERATOR].classes is None and again.about[TOKENIZER].stage is None


def test_a_path_starts_at_home(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipeline = Pipeline("~/g.bin", "~/t.pth", tokenizer_config=SMALL, device="cpu")
    pipeline.save_pretrained("~/saved")
    assert (tmp_path / "saved/generator.safetensors").is_file()
    again = Pipeline.from_pretrained("~/saved", device="cpu")
    assert torch.equal(again([0]), pipeline([0]))
    for name in ("~/t.pth", "~/saved"):
        tokenizer = Tokenizer.from_pretrained(name, device="cpu", config=SMALL)
        assert torch.equal(tokenizer.latent_tokens, made[1].latent_tokens)
    refusal(lambda: Tokenizer.from_pretrained("~nobody-here/t.pth"), "~nobody-here/t.pth")


def test_the_hub_keeps_each_commit_and_a_pinned_one_stays(stated, stub):
    pipeline = Pipeline(*stated, device="cpu")
    first = pipeline.push_to_hub("me/digits", private=True)
    with torch.no_grad():
        pipeline.generator.output.bias.add_(torch.linspace(0, 9, 16))
    second = pipeline.push_to_hub("me/digits", branch="next")
    assert stub.made == [("me/digits", True), ("me/digits", None), ("me/digits", "next")]
    pinned = Pipeline.from_pretrained("me/digits", revision=first, device="cpu")
    assert pinned.revision == first
    assert torch.equal(pinned([0, 1]), Pipeline(*stated, device="cpu")([0, 1]))
    newest = Pipeline.from_pretrained("me/digits", device="cpu")
    assert newest.revision == second
    assert not torch.equal(newest([0, 1]), pinned([0, 1]))
    cards = [(stub.root / commit / "README.md").exists() for commit in (first, second)]
    assert cards == [True, False]  # one that is there is not replaced
    files = ["generator.safetensors", "tokenizer.safetensors", "config.json"]  # the last is counted
    assert stub.asked == [("me/digits", first, files), ("me/digits", None, files)]


def test_a_hub_that_does_not_answer_is_one_line(stated, stub, monkeypatch):
    load = partial(Pipeline.from_pretrained, "me/digits", revision="abc")
    refusal(load, "me/digits", "revision abc", "no route to the hub")

    def fail(*args, **kwargs):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(stub, "upload_folder", fail)
    pipeline = Pipeline(*stated, device="cpu")
    refusal(lambda: pipeline.push_to_hub("me/digits"), "me/digits", "403 Forbidden")


def test_a_repository_of_something_else_is_refused(stub):
    (stub.root / "abc").mkdir()
    (stub.root / "abc/tokenizer.safetensors").touch()
    load = partial(Pipeline.from_pretrained, "me/digits", revision="abc")
    refusal(load, "me/digits", "generator.safetensors")


def test_without_the_hubs_client_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refusal(lambda: Pipeline.from_pretrained("me/digits"), "pip install huggingface_hub")


def test_the_hubs_own_client_takes_what_it_is_called_with():
    hub = pytest.importorskip("huggingface_hub")
    for function, arguments in (
        (hub.snapshot_download, dict(revision="r", allow_patterns=["a"])),
        (hub.create_repo, dict(private=True, exist_ok=True)),
        (hub.create_branch, dict(branch="b", exist_ok=True)),
        (hub.file_exists, dict(filename="f", revision="b")),
    ):
        inspect.signature(function).bind("me/digits", **arguments)
    upload = dict(
        repo_id="me/digits",
        folder_path="f",
        revision="b",
        commit_message="m",
        ignore_patterns=["f"],
    )
    inspect.signature(hub.upload_folder).bind(**upload)


# ---------------------------------------------------------------------- beside other code of a process
def test_threads_that_share_a_pipeline_get_their_own_images(made, monkeypatch):
    sample, running = Engine.sample, []

    def alone(engine, *given):
        assert not running, "two calls are in an engine at once"
        running.append(engine)
        time.sleep(0.005)  # longer than a thread's turn
        codes = sample(engine, *given)
        running.clear()
        return codes

    monkeypatch.setattr(Engine, "sample", alone)
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    calls = [([2, 0], {"guidance_scale": 4.0}), ([1, 1], {}), ([0], {}), ([0, 1], {"seed": 3})] * 4
    alone = [pipeline(classes, **options) for classes, options in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: pipeline(call[0], **call[1]), calls))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_a_copy_of_a_used_pipeline_makes_its_images(made):
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    images = pipeline([2, 0])
    for copied in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(copied([2, 0]), images)


def test_changed_weights_make_other_images(made, fill):
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    before = pipeline([2, 0])
    state = {name: 2 * tensor for name, tensor in made[0].state_dict().items()}
    pipeline.generator.load_state_dict(state)
    changed = pipeline([2, 0])
    pipeline.engine = None  # a new one reads all weights
    assert torch.equal(pipeline([2, 0]), changed) and not torch.equal(changed, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_type_changes_nothing(made, dtype):
    expected = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")([2, 0, 1])
    torch.set_default_dtype(dtype)
    try:
        pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
        images = pipeline([2, 0, 1])
        assert pipeline.engine.uniforms.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(images, expected)
    assert {p.dtype for p in pipeline.tokenizer.parameters()} == {torch.float32}


def test_the_callers_autocast_changes_nothing(made):
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    expected = pipeline([2, 0, 1], guidance_scale=16.0)
    pipeline.engine = None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipeline([2, 0, 1], guidance_scale=16.0), expected)


def test_images_are_plain_tensors(made):
    images = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")([2])
    images[:, :4] = 255  # an inference tensor would refuse
    assert images[0, 0, 0].tolist() == [255] * 3


def test_a_type_that_no_engine_has_is_refused_at_once(made):
    make = partial(Pipeline, *made[2:], tokenizer_config=SMALL, device="cpu")
    refusal(lambda: make(dtype=torch.float16), "torch.float16", "torch.bfloat16")


def test_another_generator_is_sampled_by_another_engine(made, fill):
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    before = pipeline([0])
    pipeline.generator = fill(Generator(TINY))
    pipeline.generator.output.bias.data[3] = 1e3
    assert not torch.equal(pipeline([0]), before)


def test_classes_that_had_no_image_are_warned_of(made, fill, tmp_path):
    about = replace(
        about_model(GENERATOR, TINY), classes=["ant", "bee", "cat"], untrained=[1]
    )  # fmt: skip
    write_state_dict(made[0].state_dict(), tmp_path / "some.safetensors", about)
    pipeline = Pipeline(str(tmp_path / "some.safetensors"), made[3], SMALL, device="cpu")
    with pytest.warns(UserWarning, match="class 1"):
        pipeline(["bee"])


def test_what_is_no_tensor_of_codes_is_refused_as_a_prefix(made):
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    refusal(lambda: pipeline([2], prefix=[[1, 2]]), "list")
    refusal(lambda: pipeline([2], prefix=torch.zeros(1, 2)), "torch.float32", "integers")


@pytest.mark.parametrize(
    "prefix, named",
    [
        (torch.zeros(1, 8), ("(1, 8)", "at most 7")), (torch.zeros(2), ("shape (2,)",)),
        (torch.zeros(3, 2), ("(3, 2)", "2 images")), (torch.tensor([[0, 16]]), ("0…16", "0…15")),
        (torch.tensor([[-2, 3]]), ("-2…3", "0…15")),
    ],
)  # fmt: skip
def test_codes_that_begin_no_image_of_the_model_are_refused(made, prefix, named):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    refusal(lambda: pipeline([2, 1], prefix=prefix.long()), *named)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_codes_of_any_type_of_integers_are_a_prefix(made, dtype):
    """Sampling writes uint16."""
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    prefix = torch.tensor([[3, 1]])
    assert torch.equal(pipeline([2], prefix=prefix.to(dtype)), pipeline([2], prefix=prefix))


def test_several_photos_in_one_list_are_refused(made):
    pipeline = Pipeline(*made[2:], tokenizer_config=SMALL, device="cpu")
    refusal(lambda: pipeline.encode(["a.jpg", "b.jpg"]), "list", "separate")


def test_a_folders_name_that_is_not_utf8_is_saved(made, tmp_path):
    about = replace(about_model(GENERATOR, TINY), classes=("ant", "b\udce9e", "cat"))
    write_state_dict(made[0].state_dict(), tmp_path / "named.safetensors", about)
    pipeline = Pipeline(str(tmp_path / "named.safetensors"), made[3], SMALL, device="cpu")
    pipeline.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert "b\udce9e" in json.dumps(config, ensure_ascii=False)
