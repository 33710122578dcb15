"""Compressors: the laws that theory asks of them, their values from the definitions, and their sizes to the bit."""

import functools
import itertools
import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from vfl import UsageError, random
from vfl.compressors import COMPRESSORS, Compressor, compressor
from vfl.leafwise import leafwise

SHAPES = ((4, 5), (3,), ())  # a matrix, a vector and a scalar
D = 24
KEY = random.key(5)
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
Array = np.ndarray

UNBIASED = [
    "bernoulli:0.3",
    "rand_k:1",
    "rand_k:25%",
    "natural",
    "standard_dithering:1",
    "standard_dithering:3,norm=1",
    "qsgd:4",
    "qsgd:7",
    "natural_dithering:3",
    "natural_dithering:6,norm=inf",
    "terngrad",
    "compose(natural,rand_k:6)",
    "compose(bernoulli:0.5,rand_k:50%)",
    "compose(rand_k:0.5,qsgd:2)",
    "switch(identity:0.1,rand_k:0.25:0.9)",
    "switch(natural:0.5,compose(bernoulli:0.5,standard_dithering:4,norm=inf):0.5)",
]
BIASED = [
    "top_k:1",
    "top_k:25%",
    "rank_k:1",
    "rank_k:2",
    "sign",
    "compose(top_k:25%,natural)",
    "switch(identity:0.25,top_k:5:0.75)",
    "switch(natural:0.5,sign:0.5)",
]
WITHOUT_CONSTANTS = [
    "quantize:1",
    "quantize:4",
    "quantize:4,threshold=0.7",
    "compose(natural,top_k:25%)",
    "compose(top_k:50%,sign)",
]
EVERY = ["identity", "rank_k:3", *UNBIASED, *BIASED, *WITHOUT_CONSTANTS]


def made(spec: str, dtype: torch.dtype = torch.float64) -> Compressor:
    return compressor(spec, SHAPES, dtype)


def vectors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Vectors [D] that are even, sparse, heavy-tailed and of both signs."""
    draw = np.random.default_rng(4)
    one = np.zeros(D)
    one[7] = -3.0
    found = {"normal": draw.standard_normal(D), "heavy": draw.standard_t(3, D), "even": np.full(D, 0.7), "one": one}
    return {name: torch.from_numpy(v).to(dtype) for name, v in found.items()}


@functools.cache
def draws(spec: str, name: str, dtype: torch.dtype = torch.float64, count: int = 10_000) -> Array:
    """C(v) for so many keys, v of this name: [count, D]."""
    keys = random.split(KEY, count)
    return vmap(made(spec, dtype).compress, (None, 0))(vectors(dtype)[name], keys).value.to(torch.float64).numpy()


def mean_error(samples: Array, v: Tensor) -> tuple[float, float]:
    """The mean of ‖C(v) − v‖²/‖v‖² and its standard error."""
    wide = v.to(torch.float64).numpy()
    errors = ((samples - wide) ** 2).sum(1) / (wide**2).sum()
    return float(errors.mean()), float(errors.std() / math.sqrt(len(errors)))


def test_every_compressor_by_name_is_among_those_tested():
    assert all(any(name in spec for spec in EVERY) for name in COMPRESSORS)


# Laws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", UNBIASED)
def test_an_unbiased_compressor_has_its_input_as_mean(spec, dtype):
    c = made(spec, dtype)
    assert c.omega is not None
    for name, v in vectors(dtype).items():
        samples, wide = draws(spec, name, dtype), v.to(torch.float64).numpy()
        slack = 4 * samples.std(0) / math.sqrt(len(samples)) + 1e-6 * np.abs(wide)  # the norms are floats themselves
        assert (np.abs(samples.mean(0) - wide) <= slack).all()
        # Coins shared between entries would keep the mean of each but not that of products.
        if "rand_k" not in spec and "bernoulli" not in spec and "switch" not in spec:
            assert np.isclose(samples.sum(1).var(), samples.var(0).sum(), rtol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", UNBIASED)
def test_the_variance_of_an_unbiased_compressor_is_within_omega(spec, dtype):
    c = made(spec, dtype)
    for name, v in vectors(dtype).items():
        error, uncertain = mean_error(draws(spec, name, dtype), v)
        assert error <= c.omega + 4 * uncertain + 1e-12
        assert c.alpha is None or error <= 1 - c.alpha + 4 * uncertain + 1e-12


def worst(spec: str) -> Tensor:
    """A vector for which the compressor's ω is reached."""
    if spec == "natural":
        return 4 / 3 * 2.0 ** torch.arange(-12, 12, dtype=torch.float64)
    v = torch.full((D,), 1.0, dtype=torch.float64)
    if spec == "terngrad":
        v[3] = -(math.sqrt(D) + 1)
    return v


