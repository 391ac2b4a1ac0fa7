"""What surrounds the numbers of the engine: memory, compiling, types, options. Codes: test_sampling."""

import contextlib
import gc
import shutil
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from modeling import compiling
from modeling import engine as engine_module
from modeling.decode_attention import filled, plain_attention
from modeling.devices import free_memory
from modeling.engine import Engine, StepFunctions, cache_bytes, copy_to
from modeling.generator import Generator
from modeling.sampling import DRAWN, Sampling
from tests.tiny import sample_codes, tiny_generator

compiles_on_cpu = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="compiling for a CPU needs a C++ compiler"),
]


def config(**changes):
    return tiny_generator(**{"num_hidden_layers": 3, **changes})


@pytest.fixture
def model(fill):
    return fill(Generator(config()))


def inputs(batch=4, steps=7):
    return torch.arange(batch) % 3, torch.rand(batch, steps)


# ---------------------------------------------------------------------- memory
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_is_free_after_del_without_the_garbage_collector(model, traced, compiled):
    engine = Engine(model, 4, Sampling(3.0), compiled=compiled)
    engine.sample(*inputs())
    assert engine.compiled == compiled
    block, cache = engine.blocks[0], engine.caches[0]
    watched = (engine, cache.k, block.w13, block.qkv)
    alive = [weakref.ref(x) for x in watched]
    gc.disable()
    try:
        del engine, block, cache, watched
        assert [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_the_bytes_of_the_caches(model, dtype, scale, cache):
    engine = Engine(model, 5, Sampling(scale), dtype, cache=cache)
    tensors = [x for c in engine.caches for x in c if x is not None]
    total = sum(x.numel() * x.element_size() for x in tensors)
    assert total == 5 * cache_bytes(model.config, Sampling(scale), dtype, cache)


def test_keys_and_values_are_separate_allocations_of_exactly_the_positions(model):
    storages = [
        x.untyped_storage()
        for cache in Engine(model, 4, Sampling()).caches
        for x in (cache.k, cache.v)
    ]
    assert len({s.data_ptr() for s in storages}) == 6
    assert {s.nbytes() for s in storages} == {4 * 7 * 32 * 4}


@pytest.mark.parametrize("compiled", [False, True])
def test_positions_that_are_not_filled_are_not_read(model, traced, compiled):
    labels, uniforms = inputs()
    engine = Engine(model, 4, Sampling(3.0), compiled=compiled)
    expected = engine.sample(labels, uniforms)
    with torch.inference_mode():
        for cache in engine.caches:
            cache.k.fill_(torch.nan)
            cache.v.fill_(torch.nan)
    assert torch.equal(engine.sample(labels, uniforms), expected)


# ---------------------------------------------------------------------- compiling
def test_no_compiled_function_sees_the_cache_where_attention_is_fused(model, traced):
    """Inductor copies a mutated input whole where it cannot prove that it need not."""
    engine = Engine(model, 4, Sampling(3.0), compiled=True)
    engine.layers_whole = False
    engine.fused = lambda *given: plain_attention(*given[:3], int(given[3]), given[4])
    caches = {x.data_ptr() for c in engine.caches for x in (c.k, c.v)}
    seen = []

    def watch(function):
        def call(*arguments):
            flat = torch.utils._pytree.tree_leaves(arguments)
            seen.extend(x for x in flat if isinstance(x, torch.Tensor))
            return function(*arguments)

        return call

    engine.functions = StepFunctions(*map(watch, engine.functions))
    engine.sample(*inputs())
    assert len(seen) > 100
    assert not {x.untyped_storage().data_ptr() for x in seen} & caches


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_compiled_engine_of_few_codes_draws_the_eager_ones(fill, traced, steps):
    """Compiling takes the first, the second and the last step."""
    model = fill(Generator(config(image_seq_len=steps)))
    given = inputs(3, steps)
    expected = Engine(model, 3, Sampling(3.0)).sample(*given)
    engine = Engine(model, 3, Sampling(3.0), compiled=True)
    assert engine.compiled
    assert torch.equal(engine.sample(*given), expected)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=compiles_on_cpu)])
def test_compiled_step_takes_no_longer_than_eager_whatever_the_capacity(fill, compiled):
    """In processor time. With the whole cache copied, a step took ten times as much."""
    model = fill(Generator(config(hidden_size=64, image_seq_len=273)))
    times = {}
    for way in (False, compiled):
        engine = Engine(model, 64, Sampling(3.0), compiled=way)
        assert engine.compiled == way
        rounds = []
        for _ in range(5):
            began = time.process_time()
            with torch.inference_mode():
                engine.position.zero_()
                for t in range(7):
                    engine._step(t)
            rounds.append(time.process_time() - began)
        times[way] = min(rounds)
    assert times[True] < 1.5 * times[False]


