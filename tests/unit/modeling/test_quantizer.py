import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modeling import quantizer as quantizer_module
from modeling.quantizer import (
    FLOAT32_SETTINGS,
    VectorQuantizer,
    full_float32,
    old_settings,
    squared_distances,
)

CODES, SIZE = 16, 4


def quantizer(clustering=False):
    model = VectorQuantizer(CODES, SIZE, clustering)
    torch.nn.init.normal_(model.embedding.weight)
    return model


def brute_force(z, codebook):
    return torch.tensor([[(codebook - v).square().sum(1).argmin() for v in row] for row in z])


# ---------------------------------------------------------------------- quantization
def test_nearest_is_that_of_brute_force():
    model, z = quantizer(), torch.randn(3, 50, SIZE)
    assert torch.equal(model.encode(z), brute_force(z, model.embedding.weight))


def test_vectors_are_not_normalised_before_comparing():
    model = VectorQuantizer(2, 2, clustering=False)
    model.embedding.weight.data = torch.tensor([[1.0, 0.0], [10.0, 10.0]])
    assert model.encode(torch.tensor([[[1.0, 1.0]]])).item() == 0  # by angle it would be 1


def test_output_is_the_chosen_codes():
    model, z = quantizer(), torch.randn(2, 5, SIZE)
    vectors, codes, _ = model(z)
    torch.testing.assert_close(vectors, model.embedding.weight[codes])


def test_gradient_of_the_vectors_passes_straight_through():
    model = quantizer()
    z = torch.randn(2, 5, SIZE, requires_grad=True)
    upstream = torch.randn(2, 5, SIZE)
    (model(z)[0] * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)
    assert model.embedding.weight.grad is None


def test_loss_by_hand():
    model = VectorQuantizer(2, 2, clustering=False)
    model.embedding.weight.data = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    z = torch.tensor([[[1.0, 0.0], [4.0, 3.0]]])
    assert model(z)[2].item() == pytest.approx(1.25 * (1 + 0 + 0 + 9) / 4)


def test_loss_pulls_the_code_four_times_as_hard_as_the_encoder():
    model = VectorQuantizer(1, 2, clustering=False)
    model.embedding.weight.data.zero_()
    z = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
    model(z)[2].backward()
    # d/dz of 0.25·mean(z²) and d/de of mean((e - z)²)
    torch.testing.assert_close(z.grad, torch.tensor([[[0.25, 0.75]]]))
    torch.testing.assert_close(model.embedding.weight.grad, torch.tensor([[-1.0, -3.0]]))


def test_autocast_leaves_codes_vectors_and_loss_in_float32():
    # 2⁻¹⁰ apart: bfloat16 cannot tell these codes from each other.
    model = VectorQuantizer(8, 2, clustering=False)
    model.embedding.weight.data = 1 + torch.arange(8.0)[:, None].repeat(1, 2) / 1024
    z = model.embedding.weight.detach()[None].clone()
    with torch.autocast("cpu", torch.bfloat16):
        vectors, codes, loss = model(z)
    assert codes.tolist() == [list(range(8))]
    assert vectors.dtype == loss.dtype == torch.float32
    assert torch.equal(vectors, z) and loss == 0


def test_half_precision_input_is_raised_to_float32():
    vectors, _, loss = quantizer()(torch.randn(1, 3, SIZE, dtype=torch.bfloat16))
    assert vectors.dtype == loss.dtype == torch.float32


# ---------------------------------------------------------------------- precision of products
def products():
    """How float32 matrices are multiplied now."""
    return [setting.fp32_precision for setting in FLOAT32_SETTINGS]


@pytest.fixture(params=["tf32 by the old name", "tf32", "cudnn by the new", "medium", "autocast"])
def loose_products(request):
    """The ways in which a program makes float32 products less exact."""
    cuda, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before, setting = torch.get_float32_matmul_precision(), cuda.fp32_precision
    allowed = conv.allow_tf32
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=request.param == "autocast")
    if request.param == "tf32 by the old name":
        cuda.allow_tf32 = conv.allow_tf32 = True
    if request.param == "tf32":
        cuda.fp32_precision = "tf32"
    if request.param == "cudnn by the new":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # against the default of its old name
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")  # bfloat16, also on CPUs that have it
    with autocast:
        yield
    torch.set_float32_matmul_precision(before)
    conv.allow_tf32 = allowed
    cuda.fp32_precision = setting
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def near_ties():
    """Vectors whose nearest code a product of 8 or 11 bits often gets wrong."""
    model = VectorQuantizer(2048, 32, clustering=True)
    torch.nn.init.normal_(model.embedding.weight)
    model.embed_prob.uniform_(0, 1e-6)
    return model, torch.randn(4, 128, 32)


def test_codes_and_clustering_are_full_float32(loose_products, monkeypatch):
    model, z = near_ties()
    seen, found = [], {}

    def watched(*given):
        result = squared_distances(*given)
        # Read as kernels read them: this raises where torch's old and new settings disagree.
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        seen.append((products(), tf32, torch.is_autocast_enabled("cpu"), result.dtype))
        return result

    monkeypatch.setattr(quantizer_module, "squared_distances", watched)
    around = products(), old_settings()
    found["codes"] = model.encode(z)
    found["forward"] = model(z)[1]
    compiled = torch.compile(model, backend="aot_eager")
    found["compiled"] = compiled(z.requires_grad_())[1]
    start = model.embedding.weight.detach().clone()
    model.before_update(z.detach().flatten(0, 1))
    assert seen == [(["ieee"] * 5, (False, False), False, torch.float32)] * 4
    assert (products(), old_settings()) == around  # as they were
    exact = torch.cdist(z.detach().double(), start.double()).argmin(2)
    for codes in found.values():
        assert (codes == exact).float().mean() > 0.999
        assert torch.equal(codes, found["codes"])