TIGHT = ["bernoulli:0.3", "rand_k:1", "rand_k:25%", "natural", "terngrad", "compose(bernoulli:0.5,rand_k:50%)",
         "switch(identity:0.1,rand_k:0.25:0.9)"]  # fmt: skip


@pytest.mark.parametrize("spec", TIGHT)
def test_omega_is_reached_by_the_worst_vector(spec):
    c, v = made(spec), worst(spec)
    values = vmap(c.compress, (None, 0))(v, random.split(KEY, 10_000)).value
    error, uncertain = mean_error(values.numpy(), v)
    assert abs(error - c.omega) <= 4 * uncertain + 1e-9
    assert uncertain < 0.03 * c.omega


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", BIASED)
def test_a_contractive_compressor_contracts_by_alpha(spec, dtype):
    c = made(spec, dtype)
    assert c.omega is None and c.alpha is not None and 0 < c.alpha < 1
    for name, v in vectors(dtype).items():
        error, uncertain = mean_error(draws(spec, name, dtype, 2000), v)
        assert error <= 1 - c.alpha + 4 * uncertain + 1e-6


def worst_to_contract(spec: str) -> Tensor:
    v = torch.ones(D, dtype=torch.float64)
    if spec.startswith("rank_k"):  # the matrix layer alone, all of its singular values the same
        v = torch.cat([torch.eye(4, 5, dtype=torch.float64).flatten(), torch.zeros(4, dtype=torch.float64)])
    if spec == "sign":
        v = torch.nn.functional.one_hot(torch.tensor(3), D).to(torch.float64)
    return v


@pytest.mark.parametrize("spec", ["top_k:1", "top_k:25%", "rank_k:1", "rank_k:2", "sign"])
def test_alpha_is_reached_by_the_worst_vector(spec):
    c, v = made(spec), worst_to_contract(spec)
    error, _ = mean_error(c.compress(v, KEY).value.numpy()[None], v)
    assert error == pytest.approx(1 - c.alpha, abs=1e-12)


def test_constants_are_those_of_theory():
    root = math.sqrt(D)
    omegas = {
        "identity": 0,
        "bernoulli:0.3": 1 / 0.3 - 1,
        "rand_k:6": 3,
        "natural": 1 / 8,
        "qsgd:4": min(D / 16, root / 4),
        "qsgd:16": D / 256,
        "natural_dithering:3": 1 / 8 + root / 4,
        "natural_dithering:6": 1 / 8 + (root / 32) ** 2,
        "terngrad": (root - 1) / 2,
        "compose(natural,rand_k:6)": 9 / 8 * 4 - 1,
        "switch(identity:0.1,rand_k:6:0.9)": 2.7,
    }
    assert {spec: made(spec).omega for spec in omegas} == pytest.approx(omegas)
    alphas = {
        "identity": 1,
        "top_k:6": 1 / 4,
        "rank_k:1": 1 / 4,
        "sign": 1 / D,
        "natural": 7 / 8,
        "compose(top_k:6,natural)": 7 / 32,
        "compose(identity,top_k:6)": 1 / 4,
        "switch(sign:0.5,top_k:6:0.5)": (1 / D + 1 / 4) / 2,
    }
    assert {spec: made(spec).alpha for spec in alphas} == pytest.approx(alphas)
    # A contraction of 7/8 after another need not contract; nor is an ω of 1 or more a contraction.
    for spec in ("rand_k:6", "compose(natural,top_k:6)", "quantize:8"):
        assert made(spec).alpha is None
    for spec in ("top_k:100%", "sign", "rank_k:1"):
        assert compressor(spec, [(1,)]).omega == 0


