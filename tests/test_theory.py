"""Step sizes by theory: the theorems' numbers, where they are written, and who is refused."""

import math

import numpy as np
import pytest
import torch
from cli_runs import vfl as vfl_run
from helpers import regression

import vfl
from algorithms.diana import Diana
from algorithms.fedavg import FedAvg
from algorithms.gradskip import GradSkip
from algorithms.scaffnew import Scaffnew
from algorithms.scaffold import Scaffold
from vfl.runs import read_config

QUADRATIC = vfl.data.federated("quadratic:dim=6,L=4,mu=1", clients=8)
PROBLEM = vfl.LinearProblem(QUADRATIC).task(torch.float64)
WHOLE = vfl.Work(None)


def setting(**changed) -> vfl.Setting:
    return vfl.Setting(vfl.Smoothness(2.0, 3.0, 5.0, 0.5), regression(), 10, 10, 4)._replace(**changed)


def test_scaffolds_step_is_that_of_its_theorem():
    assert Scaffold().by_theory(setting()).local_lr == pytest.approx(1 / (81 * 5 * 4))
    assert Scaffold(server_lr=2.0).by_theory(setting(clients=1)).local_lr == pytest.approx(1 / (81 * 5 * 8))
    steep = setting(clients=1, population=100, smoothness=vfl.Smoothness(5.0, 5.0, 5.0, 5.0))
    assert Scaffold().by_theory(steep).local_lr == pytest.approx(1 / (100 * 15 * 5 * 4))


def test_scaffnews_and_gradskips_steps_are_those_of_their_theorems():
    p = math.sqrt(0.1)
    found = Scaffnew().by_theory(setting())
    assert (found.local_lr, found.p) == pytest.approx((1 / 5, p))
    skips = GradSkip(q=0.5).by_theory(setting())
    assert (skips.local_lr, skips.p, skips.q) == pytest.approx((0.1 / 5 / (1 - 0.5 * 0.9), p, 0.5))
    assert GradSkip(q=1.0).by_theory(setting()).local_lr == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("config", "changed", "sentence"),
    [
        (Scaffold(server_lr=0.5), {}, "scaffold's theorem has plain sgd on both sides, server-lr at least 1"),
        (Scaffold(compressor="natural"), {}, "no compressor"),
        (Scaffnew(), {"clients": 5}, "scaffnew's theorem asks all 10 clients, not 5"),
        (Scaffnew(), {"smoothness": vfl.Smoothness(2.0, 3.0, 5.0, 0.0)}, "needs strongly convex losses"),
        (Diana(), {}, "diana's theorem has one local step a round, not 4"),
    ],
)
def test_a_theorem_that_does_not_hold_is_refused_with_the_reason(config, changed, sentence):
    with pytest.raises(vfl.UsageError, match=sentence):
        config.by_theory(setting(**changed))


def test_methods_without_a_theorem_and_tasks_without_constants_are_refused():
    with pytest.raises(vfl.UsageError, match="fedavg has no step size from theory"):
        vfl.by_theory(FedAvg(), PROBLEM, QUADRATIC)
    with pytest.raises(vfl.UsageError, match="known for linear models alone"):
        vfl.by_theory(Scaffnew(), regression(), QUADRATIC)


def test_scaffnew_converges_with_the_steps_of_theory():
    found = vfl.by_theory(Scaffnew(), PROBLEM, QUADRATIC, clients_per_round="all", work=WHOLE)
    options = {"batch_size": None, "clients_per_round": "all", "execution": "vmap", "evaluation": vfl.Evaluation(0)}
    state, _ = vfl.simulate(found, PROBLEM, QUADRATIC, 300, **options)
    minimiser = vfl.solution(PROBLEM).x
    assert minimiser is not None and np.linalg.norm(minimiser - state.server.x.numpy()) < 1e-6


def test_the_runs_configuration_holds_the_step_sizes_found(tmp_path):
    out = tmp_path / "run"
    arguments = ["--data=quadratic:dim=6,L=4,mu=1", "--clients=8", "--clients-per-round=all", "--batch-size=all"]
    assert vfl_run("diana", *arguments, "--step-size=theory", "--rounds=2", f"--out={out}", "--quiet") == 0
    wanted = vfl.by_theory(Diana(), PROBLEM, QUADRATIC, clients_per_round="all", work=WHOLE).server_lr
    written = read_config(out / "config.yaml")
    assert written["step_size"] == "theory" and written["server_lr"] == pytest.approx(wanted)
    assert vfl_run("--resume", f"--out={out}", "--rounds=3", "--quiet") == 0