@pytest.mark.parametrize(
    "dtype, cache, batch, length",
    [
        (torch.float32, "auto", 64, 273),  # the programs of the test above
        (torch.float32, "int8", 4, 21),
        (torch.bfloat16, "auto", 4, 21),
    ],
    ids=["fp32", "int8", "bf16"],
)
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=compiles_on_cpu)])
def test_compiled_layers_keep_the_logits_and_need_no_program_while_sampling(
    fill, dtype, cache, batch, length, compiled
):
    model = fill(Generator(config(hidden_size=64, image_seq_len=length)))
    labels, uniforms = inputs(batch, length)
    seen = []
    for way in (False, compiled):
        engine = Engine(model, batch, Sampling(3.0), dtype, way, cache=cache)
        assert engine.compiled == way
        programs = counters["stats"]["unique_graphs"]
        with torch.inference_mode():
            for part in (x for c in engine.caches for x in c if x is not None):
                part.fill_(torch.nan if part.is_floating_point() else 127)
        choose, steps = engine.functions.choose, []
        engine.functions = engine.functions._replace(
            choose=lambda x, *rest, f=choose, s=steps: s.append(x.clone()) or f(x, *rest)
        )
        codes = engine.sample(labels, uniforms)
        assert counters["stats"]["unique_graphs"] == programs
        seen.append((codes, torch.stack(steps)))
    (codes, logits), (other_codes, other_logits) = seen
    # Other rounding may draw another code; the image differs from there on.
    same = (codes == other_codes).cumprod(1)[:, :-1].bool()  # (B, T-1): the inputs of steps 1…
    assert same.float().mean() > 0.5
    same = torch.cat([torch.ones(batch, 1, dtype=torch.bool), same], 1).T.repeat(1, 2)  # (T, N)
    error = (logits - other_logits)[same].std() / logits[same].std()
    assert error < (1e-5 if dtype == torch.float32 and cache == "auto" else 0.02)


def test_three_sizes_in_two_types_fit_into_one_process(fill, traced, recwarn):
    """More programs of one function than Dynamo keeps by default: it would run the rest eagerly."""
    for size in (32, 64, 96):
        model = fill(Generator(config(hidden_size=size)))
        for dtype in (torch.float32, torch.bfloat16):
            engine = Engine(model, 2, Sampling(3.0), dtype, compiled=True)
            assert engine.compiled
            engine.sample(*inputs(2))
    assert not [w for w in recwarn if "not compiled" in str(w.message)]


@pytest.mark.parametrize("at_once", [False, True])
def test_engine_that_does_not_compile_says_so_once_and_stays_eager(model, monkeypatch, at_once):
    def fail(*arguments, **options):
        raise RuntimeError("the compiler\nis broken")

    labels, uniforms = inputs()
    expected = Engine(model, 4, Sampling(3.0)).sample(labels, uniforms)
    # torch.compile itself fails if Python is too new for it.
    monkeypatch.setattr(torch, "compile", fail if at_once else lambda *_, **__: fail)
    with pytest.warns(
        UserWarning, match=r"is not compiled.*: RuntimeError: the compiler$"
    ) as caught:
        engine = Engine(model, 4, Sampling(3.0), compiled=True)
    assert len(caught) == 1 and not engine.compiled
    assert torch.equal(engine.sample(labels, uniforms), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_captured_on_a_stream_of_the_engines_gpu_or_not_at_all(
    model, monkeypatch, recwarn, fails
):
    """With stand-ins for CUDA's streams and graphs: what is asked of them, and what a failure leaves."""
    given = inputs()
    expected = Engine(model, 4, Sampling(guidance_scale=2)).sample(*given)
    engine = Engine(model, 4, Sampling(guidance_scale=2))
    positions = []  # of the state, when one stream is told to wait for the other
    note = lambda _: positions.append(engine.position.item())  # noqa: E731
    current, side = (SimpleNamespace(wait_stream=note) for _ in range(2))
    captured, made_current = [], []

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        captured.append((stream, capture_error_mode))
        yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "set_stream", made_current.append)
    with torch.inference_mode():
        engine.position.fill_(5)  # wherever compiling has left it
        engine._capture()
    assert positions == [0, 1]  # set before the side stream waits, and one step later
    assert captured == [
        (side, "thread_local")
    ]  # not torch's own, which stays on the first engine's GPU
    said = [str(w.message) for w in recwarn if "uses no CUDA graph" in str(w.message)]
    assert len(said) == fails and (engine.graph is None) == fails
    assert made_current == [current] * fails
    if fails:
        assert "not permitted when stream is capturing" in said[0]
        assert torch.equal(engine.sample(*given), expected)


