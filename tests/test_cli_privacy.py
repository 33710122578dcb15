"""`vfl privacy`: the noise of a target ε, and the ε of a noise."""

import math
import re

import pytest
from dp_accounting import get_epsilon_gaussian

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


def test_local_noise_is_that_of_messages_and_its_epsilon_between_any_two(capsys):
    text = said(capsys, *SMALL, "--noise-multiplier", "30", "--mechanism", "local", "--delta", "1e-5")
    exact = get_epsilon_gaussian(30 / 2 / math.sqrt(20), 1e-5)
    assert exact <= value(text, "ε") <= 1.1 * exact  # SMALL asks for rdp, which is not exact
    assert "noise on a message  N(0, σ²), σ = 30 × --clip" in text
    assert re.search("neighbours +another data set of the client, seen by who gets all of its messages", text)


def test_examples_are_accounted_once_an_epoch_as_if_their_order_were_known(capsys):
    """T rounds of E epochs are T E Gaussian mechanisms, in which another example in one's place moves a sum by 2C."""
    arguments = ("--mechanism", "examples", "--rounds", "20", "--local-epochs", "3", "--delta", "1e-4")
    text = said(capsys, *arguments, "--noise-multiplier", "12")
    for t in (1, 2, 5, 10, 15, 20):
        exact = get_epsilon_gaussian(12 / 2 / math.sqrt(3 * t), 1e-4)
        assert re.search(rf"^ *{t} +{exact:.4f} *$", text, re.MULTILINE), text
    assert "noise on a minibatch's sum  N(0, σ²), σ = 12 × --example-clip" in text
    assert re.search("neighbours +another example in one's place, seen by who gets all of the client's messages", text)
    solved = value(said(capsys, *arguments, "--target-epsilon", "2"), "noise multiplier")
    assert 1.999 <= get_epsilon_gaussian(solved / 2 / math.sqrt(60), 1e-4) <= 2


def test_without_a_population_only_examples_are_accounted(capsys):
    assert _main(["privacy", "--target-epsilon", "2"]) == 2
    assert "needs --clients, the population" in capsys.readouterr().err


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
        (("--target-epsilon", "2", "--sampling", "poison"), "unknown sampler 'poison'; did you mean 'poisson'?"),
        (("--target-epsilon", "2", "--sampling", "fixed:a,b"), "where ids is a whole number, not 'a'"),
        (("--target-epsilon", "2", "--sampling", "fixed:0,500"), "sampler fixed names a client outside 0 … 199"),
        (
            ("--target-epsilon", "2", "--clients-per-round", "5..9"),
            "5..9 is a range, and here",
        ),
        (("--target-epsilon", "2", "--local-epochs", "2"), "--local-epochs belongs to --mechanism examples"),
        (("--target-epsilon", "2", "--mechanism", "examples"), "--mechanism examples needs --delta"),
        (("--target-epsilon", "two"), "--target-epsilon must be a number or none, not 'two'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    assert _main(["privacy", *SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vfl: ") and captured.err.count("\n") == 1
    assert sentence in captured.err