# Values, from the definitions


def test_top_k_keeps_the_largest():
    v = vectors()["heavy"]
    wanted = np.where(np.argsort(np.argsort(-np.abs(v.numpy()))) < 6, v.numpy(), 0)
    np.testing.assert_array_equal(made("top_k:25%").compress(v, KEY).value, wanted)


def test_rand_k_scales_float64_by_the_float64_ratio():
    v = vectors()["normal"]
    value = made("rand_k:7").compress(v, KEY).value
    np.testing.assert_array_equal(value[value != 0], v[value != 0] * (D / 7))


def test_rank_k_is_the_best_approximation_of_each_matrix():
    shapes = [(6, 2, 4), (7,), (3, 9)]
    v = torch.from_numpy(np.random.default_rng(2).standard_normal(48 + 7 + 27))
    kernel, vector, matrix = np.split(v.numpy(), [48, 55])

    def best(M: Array) -> Array:
        U, S, Vh = np.linalg.svd(M, full_matrices=False)
        return S[0] * np.outer(U[:, 0], Vh[0])

    wanted = [best(kernel.reshape(6, 8)).ravel(), vector, best(matrix.reshape(3, 9)).ravel()]
    sent = compressor("rank_k:1", shapes, torch.float64).compress(v, KEY)
    np.testing.assert_allclose(sent.value, np.concatenate(wanted), rtol=1e-12, atol=1e-12)
    assert sent.bits == 64 * (6 + 8 + 7 + 3 + 9)


def test_sign_sends_the_mean_size_with_zero_as_positive():
    v = torch.tensor([3.0, -1.0, 0.0, 4.0])
    assert compressor("sign", [(4,)]).compress(v, KEY).value.tolist() == [2, -2, 2, 2]


def test_quantize_takes_the_nearest_level_and_drops_the_smallest():
    v = vectors()["normal"]
    found = made("quantize:3,threshold=0.7").compress(v, KEY).value.split([20, 3, 1])
    for part, value in zip(v.split([20, 3, 1]), found, strict=True):
        levels = np.linspace(part.min().item(), part.max().item(), 8)
        nearest = levels[np.abs(part.numpy()[:, None] - levels).argmin(1)]
        kept = np.abs(part.numpy()) >= np.quantile(np.abs(part.numpy()), 0.7)
        np.testing.assert_allclose(value, np.where(kept, nearest, 0), rtol=1e-12)


def between(sorted_levels: Array, x: Array) -> tuple[Array, Array]:
    """The levels around each x."""
    above = np.searchsorted(sorted_levels, x).clip(1, len(sorted_levels) - 1)
    return sorted_levels[above - 1], sorted_levels[above]


def is_one_of(samples: Array, a: Array, b: Array) -> bool:
    return bool((np.isclose(samples, a, rtol=1e-12, atol=0) | np.isclose(samples, b, rtol=1e-12, atol=0)).all())


