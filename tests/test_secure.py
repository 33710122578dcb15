"""Secure aggregation's arithmetic: masks that cancel to the bit, messages that tell nothing, sums that do not wrap."""

import numpy as np
import pytest
import torch
from torch.func import vmap

from vfl import UsageError, random
from vfl.secure import FixedPoint, bits, decode, encode, mask, masked, pair_key, secure_sum

SECRET = random.key(8)
COHORT = [17, 3, 999_999, 0, 42]
D = 30
CODES = [FixedPoint(), FixedPoint(20, 8), FixedPoint(53, 40), FixedPoint(2, 0)]
each_code = pytest.mark.parametrize("code", CODES, ids=str)


def rows(code: FixedPoint, clients: int = len(COHORT)) -> np.ndarray:
    """Vectors up to the bound, both ends among them."""
    bound = code.bound(clients)
    x = np.random.default_rng(2).uniform(-bound, bound, (clients, D))
    x[:, 0], x[:, 1] = bound, -bound
    return x


def integers(x: np.ndarray, code: FixedPoint) -> list[list[int]]:
    """Python's own integers, of any size, for each entry."""
    return [[round(float(v) * 2**code.fraction) for v in row] for row in x]


@each_code
def test_a_sum_is_that_of_the_rounded_numbers_exactly(code: FixedPoint) -> None:
    x = rows(code)
    wanted = [sum(column) / 2**code.fraction for column in zip(*integers(x, code), strict=True)]
    found = secure_sum(torch.from_numpy(x), SECRET, COHORT, code)
    assert found.dtype == torch.float64 and found.tolist() == wanted
    assert np.abs(found.numpy() - x.sum(0)).max() <= code.error(len(COHORT))


@each_code
def test_the_masks_of_a_cohort_cancel_to_the_bit(code: FixedPoint) -> None:
    masks = torch.stack([mask(SECRET, i, COHORT, D, code) for i in COHORT])
    assert ((masks >= 0) & (masks < 2**code.bits)).all()
    assert (masks.sum(0) % 2**code.bits == 0).all() and (masks != 0).any()
    # From the definition: m_ij added by the smaller, taken away by the larger.
    i = COHORT[0]
    wanted = [0] * D
    for j in COHORT[1:]:
        shared = random.bits(pair_key(SECRET, i, j), D).tolist()
        wanted = [(w + (1 if j > i else -1) * m) % 2**code.bits for w, m in zip(wanted, shared, strict=True)]
    assert masks[0].tolist() == wanted


def test_two_clients_share_a_key_that_no_other_pair_or_round_has() -> None:
    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    keys = {int(pair_key(SECRET, i, j)) for i, j in pairs}
    assert len(keys) == len(pairs)
    assert all(int(pair_key(SECRET, i, j)) == int(pair_key(SECRET, j, i)) for i, j in pairs[:20])
    assert not keys & {int(pair_key(random.key(9), i, j)) for i, j in pairs}


def test_a_message_alone_is_uniform_whatever_it_hides() -> None:
    code, n = FixedPoint(16, 4), 20_000
    for value in (0.0, 100.0):
        sent = masked(torch.full((n,), value), SECRET, 3, COHORT, code).numpy()
        counts = np.bincount(sent >> 12, minlength=16)  # 16 bins of equal probability
        chi_square = ((counts - n / 16) ** 2 / (n / 16)).sum()
        assert chi_square < 37.7  # the 0.1 % quantile with 15 degrees of freedom


def test_parts_of_the_sum_may_be_taken_in_any_order() -> None:
    code, x = FixedPoint(), torch.from_numpy(rows(FixedPoint()))
    sent = [masked(row, SECRET, i, COHORT, code) for row, i in zip(x, COHORT, strict=True)]
    parts = sent[3] + sent[0], sent[4] + sent[1] + sent[2]  # two ranks
    assert torch.equal(decode(parts[1] + parts[0], code), secure_sum(x, SECRET, COHORT, code))


def test_a_client_that_never_answers_leaves_its_masks_in_the_sum() -> None:
    code, x = FixedPoint(), torch.from_numpy(rows(FixedPoint()))
    sent = torch.stack([masked(row, SECRET, i, COHORT, code) for row, i in zip(x, COHORT, strict=True)])
    rest = decode(sent[1:].sum(0), code)
    assert (rest - x[1:].sum(0)).abs().median() > 1000


def test_under_vmap_a_message_is_the_same() -> None:
    code, x = FixedPoint(), torch.from_numpy(rows(FixedPoint())).float()
    batched = vmap(lambda row, i: masked(row, SECRET, i, COHORT, code))(x, torch.tensor(COHORT))
    for row, i, message in zip(x, COHORT, batched, strict=True):
        assert torch.equal(masked(row, SECRET, i, COHORT, code), message)


@each_code
def test_decoding_undoes_encoding_up_to_half_a_unit(code: FixedPoint) -> None:
    x = torch.from_numpy(rows(code, 1))
    numbers = encode(x, code)
    assert numbers.dtype == torch.int64 and ((numbers >= 0) & (numbers < 2**code.bits)).all()
    assert (decode(numbers, code) - x).abs().max() <= 2.0 ** (-code.fraction - 1)


def test_what_could_wrap_is_refused_and_the_bound_is_tight() -> None:
    code, x = FixedPoint(8, 2), torch.zeros(3, 4)
    assert code.bound(3) == 42 / 4  # (2⁷ − 1) // 3 units of ¼
    x[:, 1] = code.bound(3)
    assert secure_sum(x, SECRET, [0, 1, 2], code)[1] == 31.5
    x[2, 1] += 0.25
    with pytest.raises(UsageError, match=r"entry \[2, 1\] is 10.75, but 8 bits with 2 behind .* 3 clients only up to"):
        secure_sum(x, SECRET, [0, 1, 2], code)
    beyond = torch.full((3, 1), code.bound(3) + 0.5)  # one unit more would still do here, two wrap
    assert decode(encode(beyond, code).sum(0), code) < 0
    # In float32 the default's bound is rounded up to the first number that wraps.
    assert float(torch.tensor(FixedPoint().bound(1))) == 2**15
    with pytest.raises(UsageError, match="is 32768, but"):
        secure_sum(torch.full((1, 1), 2.0**15), SECRET, [0], FixedPoint())
    x[2, 1] = torch.nan
    with pytest.raises(UsageError, match="is nan, but"):
        code.check(x, 3)


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in ((1, 0), (54, 10), (16, 16), (16, -1)):
        with pytest.raises(UsageError, match="fixed point"):
            FixedPoint(*wrong)
    for cohort in ([1, 1], [1]):
        with pytest.raises(UsageError, match="one row for each of the 1 different clients, not 2"):
            secure_sum(torch.zeros(2, 3), SECRET, cohort, FixedPoint())
    assert bits(1000, FixedPoint(20, 8)) == 20_000
