"""The doors of docs/architecture.md: a toy of each kind is added in the places that it names."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
import evaluation.evaluator
import evaluation.generator_scores
import evaluation.reconstruction
import evaluation.statistics
import modeling.generator
import modeling.tokenizer
import modeling.weights.metadata
import sample_imagenet
import train_ar
from evaluation import metrics
from evaluation.likelihood import Share
from evaluation.metrics import POOL, FeatureSample, SetMetric
from modeling.generator import next_code_loss
from modeling.image_decoder import ImageDecoder
from modeling.sampling import Sampling
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights.metadata import TOKENIZER, about_model, tokenizer_sizes
from modeling.weights.opened import load_tokenizer, open_weights
from modeling.weights.tensors import fingerprint, write_state_dict
from runtime.errors import InputError
from tests.inception import TinyFeatures
from tests.tiny import sample_codes, tiny_cache, tiny_generator, tiny_tokenizer

SIZES = """
model:
  vq_model:
    {codebook_size: 16, token_size: 2, image_size: 16, patch_size: 4, encoder_width: 32, encoder_layers: 1,
     encoder_heads: 2, decoder_width: 32, decoder_layers: 1, decoder_heads: 2}
  generator: {hidden_size: 32, num_attention_heads: 2, codebook_size: 16, image_seq_len: 21, condition_num_classes: 3}
dataset: {params: {num_workers_per_gpu: 0}}
experiment: {log_every: 4, eval_every: 8, generate_every: 0}
training: {per_gpu_batch_size: 8, max_train_steps: 8, mixed_precision: 'no'}
"""


# ---------------------------------------------------------------------- a backbone
class Recurrent(nn.Module):
    """A generator without attention: embeddings, a GRU, an output layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.rows, config.hidden_size)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, config.codebook_size)
        self.blocks = nn.ModuleList()

    def forward(self, codes, labels, targets=None):
        rows = torch.cat([self.config.condition_rows(labels).unsqueeze(1), codes], 1)
        x = self.gru(self.embeddings(rows))[0]
        return self.output(x) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        return next_code_loss(self.output(x), targets)

    def decayed(self):
        return [self.output.weight]

    def step(self, rows, position, cache):
        x, cache["state"] = self.gru(self.embeddings(rows).unsqueeze(1), cache.get("state"))
        return self.output(x)[:, 0].float()


def sizes_of_recurrent(state):
    codes, hidden = state["output.weight"].shape
    classes = len(state["embeddings.weight"]) - codes - 2
    return {
        "hidden_size": hidden,
        "num_attention_heads": 2,
        "codebook_size": codes,
        "condition_num_classes": classes,
    }


def test_a_backbone_is_trained_sampled_and_scored(tmp_path, monkeypatch, fill):
    monkeypatch.setattr(modeling.generator, "Generator", Recurrent)
    monkeypatch.setattr(modeling.weights.metadata, "generator_sizes", sizes_of_recurrent)
    (tmp_path / "toy.yaml").write_text(SIZES)
    sizes = dict(token_size=2, patch_size=4, encoder_width=32, decoder_width=32)
    tokenizer = fill(Tokenizer(tiny_tokenizer(**sizes)))
    about = about_model(TOKENIZER, tokenizer.config)
    write_state_dict(tokenizer.state_dict(), tmp_path / "tokenizer.pth", about)
    codes = (np.arange(24)[:, None, None] % 3 + np.arange(21)) % 16
    mark = fingerprint(tokenizer.state_dict())
    labels = [i % 3 for i in range(24)]
    tiny_cache(tmp_path / "cache", codes, labels, codebook=16, crops="center", tokenizer=mark)

    run, weights = tmp_path / "run", tmp_path / "run/generator.safetensors"
    monkeypatch.setattr("training.run.peak_flops", lambda *_: 1e12)
    train_ar.main([
        f"config={tmp_path}/toy.yaml", f"experiment.output_dir={run}",
        f"dataset.params.pretokenization={tmp_path}/cache",
        f"dataset.params.val_pretokenization={tmp_path}/cache",
    ])  # fmt: skip
    assert "mfu" not in (run / "metrics.jsonl").read_text()  # its FLOPs are unknown

    def sample(*options):
        sample_imagenet.main([
            f"config={tmp_path}/toy.yaml", f"experiment.output_dir={tmp_path}/samples",
            f"experiment.generator_checkpoint={weights}", "experiment.num_fid_samples=3",
            f"experiment.tokenizer_checkpoint={tmp_path}/tokenizer.pth", *options,
        ])  # fmt: skip

    with pytest.raises(InputError, match=r"Recurrent: set experiment\.engine=reference"):
        sample("experiment.output_dir=" + str(tmp_path / "other"))
    sample("experiment.engine=reference", "model.generator.guidance_scale=3")
    assert np.load(tmp_path / "samples_codes.npz")["arr_0"].shape == (3, 21)

    score = evaluation.generator_scores.score_generator
    result, _ = score(str(weights), [], str(tmp_path / "cache"), str(tmp_path / "p.png"), Share(8))
    assert result["metrics"]["nats_per_code"] > 0


def test_a_backbones_codes_are_those_of_its_own_forward():
    config = tiny_generator(num_hidden_layers=1)
    model, labels = Recurrent(config).eval(), torch.tensor([0, 2])
    codes = sample_codes(model, labels, torch.rand(2, 7), Sampling(randomize_temperature=1e-5))
    with torch.no_grad():
        assert torch.equal(model(codes[:, :-1], labels).argmax(2), codes)