@pytest.mark.parametrize("name", ["normal", "heavy"])
def test_dithering_rounds_to_the_levels_beside_an_entry(name):
    v = vectors()[name]
    x = v.numpy()
    powers = np.concatenate([[0], 2.0 ** np.arange(-1074, 60)])
    cases = {
        "natural": (1, powers),
        "qsgd:4": (np.linalg.norm(x), np.arange(5) / 4),
        "standard_dithering:3,norm=1": (np.abs(x).sum(), np.arange(4) / 3),
        "terngrad": (np.abs(x).max(), np.arange(2)),
        "natural_dithering:3": (np.linalg.norm(x), np.array([0, 1 / 4, 1 / 2, 1])),
        "natural_dithering:6,norm=inf": (np.abs(x).max(), np.array([0, *2.0 ** np.arange(-5, 1)])),
    }
    for spec, (norm, levels) in cases.items():
        low, high = between(levels, np.abs(x) / norm)
        samples = draws(spec, name, count=2000)
        assert is_one_of(samples, np.sign(x) * norm * low, np.sign(x) * norm * high)
        assert (samples.std(0) > 0).sum() > D / 2


def test_natural_keeps_powers_of_two_and_rounds_below_the_normal_numbers_without_bias():
    powers = torch.cat([2.0 ** torch.arange(-60.0, 60.0), -(2.0 ** torch.arange(-60.0, 60.0))])
    c = compressor("natural", [(240,)])
    for key in random.split(KEY, 50):
        assert torch.equal(c.compress(powers, key).value, powers)
    tiny = torch.full((20_000,), 3e-39)
    value = compressor("natural", [(20_000,)]).compress(tiny, KEY).value.to(torch.float64).numpy()
    assert set(value) == {0.0, 2.0**-126}
    assert abs(value.mean() - 3e-39) < 4 * value.std() / math.sqrt(20_000)


# Sizes: one real encoding of each, packed and read back


class Bits:
    """A string of bits, written and read in turn."""

    def __init__(self) -> None:
        self.text, self.at = "", 0

    def whole(self, n: int, width: int) -> None:
        assert 0 <= n < 2**width
        self.text += format(n, f"0{width}b") if width else ""

    def read(self, width: int) -> int:
        self.at += width
        return int(self.text[self.at - width : self.at] or "0", 2)

    def float(self, x: float) -> None:
        self.whole(struct.unpack(">I", struct.pack(">f", x))[0], 32)

    def read_float(self) -> float:
        return struct.unpack(">f", struct.pack(">I", self.read(32)))[0]


Write = Callable[[Bits, Tensor, Array, Tensor], None]  # bits, v [D], C(v) [D], key
Read = Callable[[Bits, Tensor], Array]  # bits, key → C(v) [D]


def floats() -> tuple[Write, Read]:
    def write(bits, v, value, key):
        for x in value:
            bits.float(x)

    return write, lambda bits, key: np.array([bits.read_float() for _ in range(D)])


def lazy() -> tuple[Write, Read]:
    def write(bits, v, value, key):
        floats()[0](bits, v, value, key) if value.any() else bits.whole(0, 1)

    return write, lambda bits, key: np.zeros(D) if len(bits.text) == 1 else floats()[1](bits, key)


def shared_positions(k: int) -> tuple[Write, Read]:
    def write(bits, v, value, key):
        for x in value[random.subset(key, D, k).numpy()]:
            bits.float(x)

    def read(bits, key):
        value = np.zeros(D)
        value[random.subset(key, D, k).numpy()] = [bits.read_float() for _ in range(k)]
        return value

    return write, read


def positions(k: int | None, width: int, write_one, read_one, header=None, read_header=None) -> tuple[Write, Read]:
    """Entries (all that are not zero, filled up to k) as position and value."""

    def write(bits, v, value, key):
        header and header(bits, v, value)
        order = np.argsort(value == 0, kind="stable")[: k or np.count_nonzero(value)]
        for i in order:
            bits.whole(int(i), width)
            write_one(bits, value[i])

    def read(bits, key):
        known, value = read_header(bits) if read_header else (), np.zeros(D)
        while bits.at < len(bits.text):
            i = bits.read(width)
            value[i] = read_one(bits, *known)
        return value

    return write, read


