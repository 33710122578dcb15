"""Recurrent layers written out for vmap against torch's own, in float64, and the character models made of them."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import SIZES, assert_same, packed, run
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence

import vfl
from algorithms.fedavg import FedAvg
from vfl.data import tokens
from vfl.layers import functionalize
from vfl.models import model
from vfl.recurrence import FunctionalRNN, LSTMRecurrence
from vfl.task import Batch

F64 = torch.float64
NEAR = {"rtol": 1e-10, "atol": 1e-12}
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
INPUT, HIDDEN = 3, 5


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Vmap raises where it has no rule for an operation, in place of a slow loop over the clients."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def seeded(make: Any, *arguments: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments, **options).to(F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def everything(layer: nn.Module, x: Tensor, state: Any) -> list[Tensor]:
    """Outputs and last states, and the gradients of a function of them all."""
    x = x.clone().requires_grad_()
    states = [s.clone().requires_grad_() for s in state]
    out, last = layer(x, None if not states else states[0] if len(states) == 1 else tuple(states))
    found = [out, *(last if isinstance(last, tuple) else (last,))]
    score = sum((normal(*part.shape, seed=i) * part.sin()).sum() for i, part in enumerate(found))
    assert isinstance(score, Tensor)
    return found + list(torch.autograd.grad(score, [x, *states, *layer.parameters()]))


@every_kind
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 3}, {"batch_first": True, "num_layers": 2}])
@pytest.mark.parametrize("begun", [False, True], ids=["from zero", "from a state"])
def test_outputs_states_and_gradients_are_torchs(make: Any, options: dict[str, Any], begun: bool) -> None:
    layer = seeded(make, INPUT, HIDDEN, **options)
    ours = functionalize(copy.deepcopy(layer))
    assert isinstance(ours, FunctionalRNN)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in layer.named_parameters()]
    count = 2 if isinstance(layer, nn.LSTM) else 1
    state = [normal(options.get("num_layers", 1), 4, HIDDEN, seed=9 + i) for i in range(count)] if begun else []
    x = normal(4, 6, INPUT) if options.get("batch_first") else normal(6, 4, INPUT)
    for found, wanted in zip(everything(ours, x, state), everything(layer, x, state), strict=True):
        torch.testing.assert_close(found, wanted, **NEAR)


@every_kind
def test_clients_under_vmap_have_the_gradients_of_a_loop(make: Any) -> None:
    C, B, T = 3, 4, 6
    layer = seeded(make, INPUT, HIDDEN, num_layers=2, batch_first=True)
    ours, x = functionalize(copy.deepcopy(layer)), normal(C, B, T, INPUT)
    weights = {n: p.detach() + 0.1 * normal(C, *p.shape, seed=i) for i, (n, p) in enumerate(layer.named_parameters())}

    def loss(net: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, weights, (x,))[0].sin().sum()

    mapped = vmap(grad(lambda w, x: loss(ours, w, x)))(weights, x)
    for c in range(C):
        own = {n: w[c].clone().requires_grad_() for n, w in weights.items()}
        wanted = torch.autograd.grad(loss(layer, own, x[c]), list(own.values()))
        for name, value in zip(own, wanted, strict=True):
            torch.testing.assert_close(mapped[name][c], value, **NEAR)


def test_the_hand_written_gradient_and_its_own_gradient_are_those_of_finite_differences() -> None:
    T, B, H = 3, 2, 2
    shapes = [(T, B, 4 * H), (4 * H, H), (B, H), (B, H)]
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(LSTMRecurrence.apply, inputs)
    assert torch.autograd.gradgradcheck(LSTMRecurrence.apply, inputs)


def test_a_hessian_vector_product_under_vmap_is_autograds_through_torchs_lstm() -> None:
    layer = seeded(nn.LSTM, INPUT, HIDDEN)
    ours, x = functionalize(copy.deepcopy(layer)), normal(2, 6, 4, INPUT)
    w = {n: p.detach() for n, p in layer.named_parameters()}
    v = {n: normal(*p.shape, seed=i) for i, (n, p) in enumerate(w.items())}

    def along(net: nn.Module, w: dict[str, Tensor], x: Tensor) -> Tensor:
        g = grad(lambda w: torch.func.functional_call(net, w, (x,))[0].square().sum())(w)
        return sum(((g[n] * v[n]).sum() for n in g), x.new_zeros(()))

    mapped = vmap(grad(lambda w, x: along(ours, w, x)), in_dims=(None, 0))(w, x)
    for c in range(2):
        for name, wanted in grad(lambda w, c=c: along(layer, w, x[c]))(w).items():
            torch.testing.assert_close(mapped[name][c], wanted, **NEAR)


def test_a_programs_size_does_not_depend_on_the_length_of_the_text_an_lstm_reads() -> None:
    def nodes(T: int) -> int:
        problem = vfl.task(seeded(model, "char_lstm:2,3", (T,), 4), dtype=F64)
        batch = Batch(
            torch.ones(2, 3, T, dtype=torch.int64), torch.ones(2, 3).long(), torch.ones(2, 3) > 0, torch.ones(2)
        )
        mapped = make_fx(vmap(lambda batch: problem.grad_fn(problem.x, batch, ())[0]))(batch)
        return len(mapped.graph.nodes)

    assert nodes(4) == nodes(40)


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"proj_size": 2}])
def test_layers_that_are_bidirectional_or_project_stay_torchs_own(options: dict[str, Any]) -> None:
    layer = nn.LSTM(INPUT, HIDDEN, **options)
    assert functionalize(layer) is layer


def test_a_layer_of_ones_own_class_is_left_alone() -> None:
    class Mine(nn.LSTM):
        pass

    layer = Mine(INPUT, HIDDEN)
    assert functionalize(layer) is layer


class Classifier(nn.Module):
    """A recurrent model as people write it, with a first state of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn = nn.LSTM(INPUT, HIDDEN, 2, batch_first=True, dropout=dropout)
        self.last = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        zero = torch.zeros(self.rnn.num_layers, len(x), self.rnn.hidden_size, dtype=x.dtype)
        _, (h, _) = self.rnn(x, (zero, zero))
        return self.last(h[-1])