def test_functions_are_compiled_whole_for_fixed_shapes_without_choices_by_timing(monkeypatch):
    options = {}
    monkeypatch.setattr(torch, "compile", lambda function, **given: options.update(given))
    compiling.compile_function(engine_module.between)
    assert options == {"dynamic": False, "fullgraph": True, "options": {"deterministic": True}}


# ---------------------------------------------------------------------- types and devices
def test_output_layer_computes_in_float32(model, monkeypatch):
    linear, types = engine_module.linear, []

    def watch(x, weight, bias=None):
        types.append((len(weight), x.dtype))
        return linear(x, weight, bias)

    monkeypatch.setattr(engine_module, "linear", watch)
    Engine(model, 4, Sampling(3.0), torch.bfloat16).sample(*inputs())
    assert {dtype for size, dtype in types if size == 16} == {torch.float32}
    assert {dtype for size, dtype in types if size != 16} == {torch.bfloat16}


def test_embeddings_and_norms_stay_float32(model):
    engine = Engine(model, 4, Sampling(), torch.bfloat16)
    block = engine.blocks[0]
    floats = (engine.embeddings, engine.norm, engine.output, block.norm1, block.qk_norm)
    assert {x.dtype for x in floats} == {torch.float32}
    assert {x.dtype for x in (block.qkv, block.w13, block.w2, block.proj)} == {torch.bfloat16}


def test_engine_works_on_its_own_gpu_not_on_the_current_one(model, monkeypatch):
    engine, made = Engine(model, 4, Sampling()), []
    engine.device = torch.device("cuda:1")
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: made.append(device) or contextlib.nullcontext()
    )
    with engine.on_device():
        assert made == [torch.device("cuda:1")]


def test_free_memory_counts_what_the_allocator_holds_without_using_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda")) == 130


def test_what_travels_to_a_gpu_is_pinned():
    copied = []
    target = SimpleNamespace(is_cuda=True, copy_=lambda x, non_blocking: copied.append(x))
    copy_to(target, SimpleNamespace(is_cuda=False, pin_memory=lambda: "pinned"))
    on_device = SimpleNamespace(is_cuda=True)
    copy_to(target, on_device)
    assert copied == ["pinned", on_device]


# ---------------------------------------------------------------------- int8 cache
def test_int8_cache_keeps_the_logits_near_float32(fill):
    model = fill(Generator(config(hidden_size=64, image_seq_len=21)))
    labels, uniforms = inputs(3, 21)
    logits = {}
    for cache in ("auto", "int8"):
        engine = Engine(model, 3, Sampling(3.0), cache=cache)
        functions, steps = engine.functions, []
        # The codes of every step are the first one's, so that both see the same sequence.
        engine.functions = functions._replace(
            choose=lambda x, given, uniform, *rest, s=steps: (
                s.append(x.clone()) or (uniform * 16).long()
            )
        )
        engine.sample(labels, uniforms)
        logits[cache] = torch.stack(steps)
    error = (logits["int8"] - logits["auto"]).std(-1) / logits["auto"].std(-1)
    assert 0 < error.max() < 0.03


# ---------------------------------------------------------------------- prefix
PREFIX_LENGTHS = [0, 1, 3, 6, 7]  # of 7 codes


def stepping_through(engine, prefix):
    """The engine, whose first steps draw the codes of the prefix (B, n)."""
    functions, calls = engine.functions, iter(range(10**6))

    def choose(*arguments):
        t, drawn = next(calls), functions.choose(*arguments)
        return prefix[:, t] if t < prefix.shape[1] else drawn

    engine.functions = functions._replace(choose=choose)
    return engine


def poison(engine):
    """Whatever is read of the caches before it is written is not a number."""
    with torch.inference_mode():
        for cache in engine.caches:
            for tensor in cache[:2] if cache.k_scale is None else cache[2:]:
                tensor.fill_(torch.nan)
    return engine