def write_power(bits: Bits, x: float) -> None:
    """A sign and the exponent of a float32."""
    bits.whole(struct.unpack(">I", struct.pack(">f", x))[0] >> 23, 9)


def read_power(bits: Bits) -> float:
    return struct.unpack(">f", struct.pack(">I", bits.read(9) << 23))[0]


def powers() -> tuple[Write, Read]:
    def write(bits, v, value, key):
        for x in value:
            write_power(bits, x)

    return write, lambda bits, key: np.array([read_power(bits) for _ in range(D)])


def dithered(levels: Array, p: float) -> tuple[Write, Read]:
    width = math.ceil(math.log2(len(levels)))

    def write(bits, v, value, key):
        norm = float(torch.linalg.vector_norm(v, p))
        bits.float(norm)
        for x in value:
            bits.whole(int(x < 0), 1)
            bits.whole(int(np.abs(levels * norm - abs(x)).argmin()), width)

    def read(bits, key):
        norm = bits.read_float()
        return np.array([(-1 if bits.read(1) else 1) * norm * levels[bits.read(width)] for _ in range(D)])

    return write, read


def signs() -> tuple[Write, Read]:
    def write(bits, v, value, key):
        bits.float(abs(value[0]))
        for x in value:
            bits.whole(int(x < 0), 1)

    def read(bits, key):
        norm = bits.read_float()
        return np.array([-norm if bits.read(1) else norm for _ in range(D)])

    return write, read


def factors() -> tuple[Write, Read]:
    def write(bits, v, value, key):
        U, S, Vh = np.linalg.svd(value[:20].reshape(4, 5))
        for x in (*(U[:, 0] * S[0]), *Vh[0], *value[20:]):
            bits.float(x)

    def read(bits, key):
        numbers = [bits.read_float() for _ in range(13)]
        return np.concatenate([np.outer(numbers[:4], numbers[4:9]).ravel(), numbers[9:]])

    return write, read


def ranges(width: int, threshold: bool) -> tuple[Write, Read]:
    starts = np.cumsum([0, 20, 3, 1])

    def write(bits, v, value, key):
        layers = [np.split(x, starts[1:-1]) for x in (v.numpy(), value)]
        for layer, _ in zip(*layers, strict=True):
            bits.float(layer.min())
            bits.float(layer.max())
        for start, layer, out in zip(starts, *layers, strict=False):
            step = (layer.max() - layer.min()) / (2**width - 1)
            for i, x in enumerate(out):
                if not threshold or x != 0:
                    if threshold:
                        bits.whole(int(start + i), 5)
                    bits.whole(round((x - layer.min()) / step) if step else 0, width)

    def read(bits, key):
        limits, value = [(bits.read_float(), bits.read_float()) for _ in range(3)], np.zeros(D)
        order = iter(range(D))
        while bits.at < len(bits.text):
            i = bits.read(5) if threshold else next(order)
            low, high = limits[np.searchsorted(starts, i, side="right") - 1]
            value[i] = low + bits.read(width) * (high - low) / (2**width - 1)
        return value

    return write, read


ENCODINGS = {
    "identity": floats(),
    "bernoulli:0.5": lazy(),
    "rand_k:25%": shared_positions(6),
    "top_k:25%": positions(6, 5, Bits.float, Bits.read_float),
    "rank_k:1": factors(),
    "natural": powers(),
    "standard_dithering:3,norm=inf": dithered(np.arange(4) / 3, math.inf),
    "qsgd:4": dithered(np.arange(5) / 4, 2),
    "natural_dithering:6": dithered(np.array([0, *2.0 ** np.arange(-5, 1)]), 2),
    "terngrad": dithered(np.arange(2), math.inf),
    "sign": signs(),
    "quantize:4": ranges(4, False),
    "quantize:4,threshold=0.7": ranges(4, True),
    "compose(natural,top_k:6)": positions(6, 5, write_power, read_power),
    "compose(top_k:6,natural)": positions(6, 5, write_power, read_power),
}