def batch_of(C: int, B: int = 4) -> Batch:
    keys = vfl.random.split(vfl.random.key(5), C)
    return Batch(normal(C, B, 6, INPUT), torch.arange(C * B).view(C, B) % 3, torch.ones(C, B, dtype=torch.bool), keys)


def at(batch: Batch, c: int) -> Batch:
    """Client c's batch of a chunk's."""
    return vfl.tree_map(lambda part: part[c], batch)


def test_anyones_module_with_an_lstm_runs_under_vmap_and_its_state_loads_back() -> None:
    module, batch = seeded(Classifier), batch_of(3)
    problem = vfl.task(module, dtype=F64)
    x = problem.x + 0.1 * normal(3, len(problem.x))
    g, _ = vmap(lambda x, batch: problem.grad_fn(x, batch, ()))(x, batch)
    for c in range(3):
        module.load_state_dict(problem.state_dict(x[c], ()))
        loss = functional.cross_entropy(module(batch.x[c]), batch.y[c])
        wanted = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(module.parameters()))])
        torch.testing.assert_close(g[c], wanted, **NEAR)
    assert isinstance(module.rnn, nn.LSTM), "the module itself is left alone"


def test_dropout_between_the_layers_is_drawn_from_each_clients_key_and_off_in_evaluation() -> None:
    problem, plain = (vfl.task(seeded(Classifier, p), dtype=F64) for p in (0.5, 0.0))
    batch = batch_of(3)
    batch = batch._replace(x=batch.x[:1].expand_as(batch.x), y=batch.y[:1].expand_as(batch.y))
    g, _ = vmap(lambda batch: problem.grad_fn(problem.x, batch, ()))(batch)
    for c in range(3):
        one, _ = problem.grad_fn(problem.x, at(batch, c), ())
        torch.testing.assert_close(g[c], one, **NEAR)
    assert not torch.allclose(g[0], g[1], rtol=1e-2)
    first = at(batch, 0)
    losses = [p.evaluate(problem.x, first, ())["loss"] for p in (problem, plain)]
    torch.testing.assert_close(*losses, **NEAR)


@pytest.mark.parametrize(
    ("x", "says"),
    [(normal(6, INPUT), "shape [6, 3]"), (pack_sequence([normal(6, INPUT)]), "not PackedSequence")],
)
def test_what_is_no_batch_of_sequences_is_refused(x: Any, says: str) -> None:
    with pytest.raises(vfl.UsageError) as error:
        functionalize(seeded(nn.GRU, INPUT, HIDDEN))(x)
    assert "a recurrent layer needs a batch of sequences" in str(error.value) and says in str(error.value)


# The character models