@pytest.mark.parametrize("n", PREFIX_LENGTHS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_prefix_is_what_stepping_through_its_codes_is(model, n, scale, cache):
    labels, uniforms = inputs()
    prefix = torch.randint(16, (4, n))
    first, second = (poison(Engine(model, 4, Sampling(scale), cache=cache)) for _ in range(2))
    codes = first.sample(labels, uniforms, prefix)
    assert torch.equal(codes, stepping_through(second, prefix).sample(labels, uniforms))
    assert torch.equal(codes[:, :n], prefix)
    assert first.position.item() == second.position.item() == 7
    for a, b in zip(first.caches, second.caches):
        for x, y in zip(filled(a, 7), filled(b, 7)):
            # In int8, rounding may end on either side: one of 127 steps.
            allowed = 1e-5 if cache == "auto" else 1.01 * y.abs().amax(-1, True) / 127
            assert ((x - y).abs() <= allowed).all()  # NaN is not


@pytest.mark.parametrize("n", PREFIX_LENGTHS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_codes_behind_a_prefix_are_those_of_the_plain_loop(model, n, scale):
    labels, uniforms = inputs(3)
    prefix = torch.randint(16, (3, n))
    expected = sample_codes(model, labels, uniforms, Sampling(scale), prefix)
    codes = Engine(model, 4, Sampling(scale)).sample(labels, uniforms, prefix)
    assert torch.equal(codes, expected)  # of a batch that is not full
    if 0 < n < 7:
        others = sample_codes(model, labels, uniforms, Sampling(scale), (prefix + 1) % 16)
        assert not torch.equal(others[:, n:], expected[:, n:])  # they depend on it


def test_drawn_codes_as_a_prefix_change_nothing(model):
    labels, uniforms = inputs()
    engine = Engine(model, 4, Sampling(3.0))
    codes = engine.sample(labels, uniforms)
    for n in PREFIX_LENGTHS:
        assert torch.equal(engine.sample(labels, uniforms, codes[:, :n]), codes)


def prefill_passes(monkeypatch):
    """The rows and positions (N, n) of each pass of a prefill, which ends with keys and values alone."""
    passes, write = [], engine_module.write_positions
    monkeypatch.setattr(
        engine_module,
        "write_positions",
        lambda qkv, *rest: passes.append(qkv.shape[:2]) or write(qkv, *rest),
    )
    return passes


def test_a_prefix_costs_one_pass_and_no_steps(model, monkeypatch):
    passes, steps = prefill_passes(monkeypatch), []
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self, t: steps.append(t) or step(self, t))
    labels, uniforms = inputs()
    Engine(model, 4, Sampling(3.0)).sample(labels, uniforms, torch.ones(4, 5).long())
    assert passes == [(8, 5)] and steps == [5, 6]  # 4 images with and without class


def test_a_large_prefill_is_cut_into_parts_that_change_nothing(model, monkeypatch):
    labels, uniforms = inputs()
    prefix = torch.randint(16, (4, 5))
    engine = Engine(model, 4, Sampling(3.0))
    expected = engine.sample(labels, uniforms, prefix)
    monkeypatch.setattr(engine_module, "PREFILLED_AT_ONCE", 16)
    passes = prefill_passes(monkeypatch)
    assert torch.equal(poison(engine).sample(labels, uniforms, prefix), expected)
    assert passes == [(3, 5), (3, 5), (2, 5)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_given_codes_stay_where_they_are_and_the_plain_loop_agrees(model, traced, scale, compiled):
    labels, uniforms = inputs(3)
    given = torch.randint(16, (3, 7))
    given[:, [2, 5]], given[1, 0] = DRAWN, DRAWN
    engine = Engine(model, 4, Sampling(scale), compiled=compiled)
    codes = engine.sample(labels, uniforms, given)
    assert torch.equal(codes, sample_codes(model, labels, uniforms, Sampling(scale), given))
    known = given != DRAWN
    assert torch.equal(codes[known], given[known]) and (codes >= 0).all()
    others = engine.sample(labels, uniforms.flip(1), given)
    assert not torch.equal(others[~known], codes[~known])  # they are drawn
    whole = engine.sample(labels, uniforms)  # nothing of the edit is left
    assert torch.equal(whole, sample_codes(model, labels, uniforms, Sampling(scale)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_engine_takes_a_prefix(model, traced, dtype):
    labels, uniforms = inputs()
    prefix = torch.randint(16, (4, 4))
    engine = Engine(model, 4, Sampling(3.0), dtype, compiled=True)
    assert engine.compiled
    expected = Engine(model, 4, Sampling(3.0), dtype).sample(labels, uniforms, prefix)
    assert torch.equal(engine.sample(labels, uniforms, prefix), expected)