def test_every_compressor_by_name_has_an_encoding():
    assert all(any(spec.partition(":")[0] == name for spec in ENCODINGS) for name in COMPRESSORS)


@pytest.mark.parametrize("spec", ENCODINGS)
def test_bits_are_the_size_of_an_encoding_that_decodes_to_the_value(spec):
    c, (write, read) = made(spec, torch.float32), ENCODINGS[spec]
    v = vectors(torch.float32)["normal"]
    sizes = set()
    for key in random.split(KEY, 8):
        sent, bits = c.compress(v, key), Bits()
        assert sent.bits.dtype == torch.float64 and sent.bits.shape == ()
        write(bits, v, sent.value.numpy(), key)
        np.testing.assert_allclose(read(bits, key), sent.value.numpy(), rtol=3e-7, atol=3e-7)
        assert bits.at == len(bits.text) or spec.startswith("bernoulli")
        assert len(bits.text) == sent.bits
        sizes.add(len(bits.text))
    assert (len(sizes) > 1) == spec.startswith("bernoulli")


def test_a_switch_sends_what_its_choice_sends():
    c = made("switch(identity:0.5,top_k:6:0.3,natural:0.2)", torch.float32)
    v = vectors(torch.float32)["normal"]
    sizes = []
    for key in random.split(KEY, 200):
        value, bits = c.compress(v, key)
        choice = 32 * D if torch.equal(value, v) else 6 * 37 if (value == 0).any() else 9 * D
        assert bits == choice
        sizes.append(choice)
    shares = [sizes.count(size) / 200 for size in (32 * D, 6 * 37, 9 * D)]
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=4 * 0.5 / math.sqrt(200))


def test_a_composition_counts_what_is_sent():
    sizes = {
        "compose(top_k:6,qsgd:4)": 32 + 6 * (5 + 4),
        "compose(rand_k:6,natural)": 6 * 9,
        "compose(natural,qsgd:4)": 32 + 24 * 4,
        "compose(rand_k:6,top_k:2)": 2 * 37,
        "compose(sign,top_k:6)": 32 + 6 * (1 + 5),
        "compose(rank_k:1,natural)": 9 * D,
    }
    v = vectors(torch.float32)["normal"]
    assert {spec: made(spec, torch.float32).compress(v, KEY).bits.item() for spec in sizes} == sizes


def test_a_float_counts_the_bits_of_its_type():
    for dtype, b, exponent in ((torch.bfloat16, 16, 8), (torch.float32, 32, 8), (torch.float64, 64, 11)):
        v = vectors(dtype)["normal"]
        assert made("rand_k:6", dtype).compress(v, KEY).bits == 6 * b
        assert made("top_k:6", dtype).compress(v, KEY).bits == 6 * (b + 5)
        assert made("sign", dtype).compress(v, KEY).bits == b + D
        assert made("natural", dtype).compress(v, KEY).bits == (1 + exponent) * D
    many = compressor("identity", [(2**25,)], torch.bfloat16)  # more bits than a float32 can count
    assert many.compress(torch.zeros(2**25 + 0, dtype=torch.bfloat16), KEY).bits == 2**29


# All of them


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", EVERY)
def test_zero_stays_zero(spec, dtype):
    value, _ = vmap(made(spec, dtype).compress, (None, 0))(torch.zeros(D, dtype=dtype), random.split(KEY, 20))
    assert value.dtype == dtype
    assert not value.any() and not value.isnan().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", EVERY)
def test_a_compressor_changes_its_input_or_is_the_identity(spec, dtype):
    v = vectors(dtype)["normal"]
    values = vmap(made(spec, dtype).compress, (None, 0))(v, random.split(KEY, 20)).value
    assert torch.isfinite(values).all()
    same = (values == v).all(1)
    exact = spec in ("identity", "rank_k:3")  # 3 (4 + 5) numbers are more than the matrix has
    assert same.all() == exact
    assert same.any() == (exact or "switch(identity" in spec)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("spec", EVERY)
