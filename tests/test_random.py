"""Random keys: laws of the draws within four standard errors, and the same numbers however they are batched."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from vfl import native, random

KEY = random.key(0)
HASHED = {"uniform": random._hashed_uniform, "normal": random._hashed_normal}  # the CUDA kernels, run on CPU tensors
DRAWS = [
    pytest.param(random.uniform, torch.float32, id="uniform-32"),
    pytest.param(random.uniform, torch.float64, id="uniform-64"),
    pytest.param(random.normal, torch.float32, id="normal-32"),
    pytest.param(random.normal, torch.float64, id="normal-64"),
    pytest.param(random.normal, torch.bfloat16, id="normal-bf16"),
    pytest.param(lambda k, s, d: HASHED["uniform"](k, list(s), d), torch.float32, id="hashed-uniform-32"),
    pytest.param(lambda k, s, d: HASHED["uniform"](k, list(s), d), torch.float64, id="hashed-uniform-64"),
    pytest.param(lambda k, s, d: HASHED["normal"](k, list(s), d), torch.float32, id="hashed-normal-32"),
    pytest.param(lambda k, s, d: HASHED["normal"](k, list(s), d), torch.float64, id="hashed-normal-64"),
]
UNIFORMS = [d for d in DRAWS if "uniform" in str(d.id)]
NORMALS = [d for d in DRAWS if "normal" in str(d.id) and "bf16" not in str(d.id)]
INTEGERS = [
    pytest.param(lambda k: random.bits(k, 5), id="bits"),
    pytest.param(lambda k: random.split(k, 3), id="split"),
    pytest.param(lambda k: random.fold_in(k, 7), id="fold_in"),
    pytest.param(lambda k: random.permutation(k, 6), id="permutation"),
    pytest.param(lambda k: random.choice(k, 6, 2), id="choice"),
    pytest.param(lambda k: random.subset(k, 6, 2), id="subset"),
    pytest.param(lambda k: random.subset(k, 60, 2), id="sparse-subset"),
    pytest.param(lambda k: random._hashed_subset(k, 6, 2), id="hashed-subset"),
    pytest.param(lambda k: random.positions(k, 6, 2), id="positions"),
    pytest.param(lambda k: random.positions(k, 60, 2), id="sparse-positions"),
    pytest.param(lambda k: random._hashed_positions(k, 6, 2), id="hashed-positions"),
    pytest.param(lambda k: random.randint(k, (2, 3), 10), id="randint"),
    pytest.param(lambda k: random.bernoulli(k, 0.3, (2, 3)), id="bernoulli"),
]


def flipped(a: Tensor, b: Tensor) -> np.ndarray:
    """How many of the 64 bits differ."""
    return np.bitwise_count((a ^ b).numpy().view(np.uint64))


def is_mean(values: Tensor | np.ndarray, expected: float, std: float) -> None:
    """Fails when the mean of independent values with this standard deviation is four standard errors off."""
    values = torch.as_tensor(values, dtype=torch.float64)
    assert abs(values.mean().item() - expected) < 4 * std / math.sqrt(values.numel())


def is_uniform(counts: Tensor | np.ndarray, sigmas: float = 4) -> None:
    """Fails when the χ² of counts over equally likely cells is four standard deviations above its mean."""
    counts = np.asarray(counts, dtype=np.float64)
    free = len(counts) - 1
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < free + sigmas * math.sqrt(2 * free)


def follows(values: Tensor, cdf) -> None:
    """Kolmogorov-Smirnov at level 0.001."""
    ordered = values.flatten().to(torch.float64).sort().values
    n = len(ordered)
    gap = (torch.arange(1, n + 1) / n - cdf(ordered)).abs().max().item()
    assert gap < 1.95 / math.sqrt(n) + 1 / n


def test_any_integer_is_a_seed_and_different_seeds_give_different_keys() -> None:
    seeds = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 2, 12345678901234567890]
    keys = [random.key(s) for s in seeds]
    assert all(k.shape == () and k.dtype == torch.int64 for k in keys)
    assert len({int(k) for k in keys}) == len(seeds)


def test_seeds_are_taken_modulo_two_to_the_64() -> None:
    assert random.key(-1) == random.key(2**64 - 1)
    assert random.key(2**64 + 5) == random.key(5) == random.key(5 - 2**70)


def test_a_hundred_thousand_folds_and_seeds_never_collide() -> None:
    folds = random.fold_in(KEY, torch.arange(-50_000, 50_000))
    keys = torch.stack([random.key(s) for s in range(1000)])
    assert len(torch.cat([folds, keys]).unique()) == 101_000


def test_seeds_and_folds_never_collide_with_one_another() -> None:
    seeds = torch.stack([random.key(s) for s in range(300)])
    grid = random.fold_in(seeds[:, None], torch.arange(300))  # seed 3, round 5 is not seed 5, round 3
    assert len(grid.unique()) == 300 * 300


def test_folding_two_numbers_in_depends_on_their_order() -> None:
    first, second = torch.arange(100)[:, None], torch.arange(100)
    assert len(random.fold_in(random.fold_in(KEY, first), second).unique()) == 100 * 100


@pytest.mark.parametrize("what", ["key", "number", "counter"])
def test_one_changed_bit_changes_half_of_the_bits(what: str) -> None:
    trials, one = 500, torch.ones((), dtype=torch.int64) << torch.arange(64)
    start = random.bits(KEY, trials)[:, None]
    if what == "key":
        before, after = random.fold_in(start, 3), random.fold_in(start ^ one, 3)
    elif what == "number":
        before, after = random.fold_in(KEY, start), random.fold_in(KEY, start ^ one)
    else:
        before, after = random.bits(start, 1)[..., 0], random.bits(start ^ one, 1)[..., 0]
    changed = before.expand_as(after) ^ after  # [trials, 64 bits in]
    is_mean(flipped(before.expand_as(after).contiguous(), after), 32, 4)
    rates = ((changed[..., None] >> torch.arange(64)) & 1).double().mean(0)  # [bits in, bits out]
    z2 = ((rates - 0.5) ** 2 / (0.25 / trials)).sum().item()
    assert abs(z2 - 64 * 64) < 4 * math.sqrt(2 * 64 * 64)


def test_streams_of_neighbouring_keys_and_folds_are_unrelated() -> None:
    streams = random.bits(random.fold_in(KEY, torch.arange(200)), 100)
    is_mean(flipped(streams[:-1], streams[1:]), 32, 4)
    is_mean(flipped(streams[:, :-1].contiguous(), streams[:, 1:].contiguous()), 32, 4)
    raw = random.bits(KEY + torch.arange(200), 100)
    is_mean(flipped(raw[:-1], raw[1:]), 32, 4)


def test_every_bit_and_every_byte_is_uniform() -> None:
    words = random.bits(KEY, 40_000)
    for bit in range(64):
        is_mean((words >> bit) & 1, 0.5, 0.5)
    is_uniform(np.bincount(words.numpy().view(np.uint8), minlength=256))


def test_split_gives_unrelated_keys_and_more_of_them_begin_with_the_fewer() -> None:
    keys = random.split(KEY, 1000)
    assert len(torch.cat([keys, KEY[None]]).unique()) == 1001
    assert torch.equal(random.split(KEY), keys[:2])
    is_mean(flipped(keys[:-1], keys[1:]), 32, 4)


@pytest.mark.parametrize(("draw", "dtype"), UNIFORMS)
def test_uniform_has_the_law_of_the_unit_interval(draw, dtype: torch.dtype) -> None:
    u = draw(random.split(KEY, 100), (2000,), dtype)
    assert u.dtype == dtype
    assert u.min() >= 0
    assert u.max() < 1
    is_mean(u, 1 / 2, math.sqrt(1 / 12))
    is_mean((u.double() - 0.5) ** 2, 1 / 12, math.sqrt(1 / 180))
    follows(u, lambda v: v)


@pytest.mark.parametrize("n", [native.LARGE - 1, native.LARGE, 5003, 3 * native.LARGE])
def test_large_draws_are_the_numbers_of_numpys_stream(n: int) -> None:
    keys = random.split(random.key(12), 6).reshape(2, 3).T  # not side by side
    torch.set_default_dtype(torch.float64)
    try:
        drawn = random.uniform(keys, (n,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.shape == (3, 2, n)
    for key, row in zip(keys.flatten(), drawn.flatten(0, 1), strict=True):
        np.testing.assert_array_equal(row, random.generator(key).random(n, np.float32))


@pytest.mark.parametrize("n", [native.LARGE, 4099, 5001, 8190])  # whose last words are whole or not
def test_large_subsets_are_those_of_numpys_stream(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random.split(random.key(13), 6)
    for k in (n // 19, n // 3, n // 2, n - 1, n):
        built = [draw(keys, n, k) for draw in (random.subset, random.positions)]
        with monkeypatch.context() as patch:
            patch.setattr(native, "LARGE", 10**9)
            by_numpy = [draw(keys, n, k) for draw in (random.subset, random.positions)]
        for a, b in zip(built, by_numpy, strict=True):
            assert torch.equal(a, b)
        assert (built[0].sum(-1) == k).all()


@pytest.mark.parametrize(("draw", "dtype"), NORMALS)
def test_normal_has_the_law_of_the_standard_normal(draw, dtype: torch.dtype) -> None:
    z = draw(random.split(KEY, 100), (2000,), dtype)
    assert z.dtype == dtype
    z = z.double()
    is_mean(z, 0, 1)
    is_mean(z**2, 1, math.sqrt(2))
    is_mean(z**3, 0, math.sqrt(15))
    is_mean(z**4, 3, math.sqrt(96))
    follows(z, torch.special.ndtr)


@pytest.mark.parametrize(("draw", "dtype"), UNIFORMS)
def test_the_first_number_of_neighbouring_keys_is_uniform(draw, dtype: torch.dtype) -> None:
    first = draw(random.fold_in(KEY, torch.arange(20_000)), (2,), dtype)
    follows(first[:, 0], lambda v: v)
    raw = draw(torch.arange(20_000), (2,), dtype)  # not even keys out of `key`
    follows(raw[:, 0], lambda v: v)
    is_mean((raw[:-1, 0].double() - 0.5) * (raw[1:, 0].double() - 0.5), 0, 1 / 12)
    is_mean((raw[:, 0].double() - 0.5) * (raw[:, 1].double() - 0.5), 0, 1 / 12)


@pytest.mark.parametrize(("draw", "dtype"), NORMALS)
def test_normal_numbers_are_uncorrelated_within_and_across_keys(draw, dtype: torch.dtype) -> None:
    z = draw(random.split(KEY, 300), (300,), dtype).double()
    for step in (1, 2, 150):
        is_mean(z[:, :-step] * z[:, step:], 0, 1)
        is_mean(z[:-step] * z[step:], 0, 1)


def test_uniform_and_normal_of_one_kernel_reach_the_ends_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (-1, 0):  # all digits one, all digits zero
        monkeypatch.setattr(random, "bits", lambda key, n, w=word: torch.full((*key.shape, n), w))
        for dtype in (torch.float32, torch.float64):
            u = HASHED["uniform"](KEY, [3], dtype)
            assert ((u >= 0) & (u < 1)).all()
            assert HASHED["normal"](KEY, [3], dtype).isfinite().all()


def test_uniform_refuses_half_precision_because_it_would_round_to_one() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(ValueError, match="float32 or float64"):
            random.uniform(KEY, (3,), dtype)


@pytest.mark.parametrize("p", [0.001, 0.3, 0.97])
def test_bernoulli_is_true_with_probability_p(p: float) -> None:
    coins = random.bernoulli(KEY, p, (200_000,))
    assert coins.dtype == torch.bool
    is_mean(coins, p, math.sqrt(p * (1 - p)))


def test_bernoulli_of_zero_and_one_is_certain() -> None:
    assert not random.bernoulli(KEY, 0.0, (10_000,)).any()
    assert random.bernoulli(KEY, 1.0, (10_000,)).all()


def test_bernoulli_takes_a_probability_for_each_entry() -> None:
    p = torch.tensor([0.0, 0.2, 0.9])
    coins = random.bernoulli(KEY, p, (50_000, 3)).double()
    for column, q in zip(coins.T, p.tolist(), strict=True):
        is_mean(column, q, math.sqrt(q * (1 - q)) + 1e-12)


def test_permutation_holds_every_number_once() -> None:
    for n in (0, 1, 2, 1000):
        assert torch.equal(random.permutation(KEY, n).sort().values, torch.arange(n))


def test_permutation_is_uniform() -> None:
    orders = random.permutation(random.split(KEY, 24_000), 4)
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    cells = codes.unique(return_counts=True)[1]
    assert len(cells) == 24
    is_uniform(cells)


def test_choice_never_repeats_and_takes_every_ordered_selection_equally() -> None:
    picks = random.choice(random.split(KEY, 24_000), 4, 2)
    assert (picks[:, 0] != picks[:, 1]).all()
    cells = (picks[:, 0] * 4 + picks[:, 1]).unique(return_counts=True)[1]
    assert len(cells) == 12
    is_uniform(cells)


SUBSETS = {"subset": random.subset, "hashed": random._hashed_subset}


@pytest.mark.parametrize("draw", SUBSETS.values(), ids=SUBSETS)
def test_a_subset_has_its_size(draw) -> None:
    for n, k in ((1, 0), (1, 1), (7, 0), (7, 7), (25, 1), (1000, 3), (1000, 500), (1000, 999), (100_001, 20_000)):
        chosen = draw(random.split(KEY, 5), n, k)
        assert chosen.dtype == torch.bool
        assert chosen.shape == (5, n)
        assert (chosen.sum(1) == k).all()


@pytest.mark.parametrize("draw", SUBSETS.values(), ids=SUBSETS)
@pytest.mark.parametrize(("n", "k"), [(5, 2), (5, 4), (40, 2)])
def test_every_subset_is_equally_likely(draw, n: int, k: int) -> None:
    chosen = draw(random.split(KEY, 40_000), n, k)
    sets, counts = chosen.unique(dim=0, return_counts=True)
    assert len(sets) == math.comb(n, k)
    is_uniform(counts)


def test_a_subset_of_many_is_spread_evenly() -> None:
    places = random.subset(random.split(KEY, 40), 50_000, 12_345).nonzero()[:, 1]
    is_uniform(torch.bincount(places // 500))


@pytest.mark.parametrize(("n", "k"), [(60, 2), (60, 25), (5, 5), (5, 0)])
def test_positions_are_where_the_subset_is_true(n: int, k: int) -> None:
    keys = random.split(KEY, 20)
    for places, chosen in ((random.positions, random.subset), (random._hashed_positions, random._hashed_subset)):
        found = places(keys, n, k).sort(-1).values
        wanted = torch.stack([row.nonzero()[:, 0] for row in chosen(keys, n, k)])
        assert found.dtype == torch.int64 and torch.equal(found, wanted)


@pytest.mark.parametrize("k", [-1, 4])
def test_a_subset_larger_than_the_whole_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to n = 3, not {k}"):
        random.subset(KEY, 3, k)
    with pytest.raises(ValueError, match=f"from 0 to n = 3, not {k}"):
        random.positions(KEY, 3, k)


@pytest.mark.parametrize("high", [1, 2, 7, 100, 2**31])
def test_randint_is_uniform_below_its_bound(high: int) -> None:
    draws = random.randint(KEY, (100, 1000), high)
    assert draws.shape == (100, 1000)
    assert draws.min() >= 0
    assert draws.max() < high
    if high > 1:
        cells = min(high, 100)
        is_uniform(torch.bincount((draws.flatten() * cells) // high, minlength=cells))


@pytest.mark.parametrize(("draw", "dtype"), DRAWS)
def test_a_longer_draw_begins_with_the_shorter(draw, dtype: torch.dtype) -> None:
    long = draw(KEY, (1001,), dtype)
    assert torch.equal(draw(KEY, (10,), dtype), long[:10])
    assert torch.equal(draw(KEY, (3, 5), dtype), long[:15].reshape(3, 5))
    assert torch.equal(draw(KEY, (), dtype), long[0])


def test_more_integers_begin_with_the_fewer() -> None:
    assert torch.equal(random.bits(KEY, 10), random.bits(KEY, 1000)[:10])
    assert torch.equal(random.randint(KEY, (10,), 6), random.randint(KEY, (1000,), 6)[:10])
    assert torch.equal(random.bernoulli(KEY, 0.5, (10,)), random.bernoulli(KEY, 0.5, (1000,))[:10])
    assert torch.equal(random.choice(KEY, 9, 2), random.choice(KEY, 9, 5)[:2])


def same_however_batched(draw) -> None:
    keys = random.split(KEY, 6)
    rows = torch.stack([draw(k) for k in keys])
    assert len(rows.reshape(6, -1).unique(dim=0)) > 1
    assert torch.equal(draw(keys), rows)
    assert torch.equal(vmap(draw)(keys), rows)
    grid = rows.reshape(2, 3, *rows.shape[1:])
    assert torch.equal(draw(keys.reshape(2, 3)), grid)
    assert torch.equal(vmap(draw)(keys.reshape(2, 3)), grid)  # batched inside, mapped outside
    assert torch.equal(vmap(vmap(draw))(keys.reshape(2, 3)), grid)
    assert torch.equal(vmap(draw, in_dims=1)(keys.reshape(2, 3)), grid.transpose(0, 1))
    assert torch.equal(vmap(vmap(draw), in_dims=1)(keys.reshape(2, 3)), grid.transpose(0, 1))
    assert draw(keys[:0]).shape == (0, *rows.shape[1:])


@pytest.mark.parametrize(("draw", "dtype"), DRAWS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_floats_are_the_same_vmapped_batched_and_row_by_row(draw, dtype: torch.dtype, shape: tuple) -> None:
    if 0 in shape:
        assert draw(random.split(KEY, 4), shape, dtype).shape == (4, *shape)
        return
    same_however_batched(lambda k: draw(k, shape, dtype))


@pytest.mark.parametrize("draw", INTEGERS)
def test_integers_are_the_same_vmapped_batched_and_row_by_row(draw) -> None:
    same_however_batched(draw)


def test_an_unmapped_key_gives_every_row_the_same_numbers() -> None:
    scaled = vmap(lambda a: a * random.normal(KEY, (4,)))(torch.arange(3.0))
    assert torch.equal(scaled, torch.arange(3.0)[:, None] * random.normal(KEY, (4,)))


def test_fold_in_broadcasts_and_takes_mapped_numbers() -> None:
    keys, numbers = random.split(KEY, 3), torch.tensor([5, 6, 7])
    each = torch.stack([random.fold_in(k, int(n)) for k, n in zip(keys, numbers, strict=True)])
    assert torch.equal(random.fold_in(keys, numbers), each)
    assert torch.equal(vmap(random.fold_in)(keys, numbers), each)
    assert torch.equal(random.fold_in(keys, 5), torch.stack([random.fold_in(k, 5) for k in keys]))
    one = torch.stack([random.fold_in(KEY, int(n)) for n in numbers])
    assert torch.equal(random.fold_in(KEY, numbers), one)
    assert torch.equal(vmap(lambda n: random.fold_in(KEY, n))(numbers), one)


def test_bernoulli_takes_a_mapped_probability() -> None:
    keys, p = random.split(KEY, 3), torch.tensor([0.0, 0.5, 1.0])
    coins = vmap(lambda k, q: random.bernoulli(k, q, (100,)))(keys, p)
    assert torch.equal(coins[1], random.bernoulli(keys[1], 0.5, (100,)))
    assert coins[2].all()
    assert not coins[0].any()


@pytest.mark.parametrize(("draw", "dtype"), DRAWS)
def test_a_draw_inside_a_differentiated_function_is_a_constant(draw, dtype: torch.dtype) -> None:
    keys, x = random.split(KEY, 3), torch.ones(4, dtype=dtype)
    slope = grad(lambda y, k: (y * y * draw(k, (4,), dtype)).sum())
    assert torch.equal(slope(x, KEY), 2 * draw(KEY, (4,), dtype))
    assert torch.equal(vmap(slope, in_dims=(None, 0))(x, keys), 2 * draw(keys, (4,), dtype))
    curvature = vmap(grad(lambda y, k: slope(y, k).sum()), in_dims=(None, 0))
    assert torch.equal(curvature(x, keys), 2 * draw(keys, (4,), dtype))


def test_draws_compile_into_one_graph() -> None:
    def step(k: Tensor) -> Tensor:
        return random.uniform(random.fold_in(k, 3), (4,)) + random.normal(k, (4,))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(KEY), step(KEY))


def test_no_global_generator_is_read_or_moved() -> None:
    def draw_everything() -> list[Tensor]:
        keys = random.split(random.key(3), 2)
        floats = [random.uniform(keys, (3,)), random.normal(keys, (3,)), random.bernoulli(keys, 0.5, (3,)).int()]
        whole = [random.permutation(keys, 5), random.choice(keys, 5, 2), random.randint(keys, (3,), 9)]
        return floats + whole + [torch.from_numpy(random.generator(KEY).random(3))]

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw_everything()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert all(torch.equal(a, b) for a, b in zip(first, draw_everything(), strict=True))


def test_drawing_leaves_the_key_as_it_was() -> None:
    keys = random.split(KEY, 3)
    before = keys.clone()
    random.uniform(keys, (3,)), random.normal(keys, (3,)), random.fold_in(keys, 1), random.permutation(keys, 4)
    assert torch.equal(keys, before)


def test_the_host_generator_is_a_function_of_the_key() -> None:
    keys = random.split(KEY, 500)
    assert random.generator(keys[0]).integers(2**63) == random.generator(keys[0]).integers(2**63)
    assert len({int(random.generator(k).integers(2**63)) for k in keys}) == 500
    follows(torch.tensor([random.generator(k).random() for k in keys]), lambda v: v)


def test_keys_on_the_host_are_the_same_numbers_as_numpy_arrays() -> None:
    keys, numbers = random.split(KEY, 50), torch.arange(-3, 47) * 2**40
    folded = random.fold_in(keys.numpy()[:, None], numbers.numpy())
    assert torch.equal(torch.from_numpy(folded), random.fold_in(keys[:, None], numbers))
    for n in (0, 7, -1, 2**40):
        assert torch.equal(torch.from_numpy(random.fold_in(keys.numpy(), n)), random.fold_in(keys, n))
