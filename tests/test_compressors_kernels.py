"""Compressors by kernels of our own: the numbers of torch's operators, for every kind of float and of caller."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from vfl import native, random
from vfl.compressors import compressor, kernels
from vfl.compressors.base import Layout
from vfl.compressors.quantize import quantized

SHAPES = ((70, 50), (17,), (), (0, 3), (3, 300))
SIZES = [3500, 17, 1, 900]  # of those with entries
D = sum(SIZES)
EXACT = [
    "bernoulli:0.3",
    "bernoulli:1",
    "bernoulli:1e-300",
    "rand_k:1",
    "rand_k:1%",
    "rand_k:20%",
    "rand_k:99.9%",
    "quantize:1",
    "quantize:8",
    "quantize:16",
    "quantize:4,threshold=0.3",
    "quantize:2,threshold=0.999",
    "natural",
    "qsgd:4",
    "qsgd:65535",
    "standard_dithering:7,norm=3",
    "terngrad",
    "natural_dithering:1",
    "natural_dithering:16",
    "natural_dithering:32,norm=inf",
]
EVERY = [*EXACT, "sign", "compose(bernoulli:0.5,natural,sign)", "switch(sign:0.5,qsgd:3:0.5)"]
UNIT = 2.0**-24
"""u, the relative error of one rounding to float32."""


def stack() -> Tensor:
    """Vectors [..., D] of every size, with zeros of both signs, denormal numbers, infinities and NaN."""
    draw = torch.Generator().manual_seed(0)
    n = lambda: torch.randn(D, generator=draw)  # noqa: E731
    sizes = [n() * size for size in (1, 1e-3, 1e-20, 1e-40, 1e-44, 1e30, 1e38, 3e38)]
    powers = 2.0 ** torch.randint(-149, 128, (D,), generator=draw).float()
    even = [torch.zeros(D), -torch.zeros(D), torch.where(n() > 0, 0.0, -0.0), torch.full((D,), 0.7), powers, -powers]
    rows = [*sizes, *even, n() ** 5, n() * (n() > 2)]
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        for at in (0, 3500, 3517, D - 1):  # of the first layer, the second, the single number, the last
            rows.append(n().index_fill(0, torch.tensor(at), bad))
        rows.append(torch.full((D,), bad))
    rows.append(n().index_fill(0, torch.tensor([3]), math.inf).index_fill(0, torch.tensor([9]), -math.inf))
    return torch.stack(rows)


V = stack()
KEYS = random.split(random.key(3), len(V))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many vectors each run of a kernel has had."""
    found: list[int] = []
    run = kernels._run

    def noted(kernel: Callable[..., None], v: Tensor, *given: Tensor | int) -> None:
        found.append(v.numel() // D)
        run(kernel, v, *given)

    monkeypatch.setattr(kernels, "_run", noted)
    return found


@pytest.fixture
def nothing_built() -> Iterator[None]:
    sources = kernels.NATIVE, random.NATIVE
    before = [source._built for source in sources]
    native._warn.cache_clear()
    for source in sources:
        source._built = None
    yield
    for source, built in zip(sources, before, strict=True):
        source._built = built


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def made(spec: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return vmap(compressor(spec, SHAPES, dtype).compress)


def by_operators(spec: str, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LARGE", 10**9)
        return made(spec)(v, keys)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are the same, but for those of NaN."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("spec", EXACT)
def test_a_kernel_gives_the_operators_numbers_to_the_bit(spec, runs, threads):
    wanted, wanted_bits = by_operators(spec, V, KEYS)
    assert not runs
    for count in (1, 2):
        threads(count)
        value, bits = made(spec)(V, KEYS)
        assert same(value, wanted) and torch.equal(bits, wanted_bits)
        assert set(runs) == {len(V)}
        runs.clear()


def test_signs_are_the_operators_and_their_mean_is_that_of_exact_sums(runs, threads):
    wanted, _ = by_operators("sign", V, KEYS)
    assert not runs
    for count in (1, 2):
        threads(count)
        value, _ = made("sign")(V, KEYS)
        assert torch.equal(value.isnan(), wanted.isnan())
        known = ~value.isnan()
        assert torch.equal(value.signbit()[known], wanted.signbit()[known])
        exact = V.double().abs().mean(-1, keepdim=True)
        # At most 1024 numbers are added in float32, in whatever order; then the sum and the mean are rounded. The mean
        # of denormal numbers is one, too. A sum above the largest float is infinite, as the operators' is.
        error = (value.double().abs() - exact).abs()
        finite = V.isfinite().all(-1) & (exact[:, 0] * D < torch.finfo(torch.float32).max)
        assert (error <= (1024 + 1) * UNIT * exact + 2.0**-150)[finite].all()
        assert same(value[~finite].abs(), wanted[~finite].abs()) and not value[~finite].isfinite().any()
    assert runs == [len(V)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_threshold_of_each_vectors_own_keeps_what_the_operators_keep(dtype, runs, monkeypatch):
    thresholds = torch.linspace(0, 0.999, len(V), dtype=torch.float64)
    ties = V.round(decimals=1)
    for v in (V.to(dtype), ties.to(dtype)):
        found = quantized(v, 3, thresholds, Layout(tuple((size,) for size in SIZES), dtype))
        with monkeypatch.context() as patch:
            patch.setattr(native, "LARGE", 10**9)
            wanted = quantized(v, 3, thresholds, Layout(tuple((size,) for size in SIZES), dtype))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        for row, T, kept in zip(v.numpy(), thresholds.tolist(), found[1].entries.tolist(), strict=True):
            if np.isfinite(row).all():
                layers = np.split(np.abs(row), np.cumsum(SIZES)[:-1])
                assert kept == sum((layer >= np.quantile(layer, T, method="higher")).sum() for layer in layers)
    assert runs == ([len(V)] * 2 if dtype == torch.float32 else [])


def test_coins_are_the_first_random_bits_of_their_keys(runs):
    keys = random.split(random.key(8), 200)
    value, bits = vmap(compressor("bernoulli:0.25", SHAPES).compress, (None, 0))(V[0], keys)
    coins = random.bits(keys, 1).squeeze(-1) < -(2**62)  # a quarter of the 64-bit integers
    assert torch.equal(value, coins[:, None] * V[0] * 4)
    assert torch.equal(bits, torch.where(coins, 32.0 * D, 1.0).double())
    assert runs == [200]


@pytest.mark.parametrize("spec", EVERY)
def test_a_vector_alone_or_among_others_gives_the_same(spec, runs):
    value, bits = made(spec)(V, KEYS)
    compress = compressor(spec, SHAPES).compress
    for n in (0, 3, 8, 9, 10, 20):
        alone, size = compress(V[n], KEYS[n])
        assert same(alone, value[n]) and bits[n] == size
    keys = KEYS[:3]
    shared = vmap(compressor(spec, SHAPES).compress, (None, 0))(V[1], keys).value
    assert same(shared, made(spec)(V[1].expand(3, D).clone(), keys)[0])
    assert len(runs) >= 8


@pytest.mark.parametrize("spec", EXACT)
def test_vectors_that_do_not_lie_side_by_side_are_read_as_they_are(spec, runs):
    strided = torch.stack([V, torch.full_like(V, math.nan)], 2).transpose(0, 1)[..., 0]  # [D, vectors]
    wanted, _ = by_operators(spec, strided.T, KEYS)  # whose norm may be summed in another order than V's
    assert same(vmap(compressor(spec, SHAPES).compress, (1, 0))(strided, KEYS).value, wanted)
    assert set(runs) == {len(V)}


@pytest.mark.parametrize("spec", EVERY)
def test_who_watches_the_operators_sees_them(spec, runs):
    v, keys = V[:2], KEYS[:2]
    wanted = by_operators(spec, v, keys)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Watching():
        assert same(made(spec)(v, keys)[0], wanted[0])
    assert same(make_fx(made(spec))(v, keys)(v, keys)[0], wanted[0])
    if "quantize" not in spec:  # whose operators change parts in place, which autograd refuses
        assert same(made(spec)(v.clone().requires_grad_(), keys)[0].detach(), wanted[0])
        assert same(torch.func.vjp(lambda v: made(spec)(v, keys)[0], v)[0], wanted[0])
    assert not runs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_floats_are_left_to_the_operators(dtype, runs):
    for spec in EVERY:
        made(spec, dtype)(V[:2].to(dtype), KEYS[:2])
    assert not runs


@pytest.mark.usefixtures("nothing_built")
def test_small_vectors_need_no_compiler(monkeypatch, runs):
    monkeypatch.setattr(native.Source, "built", lambda _: pytest.fail("built"))
    v = torch.ones(3, native.LARGE - 1)
    for spec in EVERY:
        vmap(compressor(spec, [v.shape[1:]]).compress)(v, KEYS[:3])
    assert not runs


@pytest.mark.usefixtures("nothing_built")
def test_without_a_compiler_the_operators_serve_and_one_warning_says_so(monkeypatch, caplog, tmp_path, runs):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    for spec in EVERY:
        assert same(made(spec)(V, KEYS)[0], by_operators(spec, V, KEYS)[0])
    (record,) = caplog.records
    assert "building vfl's C++ failed" in record.message and "no-such-compiler" in record.message
    assert not runs