def test_what_is_not_finite_never_becomes_finite(spec, bad, dtype):
    v = vectors(dtype)["normal"]
    v[11] = bad
    values = vmap(made(spec, dtype).compress, (None, 0))(v, random.split(KEY, 50)).value
    assert not torch.isfinite(values).all(1).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", EVERY)
def test_vmap_over_keys_and_vectors_equals_one_by_one(spec, dtype):
    c, keys = made(spec, dtype), random.split(KEY, 6)
    v = torch.stack([v * scale for v in list(vectors(dtype).values())[:3] for scale in (1, -0.01)])
    values, bits = vmap(c.compress)(v, keys)
    for n in range(6):
        value, size = c.compress(v[n], keys[n])
        torch.testing.assert_close(values[n], value, rtol=1e-6 if "rank" in spec else 0, atol=0)
        assert bits[n] == size


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", EVERY)
def test_nested_vmaps_equal_one_by_one(spec, dtype):
    c, keys = made(spec, dtype), random.split(KEY, 3)
    v = torch.stack(list(vectors(dtype).values())[:2])  # [2, D]
    values, bits = vmap(vmap(c.compress, (None, 0)), (0, None), 1)(v, keys)  # [3, 2]
    for m, n in itertools.product(range(2), range(3)):
        value, size = c.compress(v[m], keys[n])
        torch.testing.assert_close(values[n, m], value, rtol=1e-6 if "rank" in spec else 0, atol=0)
        assert bits[n, m] == size