def test_bfloat16_products_of_this_cpu_would_change_codes():
    # That the test above has something to find here.
    model, z = near_ties()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    loose = squared_distances(z.flatten(0, 1), model.embedding.weight)
    torch.set_float32_matmul_precision(before)
    if torch.equal(loose, squared_distances(z.flatten(0, 1), model.embedding.weight)):
        pytest.skip("a CPU that multiplies in float32 whatever the setting: x86 without AMX")
    assert (loose.argmin(1).view(4, 128) != model.encode(z)).any()


def test_precision_of_products_is_restored_after_an_error():
    before = products()
    with pytest.raises(ValueError), full_float32("cpu"):
        raise ValueError
    assert products() == before


@pytest.mark.gpu
def test_tf32_leaves_codes_and_clustering_alone_on_cuda():
    model, z = near_ties()
    model, z = model.cuda(), z.cuda()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    results = {}
    for allow in (False, True):
        model.load_state_dict(state)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
        with torch.autocast("cuda", torch.bfloat16, enabled=allow):
            results[allow] = [model.encode(z), torch.compile(model)(z)[1]]
            loose = squared_distances(z.flatten(0, 1), model.embedding.weight).argmin(1)
            model.before_update(z.flatten(0, 1))
        results[allow] += [v.clone() for v in model.state_dict().values()]
        assert torch.backends.cuda.matmul.allow_tf32 is allow
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True]))
    assert (loose.view(4, 128) != results[True][0]).any()  # there was something to find


def test_only_clustering_adds_a_buffer():
    assert set(quantizer().state_dict()) == {"embedding.weight"}
    assert set(quantizer(clustering=True).state_dict()) == {"embedding.weight", "embed_prob"}


# ---------------------------------------------------------------------- clustering
def test_clustering_is_the_published_formula():
    model, z = quantizer(clustering=True), torch.randn(40, SIZE)
    model.embed_prob.uniform_(0, 2e-4)
    before, share = model.embedding.weight.detach().clone(), model.embed_prob.clone()
    codes = brute_force(z[None], before)[0]
    model.before_update(z)
    for code in range(CODES):
        p = 0.99 * share[code] + 0.01 * (codes == code).float().mean()
        a = math.exp(-10 * CODES * p / (1 - 0.99) - 1e-3)
        closest = z[(z - before[code]).square().sum(1).argmin()]
        expected = (1 - a) * before[code] + a * closest
        assert model.embed_prob[code].item() == pytest.approx(p.item(), rel=1e-5)
        torch.testing.assert_close(model.embedding.weight[code].detach(), expected)


def test_clustering_leaves_used_codes_in_place():
    model = quantizer(clustering=True)
    before = model.embedding.weight.detach().clone()
    z = before.repeat(5, 1) + 0.01  # every code is chosen by a sixteenth of the batch
    model.embed_prob.fill_(1 / CODES)
    model.before_update(z)
    moved = (model.embedding.weight - before).abs().max()
    assert moved < 0.01 * math.exp(-9)  # 0.01 away, a = exp(-10 - 1e-3)


def test_clustering_moves_dead_codes_onto_the_data():
    model = quantizer(clustering=True)
    model.embedding.weight.data[1:] += 100  # all but code 0 are far from everything
    z = torch.randn(30, SIZE)
    dead = model.embedding.weight.detach()[1:].clone()
    model.before_update(z)
    closest = z[torch.cdist(dead, z).argmin(1)]
    after = model.embedding.weight.detach()[1:]
    assert torch.allclose(after, closest, atol=0.3)  # a = exp(-1e-3) of some 200 to go


def test_clustering_keeps_the_shares_a_distribution():
    model = quantizer(clustering=True)
    model.embed_prob.fill_(1 / CODES)
    for _ in range(3):
        model.before_update(torch.randn(30, SIZE))
    assert model.embed_prob.sum().item() == pytest.approx(1, abs=1e-5)


def test_clustering_leaves_no_gradient_graph():
    model = quantizer(clustering=True)
    model.before_update(torch.randn(30, SIZE, requires_grad=True))
    assert model.embedding.weight.is_leaf and model.embedding.weight.requires_grad
    assert not model.embed_prob.requires_grad


def cluster_share(rank, folder):
    """One of two processes: cluster with its half of the batch, then save the outcome."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        given = torch.load(f"{folder}/given.pt")
        model = VectorQuantizer(CODES, SIZE, clustering=True)
        model.load_state_dict(given["model"])
        for batch in given["batches"]:
            model.before_update(batch.chunk(2)[rank])
        torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_cluster_as_one_process_with_the_whole_batch(tmp_path):
    model = quantizer(clustering=True)
    model.embed_prob.uniform_(0, 2e-4)
    batches = [torch.randn(40, SIZE) for _ in range(2)]
    batches[0][30] = batches[0][5]  # a tie between the ranks
    torch.save({"model": model.state_dict(), "batches": batches}, tmp_path / "given.pt")
    other = mp.spawn(cluster_share, (str(tmp_path),), nprocs=1, join=False)  # rank 0
    cluster_share(1, str(tmp_path))
    other.join()
    for batch in batches:
        model.before_update(batch)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, expected in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected)
