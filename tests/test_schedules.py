"""Schedules against torch.optim.lr_scheduler, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from vfl.errors import UsageError
from vfl.schedules import SCHEDULES, product, schedule

ROUNDS = 30
SPECS = ["constant", "step:7,0.5", "multistep:3,9,20,factor=0.3", "cosine:20,0.1", "exponential:0.9", "linear:6",
         "ramp:3,5,10"]  # fmt: skip


def rounds(count: int = ROUNDS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.arange(count, dtype=dtype)


def theirs(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], count: int = ROUNDS) -> torch.Tensor:
    """The rates of a torch scheduler over the first rounds, at base rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        ("constant", lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0)),
        ("step:7,0.5", lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
        ("step:3", lambda o: lr_scheduler.StepLR(o, 3, 0.1)),
        ("multistep:3,9,20", lambda o: lr_scheduler.MultiStepLR(o, [3, 9, 20], 0.1)),
        ("multistep:1,factor=0.3", lambda o: lr_scheduler.MultiStepLR(o, [1], 0.3)),
        ("cosine:30", lambda o: lr_scheduler.CosineAnnealingLR(o, 30)),
        ("cosine:29,final=0.2", lambda o: lr_scheduler.CosineAnnealingLR(o, 29, eta_min=0.2)),
        ("exponential:0.9", lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        ("linear:6", lambda o: lr_scheduler.LinearLR(o, 1 / 7, 1.0, 6)),
        ("linear:6,start=0.25", lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 6)),
        (
            "linear:5+step:7,0.5",
            lambda o: lr_scheduler.ChainedScheduler(
                [lr_scheduler.LinearLR(o, 1 / 6, 1.0, 5), lr_scheduler.StepLR(o, 7, 0.5)]
            ),
        ),
    ],
)
def test_schedule_has_the_values_of_torchs_scheduler(spec: str, make: Callable) -> None:
    ours = torch.stack([schedule(spec)(t) for t in rounds().unbind()])
    torch.testing.assert_close(ours, theirs(make), rtol=1e-12, atol=1e-12)


def test_cosine_stays_at_its_final_factor() -> None:
    factors = schedule("cosine:10,final=0.2")(rounds()[10:])
    torch.testing.assert_close(factors, torch.full_like(factors, 0.2), rtol=0, atol=1e-15)


def test_warm_up_never_has_rate_zero_and_ends_at_one() -> None:
    expected = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule("linear:3")(rounds(5)), expected, rtol=1e-15, atol=0)


def test_plus_multiplies_and_leaves_exponents_alone() -> None:
    t = rounds()
    expected = schedule("linear:5")(t) * schedule("cosine:1000")(t) * schedule("step:10,0.5")(t)
    assert torch.equal(schedule("linear:5 + cosine:1e+3 + step:10,0.5")(t), expected)
    assert torch.equal(product()(t), torch.ones_like(t))


@pytest.mark.parametrize("spec", SPECS)
def test_schedule_maps_under_vmap_and_takes_integers(spec: str) -> None:
    f = schedule(spec)
    t = rounds()
    loop = torch.stack([f(one) for one in t.unbind()])
    assert loop.shape == (ROUNDS,)
    torch.testing.assert_close(torch.func.vmap(f)(t), loop, rtol=1e-15, atol=0)
    integers = torch.func.vmap(f)(rounds(dtype=torch.int64))
    assert integers.dtype == torch.float32
    torch.testing.assert_close(integers, loop.float(), rtol=1e-5, atol=1e-7)


def test_every_schedule_is_covered_by_these_tests() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("step:0", "step: every must be at least 1 round, not 0"),
        ("step:5,0", "step: factor must be a number above 0"),
        ("step:5,nan", "step: factor"),
        ("step", "missing a required argument: 'every'"),
        ("multistep", "not an empty list"),
        ("multistep:0,5", "rising order"),
        ("multistep:9,5", "rising order"),
        ("multistep:5,5", "rising order"),
        ("multistep:5,factor=-1", "multistep: factor"),
        ("cosine:0", "cosine: rounds"),
        ("cosine:10,final=-0.1", "cosine: final"),
        ("cosine:10,final=1.1", "cosine: final"),
        ("cosine:2.5", "rounds is a whole number, not '2.5'"),
        ("exponential:0", "exponential: gamma"),
        ("exponential:inf", "exponential: gamma"),
        ("linear:0", "linear: warmup"),
        ("linear:5,start=0", "linear: start"),
        ("linear:5,start=1.5", "linear: start"),
        ("cosin:10", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("linear:5+", "unknown schedule ''"),
        ("constant:1", "takes no unnamed values"),
    ],
)
def test_bad_arguments_raise(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        schedule(spec)
    assert says in str(caught.value)