@pytest.mark.parametrize("sizes", [(20, 3, 1), (20, 0, 3, 1), (24,)], ids=str)
@pytest.mark.parametrize("spec", EVERY)
def test_a_traced_program_in_pieces_compresses_as_vmap_does(spec, sizes):
    shapes = [(4, size // 4) if size > 10 else (size,) for size in sizes]
    c = compressor(spec, shapes, torch.float64)

    def program(v: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        doubled = torch.cat([part * 2 for part in v.split(sizes, -1)], -1)
        value, bits = vmap(c.compress)(doubled, keys)
        return value.sum(0), value, bits, doubled

    keys = random.split(KEY, 6).reshape(2, 3)
    v = random.normal(keys, (D,), torch.float64)  # [2, 3, D]
    traced = leafwise(make_fx(program)(v[0], keys[0]), list(sizes))
    torch.testing.assert_close(traced(v[1], keys[1]), program(v[1], keys[1]))


@pytest.mark.parametrize("spec", [s for s in EVERY if not {"2", "3", "4", "5", "6", "7"} & set(s)])
def test_one_entry_is_enough(spec):
    for dtype, size in itertools.product(FLOATS, (3.0, -0.75)):
        c = compressor(spec, [()], dtype)
        value, bits = vmap(c.compress, (None, 0))(torch.tensor([size], dtype=dtype), random.split(KEY, 50))
        assert torch.isfinite(value).all() and (value * size >= 0).all() and value.any()
        assert (bits >= 1).all()


def test_layers_without_entries_do_not_matter():
    v = torch.arange(6.0)
    for spec in ("quantize:2", "rank_k:1", "top_k:50%"):
        with_it, without = (compressor(spec, shapes) for shapes in ([(2, 3), (0, 4)], [(2, 3)]))
        assert torch.equal(with_it.compress(v, KEY).value, without.compress(v, KEY).value)


# Writing them


def test_spaces_and_nesting_are_allowed():
    c = made(" compose( switch(identity:0.5, qsgd:4 : 0.5), standard_dithering:4,norm=inf , top_k:25% ) ")
    assert c.alpha is None and c.name.startswith("compose")
    assert made("compose(qsgd:s=4,natural_dithering:3,2,natural)").omega is not None


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("topk:5%", "unknown compressor 'topk'; did you mean 'top_k'?"),
        ("top_k", "compressor 'top_k': expected top_k:K; missing a required argument: 'k'"),
        ("top_k:25", "compressor top_k:25 asks for more entries than the 24 there are"),
        ("rand_k:0", "compressor rand_k:0 must keep at least 1 entry"),
        ("rand_k:-3", "compressor rand_k:-3 must keep at least 1 entry"),
        ("rand_k:1.5", "compressor rand_k:1.5 is a fraction outside (0, 1]; write a whole number for a count"),
        ("rand_k:120%", "compressor rand_k:120% is a fraction outside (0, 1]"),
        ("rand_k:nan", "compressor rand_k:nan is a fraction outside (0, 1]"),
        ("top_k:few", "compressor top_k:few needs a count, a fraction or a percentage of entries, as in top_k:5%"),
        ("bernoulli:0", "compressor bernoulli:0.0 sends with a probability above 0 and at most 1"),
        ("bernoulli:1.1", "compressor bernoulli:1.1 sends with a probability above 0 and at most 1"),
        ("rank_k:5", "compressor rank_k:5 needs a rank from 1 to 4, the largest that a layer here has"),
        ("rank_k:0", "compressor rank_k:0 needs a rank from 1 to 4"),
        ("qsgd:0", "compressor standard_dithering has from 1 to 65535 levels, not 0"),
        ("qsgd:2.5", "where s is a whole number, not '2.5'"),
        ("standard_dithering:4,norm=0.5", "needs a p-norm with p from 1 to inf, not 0.5"),
        ("natural_dithering:33", "compressor natural_dithering has from 1 to 32 levels, not 33"),
        ("quantize:0", "compressor quantize:0 takes from 1 to 16 bits"),
        ("quantize:4,threshold=1", "threshold is a quantile from 0 to below 1, not 1.0"),
        ("compose(natural)", "compose joins at least two compressors, separated by commas"),
        ("compose(natural,)", "has nothing before or after one of its commas"),
        ("compose(natural,topk:1)", "unknown compressor 'topk'; did you mean 'top_k'?"),
        ("compose(natural,top_k:1", "brackets belong to compose(C1,C2) and switch(C1:p1,C2:p2) alone"),
        ("compose(natural),top_k:(1)", "its brackets do not match"),
        ("compose", "brackets belong to compose(C1,C2) and switch(C1:p1,C2:p2) alone"),
        ("natural(3)", "brackets belong to compose(C1,C2) and switch(C1:p1,C2:p2) alone"),
        ("switch(identity:0.5,natural:0.6)", "its probabilities sum to 1.1, not to 1"),
        ("switch(identity,natural:0.6)", "a part ends in a probability in (0, 1], as identity:0.1, not 'identity'"),
        ("switch(identity:0,natural:1)", "a part ends in a probability in (0, 1], as identity:0.1, not '0'"),
        ("", "unknown compressor ''"),
    ],
)
def test_a_text_without_meaning_is_refused_in_one_sentence(spec, sentence):
    with pytest.raises(UsageError) as error:
        made(spec)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_vectors_that_a_compressor_is_not_made_for_are_refused():
    with pytest.raises(UsageError, match=r"made for vectors \[24\] torch.float64, not \[23\] torch.float64"):
        made("natural").compress(torch.zeros(23, dtype=torch.float64), KEY)
    with pytest.raises(UsageError, match=r"made for vectors \[24\] torch.float64, not \[24\] torch.float32"):
        made("natural").compress(torch.zeros(24), KEY)
    with pytest.raises(UsageError, match=r"takes vectors of .*torch.bfloat16.*, not of torch.int64"):
        compressor("natural", [(3,)], torch.int64)
    with pytest.raises(UsageError, match="at least one entry"):
        compressor("natural", [(0, 3)])
