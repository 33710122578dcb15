"""`vfl privacy`: the noise of a target ε, and the ε of a noise."""

import re

import pytest

from vfl.cli import _main
from vfl.privacy import epsilon, make_plan

SMALL = ("--clients", "200", "--clients-per-round", "10", "--rounds", "20", "--accountant", "rdp")


def said(capsys, *arguments: str) -> str:
    """What the command prints when all is well."""
    assert _main(["privacy", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def value(text: str, name: str) -> float:
    """The number that follows a name."""
    found = re.search(rf"^{name} +([0-9.e-]+)", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_the_noise_that_is_printed_meets_the_target(capsys):
    text = said(capsys, *SMALL, "--target-epsilon", "2")
    plan = make_plan("poisson", 10, 200, 1 / 2000, "rdp")
    assert value(text, "δ") == 1 / 2000
    assert 1.98 <= epsilon(plan, value(text, "noise multiplier"), 20) <= 2
    assert "poisson, 10 of 200 clients a round, q = 0.05" in text


def test_the_epsilon_of_a_noise_is_printed_as_the_rounds_go_by(capsys):
    text = said(capsys, *SMALL, "--noise-multiplier", "1.5", "--delta", "1e-4")
    plan = make_plan("poisson", 10, 200, 1e-4, "rdp")
    for t in (1, 2, 5, 10, 15, 20):
        assert re.search(rf"^ *{t} +{epsilon(plan, 1.5, t):.4f} *$", text, re.MULTILINE), text
    assert f"{epsilon(plan, 1.5, 20):.4f} after 20 rounds" in text
    assert "σ = 0.15 × --clip" in text


def test_ftrl_says_in_how_many_rounds_a_client_may_take_part(capsys):
    text = said(capsys, *SMALL, "--noise-multiplier", "30", "--mechanism", "ftrl")
    assert re.search("rounds of a client +at most [0-9]+, but for a probability of 0.00025, a part of δ", text)
    text = said(capsys, *SMALL, "--noise-multiplier", "30", "--mechanism", "ftrl", "--sampling", "fixed")
    assert re.search("rounds of a client +at most 20, surely", text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "needs one of --target-epsilon, to solve for the noise, and --noise-multiplier, to give its ε"),
        (("--target-epsilon", "2", "--noise-multiplier", "1"), "needs one of --target-epsilon"),
        (("--target-epsilon", "-1"), "target-epsilon must be a finite number > 0, not -1.0"),
        (("--noise-multiplier", "0"), "--noise-multiplier must be a finite number from 0.03125 on, not 0.0"),
        (("--target-epsilon", "2", "--rounds", "0"), "--rounds must be at least 1, not 0"),
        (("--target-epsilon", "2", "--clients", "0"), "--clients must be at least 1, not 0"),
        (("--target-epsilon", "2", "--clients", "5"), "clients-per-round is 10, above the population of 5 clients"),
        (("--target-epsilon", "2", "--delta", "1"), "delta must lie between 0 and 1, not 1.0"),
        (("--target-epsilon", "2", "--sampling", "weighted"), "no accountant knows --sampling weighted"),
        (("--target-epsilon", "2", "--sampling", "uniform", "--accountant", "pld"), "or --accountant rdp"),
        (("--target-epsilon", "two"), "--target-epsilon must be a number or none, not 'two'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    assert _main(["privacy", *SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vfl: ") and captured.err.count("\n") == 1
    assert sentence in captured.err
