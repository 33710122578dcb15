"""Quadratics, linear models and regularizers: their constants and minima against numpy in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import assert_same, packed, run
from torch import nn
from torch.func import vmap

import vfl
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from vfl import data as vfl_data
from vfl.problems import LinearProblem, Smoothness
from vfl.regularizers import REGULARIZERS, Regularizer, regularizer

F64 = torch.float64
NEAR = {"rtol": 1e-10, "atol": 1e-12}
SIZES = (7, 0, 12, 3, 5)  # examples of each client, one without any
FEATURES = 4
Array = np.ndarray


# --- references: each client's rows, and plain loops over them ---


class Reference:
    """f(x) = mean over clients with examples of (1/nᵢ) Σ ℓ(aᵀx, y) + r(x), from the definition."""

    def __init__(self, data: vfl_data.FederatedData, l2: float = 0.0, nonconvex: float = 0.0) -> None:
        clients = [data.clients.client(i) for i in range(data.clients.population)]
        self.clients = [(c.x.double().numpy(), c.y.double().numpy()) for c in clients if len(c.y)]
        self.logistic, self.l2, self.nonconvex = data.classes == 2, l2, nonconvex

    def value(self, x: Array) -> float:
        means = []
        for A, y in self.clients:
            z = A @ x
            each = np.log1p(np.exp(np.where(y > 0, -z, z))) if self.logistic else (z - y) ** 2 / 2
            means.append(each.mean())
        return float(np.mean(means) + self.l2 / 2 * x @ x + self.nonconvex * np.sum(x**2 / (1 + x**2)))

    def gradients(self, x: Array) -> list[Array]:
        """∇fᵢ(x) [N][D]."""
        r = self.l2 * x + self.nonconvex * 2 * x / (1 + x**2) ** 2
        slopes = [1 / (1 + np.exp(-A @ x)) - y if self.logistic else A @ x - y for A, y in self.clients]
        return [A.T @ s / len(A) + r for (A, _), s in zip(self.clients, slopes, strict=True)]

    def gradient(self, x: Array) -> Array:
        return np.mean(self.gradients(x), axis=0)

    def hessians(self, x: Array) -> list[Array]:
        """∇²fᵢ(x) [N][D, D]."""
        r = np.diag(self.l2 + self.nonconvex * (2 - 6 * x**2) / (1 + x**2) ** 3)
        found = []
        for A, _ in self.clients:
            p = 1 / (1 + np.exp(-A @ x))
            curvature = p * (1 - p) if self.logistic else np.ones(len(A))
            found.append(sum(c * np.outer(a, a) for c, a in zip(curvature, A, strict=True)) / len(A) + r)
        return found


def largest(H: Array) -> float:
    return float(np.linalg.eigvalsh(H)[-1])


def unequal(classes: int, sizes: tuple[int, ...] = SIZES, features: int = FEATURES) -> vfl_data.FederatedData:
    """Clients of different sizes, one of them empty, with numbers or two classes as targets."""
    draw = np.random.default_rng(0)
    A = draw.standard_normal((sum(sizes), features)) * draw.uniform(0.5, 2, features)
    y = draw.integers(2, size=len(A)) if classes else draw.standard_normal(len(A))
    return packed(torch.from_numpy(A), torch.from_numpy(y), sizes)._replace(classes=classes)


POINTS = [np.zeros(FEATURES), *np.random.default_rng(1).standard_normal((4, FEATURES)) * 2]


# --- the quadratic ---


QUADRATICS = [
    ("quadratic", 10, np.linspace(1, 2, 20)),
    ("quadratic:dim=7,L=30,mu=0.01,examples=3", 5, np.linspace(0.01, 30, 7)),
    ("quadratic:dim=1,L=3,mu=3", 4, np.array([3.0])),
    ("quadratic:dim=5,L=4,mu=1,iid=true", 3, np.linspace(1, 4, 5)),
    ("quadratic:dim=6,L=2,mu=0,examples=1", 3, np.array([0, 0, 0, 1.2, 1.6, 2])),  # 3 rows cannot fill 6 dimensions
]


@pytest.mark.parametrize(("spec", "clients", "spectrum"), QUADRATICS)
def test_the_quadratics_hessian_has_the_stated_spectrum(spec, clients, spectrum):
    data = vfl_data.federated(spec, clients=clients)
    reference = Reference(data)
    assert len(reference.clients) == clients
    H = np.mean(reference.hessians(np.zeros(len(spectrum))), axis=0)
    np.testing.assert_allclose(np.linalg.eigvalsh(H), spectrum, rtol=1e-10, atol=1e-12)
    found = LinearProblem(data).smoothness
    np.testing.assert_allclose((found.L, found.mu), (spectrum[-1], spectrum[0]), rtol=1e-10, atol=1e-12)


def test_the_quadratic_is_the_papers_squared_norm_over_n():
    """(1/n)‖Ax − b‖² with the rows and targets of the data shortened by √2."""
    data = vfl_data.federated("quadratic", clients=10)
    x, packed_data = np.arange(20.0), data.clients
    values = [np.sum(((A / 2**0.5) @ x - b / 2**0.5) ** 2) / 12 for A, b in Reference(data).clients]
    task = LinearProblem(data).task(F64)
    f, _ = vfl.objective(task, torch.from_numpy(x), (), packed_data, data.transform)
    assert f == pytest.approx(np.mean(values), rel=1e-12)


@pytest.mark.parametrize("iid", [False, True])
def test_the_quadratics_minimum_is_where_the_gradient_vanishes(iid):
    data = vfl_data.federated(f"quadratic:iid={str(iid).lower()}", clients=10, seed=3)
    reference, (x, least) = Reference(data), LinearProblem(data).solution
    assert x is not None and np.linalg.norm(x) > 0.1
    np.testing.assert_allclose(reference.gradient(x), 0, atol=1e-12)
    assert least == pytest.approx(reference.value(x), abs=1e-12)
    for step in np.random.default_rng(0).standard_normal((5, 20)):
        assert reference.value(x + step) >= least + 0.49 * step @ step  # μ = 1
    norms = [np.linalg.norm(g) for g in reference.gradients(x)]
    assert max(norms) < 1e-12 if iid else min(norms) > 0.5


def test_spread_says_how_far_the_clients_minimisers_lie_apart():
    def heterogeneity(spread):
        data = vfl_data.federated(f"quadratic:spread={spread}", clients=10)
        x = LinearProblem(data).solution.x
        return max(np.linalg.norm(g) for g in Reference(data).gradients(x))

    assert heterogeneity(0) < 1e-11 < 0.1 < heterogeneity(0.1) < heterogeneity(10)


def test_iid_clients_have_the_same_rows_and_others_do_not():
    for iid in (True, False):
        x, y, _ = vfl_data.federated(f"quadratic:examples=20,iid={str(iid).lower()}", clients=3).clients
        same = [torch.equal(t[:20], t[20:40]) and torch.equal(t[:20], t[40:]) for t in (x, y)]
        assert same == [iid, iid]


def test_a_quadratic_is_a_function_of_its_seed():
    a, b, c = (vfl_data.federated("quadratic", clients=3, seed=seed).clients for seed in (1, 1, 2))
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert not torch.allclose(a.x, c.x) and not torch.allclose(a.y, c.y)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("quadratic:dim=0", "dim must be at least 1, not 0"),
        ("quadratic:examples=0", "examples must be at least 1, not 0"),
        ("quadratic:L=1,mu=2", "0 ≤ mu ≤ L with L above 0 is needed"),
        ("quadratic:L=nan", "0 ≤ mu ≤ L"),
        ("quadratic:dim=1", "mu = L in one dimension"),
        ("quadratic:spread=-1", "spread must be a finite number ≥ 0, not -1.0"),
        ("quadratic:dim=50,examples=4", "mu above 0 in dim=50 needs as many rows, but all clients' examples are 40"),
        ("quadratic:dim=20,examples=12,iid=true", "but a client's examples are 12; take more examples or mu=0"),
    ],
)
def test_a_quadratic_that_cannot_be_is_refused(spec, sentence):
    with pytest.raises(vfl.UsageError) as error:
        vfl_data.federated(spec, clients=10)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_all_of_a_clients_examples_give_the_exact_gradient_in_the_engine():
    data = vfl_data.federated("quadratic:dim=6,examples=5", clients=4)
    reference, problem, eta = Reference(data), LinearProblem(data), 0.1
    x = np.zeros(6)
    for _ in range(5):
        x = x - eta * reference.gradient(x)
    options = {"clients_per_round": "all", "batch_size": None, "chunk": 4}
    found = run(FedAvg(local_lr=eta), problem.task(F64), data, 5, **options)
    np.testing.assert_allclose(found["server.x"], x, **NEAR)


# --- smoothness ---


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("sizes", [SIZES, (2, 1, 0)])  # more examples than features, and fewer
def test_smoothness_is_the_largest_curvature_from_the_definition(classes, sizes):
    data = unequal(classes, sizes)
    reference = Reference(data)
    hessians = reference.hessians(np.zeros(FEATURES))  # where the curvature of both losses is largest
    L_i = [largest(H) for H in hessians]
    mean = np.mean(hessians, axis=0)
    mu = 0.0 if classes else max(np.linalg.eigvalsh(mean)[0], 0)
    wanted = Smoothness(largest(mean), np.sqrt(np.mean(np.square(L_i))), max(L_i), mu)
    np.testing.assert_allclose(LinearProblem(data).smoothness, wanted, **NEAR)


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("penalty", [Regularizer(), Regularizer(l2=0.3), Regularizer(nonconvex=0.2)])
def test_no_curvature_anywhere_lies_outside_the_constants(classes, penalty):
    data = unequal(classes)
    reference, found = Reference(data, *penalty), LinearProblem(data, penalty).smoothness
    for x in POINTS:
        hessians = reference.hessians(x)
        assert max(map(largest, hessians)) <= found.L_max + 1e-12
        eigenvalues = np.linalg.eigvalsh(np.mean(hessians, axis=0))
        assert eigenvalues[-1] <= found.L + 1e-12
        assert found.mu <= eigenvalues[0] + 1e-12 or found.mu == 0  # f is not convex, or not known to be
    hessians = reference.hessians(np.zeros(FEATURES))
    assert max(map(largest, hessians)) == pytest.approx(found.L_max, rel=1e-12)
    assert largest(np.mean(hessians, axis=0)) == pytest.approx(found.L, rel=1e-12)


def test_a_regularizer_shifts_the_constants():
    data = unequal(0)
    plain, convex, concave = (
        LinearProblem(data, r).smoothness for r in (Regularizer(), Regularizer(l2=0.5), Regularizer(nonconvex=0.1))
    )
    assert (convex.L - plain.L, convex.mu - plain.mu) == pytest.approx((0.5, 0.5))
    assert (concave.L - plain.L, concave.mu - plain.mu) == pytest.approx((0.2, -0.05))
    assert LinearProblem(data, Regularizer(nonconvex=1e3)).smoothness.mu == 0
    assert LinearProblem(unequal(2), Regularizer(l2=0.5)).smoothness.mu == 0.5


def test_the_transform_counts_as_part_of_the_data():
    data = unequal(0)
    doubled = data._replace(transform=lambda x, dtype: 2 * x.to(dtype))
    wanted, found = (np.array(LinearProblem(d).smoothness) for d in (data, doubled))
    np.testing.assert_allclose(found, 4 * wanted, **NEAR)


# --- minima ---


@pytest.mark.parametrize(("classes", "l2"), [(0, 0.0), (0, 0.3), (2, 1e-4), (2, 0.3)])
def test_the_solution_is_the_stationary_point_and_its_value(classes, l2):
    data = unequal(classes)
    reference, (x, least) = Reference(data, l2), LinearProblem(data, Regularizer(l2)).solution
    assert x is not None
    np.testing.assert_allclose(reference.gradient(x), 0, atol=1e-12)
    assert least == pytest.approx(reference.value(x), rel=1e-12)


def test_separable_classes_have_a_minimum_with_l2():
    A = torch.tensor([[1.0], [2.0], [-1.0]], dtype=F64)
    data = packed(A, torch.tensor([1, 1, 0]), [3])._replace(classes=2)
    x, least = LinearProblem(data, Regularizer(1e-6)).solution
    assert x is not None and x > 5  # it would be infinite without
    np.testing.assert_allclose(Reference(data, 1e-6).gradient(x), 0, atol=1e-13)
    assert least < 1e-3


def test_fewer_examples_than_features_leave_the_minimiser_open_and_not_the_minimum():
    data = unequal(0, (2, 1))
    x, least = LinearProblem(data).solution
    assert x is None and least == pytest.approx(0, abs=1e-20)
    x, least = LinearProblem(data, Regularizer(l2=0.1)).solution
    assert x is not None and least > 0


def test_an_unknown_minimum_is_refused_with_its_reason():
    with pytest.raises(vfl.UsageError, match="nonconvex regularizer is not known"):
        _ = LinearProblem(unequal(0), Regularizer(nonconvex=0.1)).solution
    with pytest.raises(vfl.UsageError, match="logistic loss alone may have no minimum; an l2 regularizer"):
        _ = LinearProblem(unequal(2)).solution


def test_what_is_no_linear_problem_is_refused():
    data = unequal(0)
    with pytest.raises(vfl.UsageError, match="but small has 3 classes"):
        LinearProblem(data._replace(classes=3))
    wide = data.clients._replace(y=torch.zeros(27, 2))
    with pytest.raises(vfl.UsageError, match=r"but small has targets of shape \[27, 2\]"):
        LinearProblem(data._replace(clients=wide))
    with pytest.raises(vfl.UsageError, match="no client of small has an example"):
        _ = LinearProblem(unequal(0, (0, 0))).smoothness
    task = vfl.task(nn.Linear(2, 3))
    for what, function in (("smoothness", vfl.smoothness), ("minimum", vfl.solution)):
        with pytest.raises(vfl.UsageError, match=f"the objective's {what} is known only for the model linear"):
            function(task)


def test_an_algorithm_finds_the_constants_at_its_task():
    """What a step size by theory needs when an algorithm is built."""
    problem = LinearProblem(unequal(2), Regularizer(l2=0.1))
    task = problem.task(F64)
    assert vfl.smoothness(task) == problem.smoothness
    assert vfl.solution(task) is problem.solution
    assert vfl.smoothness(task) is problem.smoothness, "it is computed once"


def test_gradient_descent_with_step_one_over_smoothness_contracts_as_theory_says():
    data = vfl_data.federated("quadratic:L=5,mu=1", clients=10)
    problem = LinearProblem(data)
    L, _, _, mu = problem.smoothness
    options = {"clients_per_round": "all", "batch_size": None, "evaluation": vfl.Evaluation(metrics=("distance",))}
    _, history = vfl.simulate(FedAvg(local_lr=1 / L), problem.task(F64), data, 20, **options)
    distances = [np.linalg.norm(problem.solution.x), *(m["distance"] for m in history)]
    assert all(b <= (1 - mu / L) * a + 1e-12 for a, b in pairwise(distances))
    assert distances[-1] < 0.02 * distances[0]


@pytest.mark.parametrize(("spec", "penalty"), [("quadratic:dim=8", None), ("two classes", "l2:0.3")])
def test_scaffold_reaches_the_known_minimum(spec, penalty):
    data = unequal(2, (6, 5, 9)) if spec == "two classes" else vfl_data.federated(spec, clients=6)
    problem = LinearProblem(data, regularizer(penalty))
    when = vfl.Evaluation(every=10, metrics=("grad_norm", "suboptimality", "distance"))
    config = Scaffold(local_lr=0.6 / problem.smoothness.L_max)
    work = {"clients_per_round": "all", "batch_size": None, "local_steps": 2, "evaluation": when}
    _, history = vfl.simulate(config, problem.task(F64), data, 60, execution="vmap", chunk=10, **work)
    assert history[9]["distance"] > 1e-3
    assert history[-1]["grad_norm"] < 1e-7 and history[-1]["distance"] < 1e-7
    assert abs(history[-1]["suboptimality"]) < 1e-13


# --- regularizers as part of a task's loss ---


@pytest.mark.parametrize(("l2", "nonconvex"), [(0.7, 0.0), (0.0, 0.4), (0.7, 0.4)])
def test_a_regularizers_value_and_curvature_are_its_formulas(l2, nonconvex):
    r = Regularizer(l2, nonconvex)
    x = np.linspace(-3, 3, 601)
    assert float(r(torch.from_numpy(x))) == pytest.approx(l2 / 2 * np.sum(x**2) + nonconvex * np.sum(x**2 / (1 + x**2)))
    each = np.array([float(r(torch.tensor([value], dtype=F64))) for value in x])
    curvature = np.diff(each, 2) / 0.01**2  # central differences, at multiples of 0.01
    assert (curvature.min(), curvature.max()) == pytest.approx((r.smallest, r.largest), abs=1e-3)


def test_every_regularizer_can_be_written():
    assert set(REGULARIZERS) == {"l2", "nonconvex"}
    assert regularizer("l2:0.1") == Regularizer(l2=0.1)
    assert regularizer("nonconvex:2") == Regularizer(nonconvex=2)
    assert regularizer(None) == Regularizer(0, 0)
    for spec, sentence in (("l3:1", "unknown regularizer 'l3'"), ("l2:-1", "l2: the strength must be"), ("l2", "l2")):
        with pytest.raises(vfl.UsageError, match=sentence):
            regularizer(spec)


def batches(C: int, B: int) -> vfl.Batch:
    """C minibatches of B rows, of which the c-th has c + 1 that count; the others are padding."""
    draw = np.random.default_rng(5)
    x, y = torch.from_numpy(draw.standard_normal((C, B, FEATURES))), torch.from_numpy(draw.integers(2, size=(C, B)))
    mask = torch.arange(B) < torch.arange(C)[:, None] + 1
    return vfl.Batch(x, y, mask, vfl.random.split(vfl.random.key(0), C))


def test_a_minibatchs_gradient_holds_the_regularizers_once_under_vmap_too():
    penalty = Regularizer(0.3, 0.2)
    problem = LinearProblem(unequal(2), penalty)
    task, many, x = problem.task(F64), batches(4, 5), torch.from_numpy(POINTS[1])
    g, aux = vmap(lambda *b: task.grad_fn(x, vfl.Batch(*b), ()))(*many)
    for c in range(4):
        n = c + 1
        data = packed(many.x[c, :n], many.y[c, :n], [n])._replace(classes=2)
        reference = Reference(data, *penalty)
        np.testing.assert_allclose(g[c], reference.gradient(POINTS[1]), **NEAR)
        assert float(aux.loss[c]) == pytest.approx(n * reference.value(POINTS[1]), rel=1e-12)


def test_padding_alone_has_no_gradient_and_no_loss_even_with_a_regularizer():
    task = LinearProblem(unequal(2), Regularizer(0.3)).task(F64)
    many = batches(1, 5)
    batch = vfl.Batch(many.x[0], many.y[0], torch.zeros(5, dtype=torch.bool), many.key[0])
    g, aux = task.grad_fn(torch.ones(FEATURES, dtype=F64), batch, ())
    assert not g.any() and aux.loss == 0 and aux.examples == 0


def test_a_clients_full_gradient_and_a_test_loss_hold_the_regularizer_once():
    penalty, data = Regularizer(0.3, 0.2), unequal(2)
    task, reference, x = LinearProblem(data, penalty).task(F64), Reference(data, *penalty), torch.from_numpy(POINTS[2])
    client = data.clients.client(2)
    found = vfl.evaluate(task, x, (), client, data.transform)
    alone = Reference(packed(*client, [12])._replace(classes=2), *penalty)
    assert found["loss"] == pytest.approx(alone.value(POINTS[2]), rel=1e-12)
    assert 0 <= found["accuracy"] <= 1
    # One full step of every client from x: FedAvg's mean change is −η ∇f, in minibatches of 4 summed by full_gradient.
    config = Scaffold(local_lr=1e-3, option=1)
    moved = task._replace(x=x)
    state, _ = vfl.simulate(config, moved, data, 1, clients_per_round="all", batch_size=4, local_steps=1)
    _, (c_i,) = state.store.rows()
    np.testing.assert_allclose(c_i, reference.gradients(POINTS[2]), **NEAR)


def test_without_a_regularizer_nothing_changes():
    data = unequal(2)
    runs = []
    for penalty in (None, Regularizer()):
        task = vfl.task(vfl.models.model("linear", (FEATURES,), 2), vfl.logistic, regularizer=penalty, dtype=F64)
        runs.append(run(FedAvg(), task, data, 3, clients_per_round=3, batch_size=4, chunk=3))
    assert_same(*runs, 0)


def test_any_function_of_the_parameters_can_regularize_any_module():
    module = nn.Linear(FEATURES, 3)
    data, batch = unequal(2), batches(1, 5)
    single = vfl.Batch(batch.x[0], batch.y[0], batch.mask[0], batch.key[0])
    plain, pulled = (vfl.task(module, regularizer=r, dtype=F64) for r in (None, lambda x: 3 * x.sum()))
    assert len(data.clients.y) and plain.problem is None
    (g, aux), (h, bux) = (t.grad_fn(t.x, single, ()) for t in (plain, pulled))
    np.testing.assert_allclose(h - g, 3.0, rtol=1e-12)
    assert float(bux.loss - aux.loss) == pytest.approx(3 * float(plain.x.sum()))


# --- the logistic loss ---


def test_the_logistic_loss_and_accuracy_are_their_formulas():
    z = torch.tensor([[-1.5], [0.3], [2.0], [-0.1], [0.0]], dtype=F64)
    y = torch.tensor([0, 1, 0, 1, 1])
    s = 2 * y.numpy() - 1
    wanted = np.log(1 + np.exp(-s * z[:, 0].numpy()))
    for outputs in (z, z[:, 0]):
        np.testing.assert_allclose(vfl.logistic(outputs, y), wanted, rtol=1e-14)
        assert vfl.binary_accuracy(outputs, y).tolist() == [1, 1, 0, 0, 0]


def test_the_logistic_loss_is_exact_where_the_exponential_overflows():
    z, y = torch.tensor([1e4, -1e4, 40.0, -40.0], dtype=F64), torch.tensor([0, 1, 1, 0])
    np.testing.assert_allclose(vfl.logistic(z, y), [1e4, 1e4, np.exp(-40), np.exp(-40)], rtol=1e-12)


# --- computing in bfloat16 ---


def test_bfloat16_layers_leave_parameters_gradients_and_loss_in_float32():
    module = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    full, half = (vfl.task(module, compute=compute) for compute in (None, torch.bfloat16))
    many = batches(4, 5)
    (g, aux), (h, bux) = (
        vmap(lambda *b, t=t: t.grad_fn(t.x, vfl.Batch(b[0].float(), *b[1:]), t.buffers))(*many) for t in (full, half)
    )
    assert {h.dtype, bux.loss.dtype, half.x.dtype, *(b.dtype for b in bux.buffers[:2])} == {torch.float32}
    error = float((h - g).norm() / g.norm())
    assert 1e-4 < error < 0.1, "about the 3 digits of bfloat16, not the 7 of float32"
    torch.testing.assert_close(bux.loss, aux.loss, rtol=0.02, atol=0.02)