# ---------------------------------------------------------------------- a quantizer
class Signs(nn.Module):
    """Finite scalar quantization with two levels per channel: the signs are the bits of a code."""

    training_only = ()

    def __init__(self, codebook_size, token_size, clustering):
        super().__init__()
        assert codebook_size == 2**token_size
        self.register_buffer("bits", 2 ** torch.arange(token_size))
        self.register_buffer("thresholds", torch.zeros(token_size))

    def encode(self, z):
        return ((z > self.thresholds) * self.bits).sum(-1)

    def lookup(self, codes):
        return (codes.unsqueeze(-1) & self.bits > 0) * 2.0 - 1

    def before_update(self, z):
        pass

    def forward(self, z):
        codes = self.encode(z)
        return z + (self.lookup(codes) - z).detach(), codes, z.new_zeros(())


def sizes_with_signs(state):
    """As of a codebook that holds the codes' signs."""
    bits = len(state["encoder.conv_out.weight"])
    return tokenizer_sizes({**state, "quantize.embedding.weight": torch.empty(2**bits, bits)})


def test_a_quantizer_trains_encodes_decodes_and_is_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(modeling.tokenizer, "VectorQuantizer", Signs)
    monkeypatch.setattr(modeling.weights.metadata, "tokenizer_sizes", sizes_with_signs)
    config = tiny_tokenizer(patch_size=4, encoder_width=32, decoder_width=32)
    tokenizer, images = Tokenizer(config), torch.rand(4, 3, 16, 16)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        out = tokenizer(images)
        loss = (out.images - images).square().mean() + out.quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and tokenizer.encoder.conv_out.weight.grad.any()

    codes = tokenizer.eval().encode(images)
    assert codes.max() < 16 and torch.equal(
        (codes.unsqueeze(-1) >> torch.arange(4)) & 1, (tokenizer.latents(images) > 0).long()
    )

    write_state_dict(tokenizer.state_dict(), tmp_path / "t.safetensors")  # states nothing
    opened = open_weights(tmp_path / "t.safetensors", TOKENIZER)
    heads = {"encoder_heads": 2, "decoder_heads": 2}
    again = load_tokenizer(opened, opened.config(TokenizerConfig(**heads), heads))
    pixels = ImageDecoder(again, torch.float32)(codes)
    assert torch.equal(pixels, ImageDecoder(tokenizer, torch.float32)(codes))

    before = fingerprint(tokenizer.state_dict())
    tokenizer.quantize.thresholds += 0.5
    assert fingerprint(tokenizer.state_dict()) != before  # they decide the codes too


# ---------------------------------------------------------------------- a metric
def kernel_distance(samples, reference, device, half):
    """KID (Bińkowski et al. 2018): the squared MMD with the kernel (x·y / D + 1)³, of all images at once."""
    x, y = samples[0].double(), reference[0].double()

    def mean(a, b, distinct):
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        return (kernel.sum() - kernel.trace() * distinct) / (len(a) * (len(b) - distinct))

    return ((mean(x, x, 1) + mean(y, y, 1) - 2 * mean(x, y, 0)).item(),)


KID = SetMetric(("KID",), "manifold", POOL, FeatureSample, kernel_distance)


def test_a_metric_stands_in_table_json_and_saved_statistics(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for module in (evaluation.statistics, evaluation.evaluator):
        monkeypatch.setattr(module, "METRICS", [*metrics.METRICS, KID])
    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", TinyFeatures)
    rng = np.random.default_rng(0)
    for name, brightest in (("samples", 256), ("reference", 100)):
        np.savez(f"{name}.npz", rng.integers(0, brightest, (20, 8, 8, 3), dtype=np.uint8))

    def score(*arguments):
        evaluate.main([*arguments, "--device=cpu", "--num_samples=20"])
        return capsys.readouterr().out

    said = score("--samples=samples.npz", "--reference=reference.npz")
    found = json.loads(said.splitlines()[-1])
    assert found["metrics"]["KID"] > 0.1 and f"KID        {found['metrics']['KID']:.4f}" in said
    assert found["features"]["KID"] == "pool (12)"
    score("--reference=reference.npz", "--save_stats=stats.npz")
    stored = json.loads(score("--samples=samples.npz", "--reference=stats.npz").splitlines()[-1])
    assert stored["metrics"] == found["metrics"]


def largest_error(reconstructions, images):
    return (reconstructions - images).abs().amax((1, 2, 3))


def test_a_metric_of_reconstructions_stands_in_table_and_json(monkeypatch, tmp_path, fill, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluation.reconstruction.FIGURES, "largest error", largest_error)
    tokenizer = fill(Tokenizer(tiny_tokenizer(patch_size=4, encoder_width=32, decoder_width=32)))
    about = about_model(TOKENIZER, tokenizer.config)
    write_state_dict(tokenizer.state_dict(), tmp_path / "tokenizer.pth", about)
    Path("images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"images/{i}.png")
    evaluate.main([
        "--reconstruction", "--tokenizer=tokenizer.pth", "--data_path=images", "--device=cpu",
        "--num_workers=0", "--batch_size=2",
    ])  # fmt: skip
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])["metrics"]["largest error"]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        made = tokenizer.eval().decode(tokenizer.encode(images))
    assert found == pytest.approx(largest_error(made, images).mean().item(), rel=1e-5)
    assert re.search(rf"largest error +{found:.4f}", said)