@pytest.mark.parametrize(
    ("spec", "vocabulary", "count"),
    [
        # 820,522 in other frameworks (Reddi et al., 2003.00295), where a gate has one bias; torch's has two.
        ("char_lstm", 90, 820_522 + 2 * 4 * 256),
        ("char_lstm", 80, 819_920),
        ("char_gru", 80, 80 * 8 + 3 * (8 + 256 + 2) * 256 + 3 * (256 + 256 + 2) * 256 + 257 * 80),
        ("char_lstm:2,3,1", 5, 5 * 2 + 4 * (2 + 3 + 2) * 3 + 4 * 5),
    ],
)
def test_character_models_have_the_papers_number_of_parameters(spec: str, vocabulary: int, count: int) -> None:
    assert sum(p.numel() for p in model(spec, (80,), vocabulary).parameters()) == count


@pytest.mark.parametrize("spec", ["char_lstm:2,3,1", "char_gru:2,3,2"])
def test_every_position_is_scored_where_targets_are_sequences_else_the_last(spec: str) -> None:
    text = torch.arange(8).view(2, 4) % 5
    last, every = (seeded(model, spec, (4,), 5, target_shape) for target_shape in ((), (4,)))
    assert last(text).shape == (2, 5) and every(text).shape == (2, 4, 5)
    assert torch.equal(last(text), every(text)[:, -1])
    changed = text.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 5
    same = (every(text) == every(changed)).all(-1)
    assert same.tolist() == [[True, True, False, False]] * 2, "a score depends on what came before it alone"


@pytest.mark.parametrize("spec", ["char_lstm:3,5", "char_gru:3,5"])
@pytest.mark.parametrize("target_shape", [(), (5,)], ids=["last", "every"])
def test_federated_rounds_of_a_character_model_equal_the_loop(spec: str, target_shape: tuple[int, ...]) -> None:
    vocabulary, M = 7, sum(SIZES)
    text = torch.randint(vocabulary, (M, 6), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    y = text[:, 1:].long() if target_shape else text[:, -1].long()
    data = packed(text[:, :-1], y, SIZES)._replace(transform=tokens, classes=vocabulary)
    problem = vfl.task(seeded(model, spec, (5,), vocabulary, target_shape), dtype=F64)
    options = {"clients_per_round": 6, "batch_size": 4, "seed": 3}
    wanted = run(FedAvg(local_lr=0.5), problem, data, 2, execution="loop", **options)
    assert abs(wanted["server.x"] - problem.x.numpy()).max() > 1e-2
    for chunk in (1, 4):
        found = run(FedAvg(local_lr=0.5), problem, data, 2, chunk=chunk, **options)
        assert_same(found, wanted, 1e-9, f"chunk {chunk}")


@pytest.mark.parametrize("spec", ["char_lstm:4,16", "char_gru:4,16"])
def test_a_character_model_learns_to_read_on(spec: str) -> None:
    words = "to be or not to be "
    letters = {letter: i for i, letter in enumerate(sorted(set(words)))}
    text = torch.tensor([letters[letter] for letter in words * 3])
    windows = text.unfold(0, 10, 1)  # [48, 10]
    data = packed(windows[:, :-1], windows[:, 1:], [12] * 4)._replace(transform=tokens, classes=len(letters))
    problem = vfl.task(seeded(model, spec, (9,), len(letters), (9,)))
    options = {"clients_per_round": 4, "batch_size": 4, "local_epochs": 4, "execution": "vmap", "chunk": 4}
    history = vfl.simulate(FedAvg(local_lr=0.05, local_optimizer="adam"), problem, data, 6, **options).history
    assert history[0]["train_loss"] > 1.2
    assert history[-1]["train_loss"] < 0.3  # out of reach from one letter alone: after a space or an o come several


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "target_shape", "says"),
    [
        ("char_lstm:hidden=0", (9,), 5, (), "char_lstm: hidden must be at least 1, not 0"),
        ("char_gru:layers=0", (9,), 5, (), "char_gru: layers must be at least 1, not 0"),
        ("char_lstm:embedding=-1", (9,), 5, (), "char_lstm: embedding must be at least 1, not -1"),
        ("char_lstm", (1, 8, 8), 5, (), "char_lstm: needs sequences of tokens [positions], not inputs of shape"),
        ("char_lstm", (9,), 0, (), "char_lstm: needs at least 2 classes, one a character, not 0"),
        ("char_gru", (9,), 5, (8,), "char_gru: needs one target an example or one a position, [9], not [8]"),
    ],
)
def test_a_character_model_refuses_what_it_cannot_read(
    spec: str, shape: tuple[int, ...], classes: int, target_shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(vfl.UsageError) as error:
        model(spec, shape, classes, target_shape)
    assert says in str(error.value)
