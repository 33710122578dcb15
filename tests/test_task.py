"""Tasks against torch's own autograd and layers, in float64 where equality is claimed."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from vfl import random
from vfl.errors import UsageError
from vfl.task import Batch, Task, accuracy, cross_entropy, squared_error, task

F64 = torch.float64
NEAR = {"rtol": 1e-10, "atol": 1e-12}


def seeded(make, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, F64)


def labels(*shape: int, classes: int = 3, seed: int = 9) -> Tensor:
    return random.randint(random.key(seed), shape, classes)


def whole(x: Tensor, y: Tensor, seed: int = 0) -> Batch:
    return Batch(x, y, torch.ones(len(x), dtype=torch.bool), random.key(seed))


def padded(batch: Batch, extra: int, garbage: float) -> Batch:
    """The same examples among `extra` rows of garbage that the mask hides; padding comes first and last."""
    front, back = extra // 2, extra - extra // 2
    x = torch.cat([batch.x.new_full((n, *batch.x.shape[1:]), garbage) for n in (front, back)])
    y = torch.cat([batch.y[:1]] * extra)
    return Batch(
        torch.cat([x[:front], batch.x, x[front:]]),
        torch.cat([y[:front], batch.y, y[front:]]),
        torch.tensor([False] * front + [True] * len(batch.x) + [False] * back),
        batch.key,
    )


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def torch_gradient(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def same_gradient(problem: Task, g: Tensor, expected: dict[str, Tensor]) -> None:
    named = problem.parameters(g)
    assert list(named) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(named[name], value, **NEAR)


def test_the_flat_gradient_is_autograds_for_every_parameter() -> None:
    module = seeded(convnet).to(F64)
    problem = task(module, dtype=F64)
    x, y = normal(7, 2, 6, 6), labels(7)
    g, aux = problem.grad_fn(problem.x, whole(x, y), problem.buffers)
    loss = functional.cross_entropy(module(x), y)
    same_gradient(problem, g, torch_gradient(module, loss))
    torch.testing.assert_close(aux.loss, 7 * loss.detach(), **NEAR)
    assert aux.examples == 7
    assert problem.x.shape == g.shape == (sum(problem.sizes),)


def test_the_gradient_is_taken_at_the_given_point_and_not_where_the_task_began() -> None:
    problem = task(seeded(convnet), dtype=F64)
    other = seeded(convnet, 1).to(F64)
    batch = whole(normal(4, 2, 6, 6), labels(4))
    at = torch.cat([p.detach().reshape(-1) for p in other.parameters()])
    g, _ = problem.grad_fn(at, batch, ())
    same_gradient(problem, g, torch_gradient(other, functional.cross_entropy(other(batch.x), batch.y)))


def test_parameters_are_views_of_the_flat_vector_under_any_batch_axes() -> None:
    problem = task(seeded(convnet), dtype=F64)
    x = normal(2, 3, problem.x.numel())
    named = problem.parameters(x)
    assert {n: tuple(p.shape) for n, p in named.items()} == {
        n: (2, 3, *s) for n, s in zip(problem.names, problem.shapes, strict=True)
    }
    assert all(p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in named.values())
    assert torch.equal(torch.cat([p.flatten(2) for p in named.values()], dim=2), x)
    mapped = vmap(vmap(problem.parameters))(x)
    assert all(torch.equal(mapped[n], named[n]) for n in named)


class Tied(nn.Module):
    """The output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


class Temperature(nn.Module):
    """A scalar parameter, a constant that is not saved, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.arange(3.0), persistent=False)
        self.register_buffer("gain", torch.full((3,), 2.0))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale * self.gain + self.shift


def frozen_first() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)
    return module


class Shared(nn.Module):
    """One batch norm and one dropout, each used in two places under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.again = self.norm
        self.layers = nn.ModuleList([self.first, self.norm, self.second])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.again(torch.tanh(self.layers[0](self.norm(x)))))


MODULES = {
    "plain": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "batch-norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)),
    "only-a-batch-norm": lambda: nn.BatchNorm1d(4),
    "frozen": frozen_first,
    "tied": Tied,
    "buffers": Temperature,
    "shared": Shared,
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_state_dict_loads_into_the_original_module_and_gives_the_same_outputs(name: str) -> None:
    module = seeded(MODULES[name]).to(F64)
    outputs: list[Tensor] = []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        outputs.append(out)
        return cross_entropy(out, y)

    problem = task(module, loss, dtype=F64)
    data = labels(8, classes=6) if name == "tied" else normal(8, 4)
    batch = whole(data, labels(8))
    x, buffers = problem.x, problem.buffers
    for _ in range(3):
        g, aux = problem.grad_fn(x, batch, buffers)
        x, buffers = x - 0.3 * g, aux.buffers
    problem.evaluate(x, batch, buffers)
    fresh = seeded(MODULES[name], 5).to(F64)
    for p, original in zip(fresh.parameters(), module.parameters(), strict=True):
        assert name == "only-a-batch-norm" or p.dim() < 2 or not torch.equal(p, original)
    state = problem.state_dict(x, buffers)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.eval()(data), outputs[-1], **NEAR)
    assert list(state) == list(module.state_dict())
    module.load_state_dict(state)
    torch.testing.assert_close(module.eval()(data), outputs[-1], **NEAR)


def test_the_state_dict_shares_no_memory_with_the_run() -> None:
    problem = task(seeded(MODULES["batch-norm"]), dtype=F64)
    before = problem.x.clone(), [b.clone() for b in problem.buffers]
    for value in problem.state_dict(problem.x, problem.buffers).values():
        assert value.is_contiguous()
        value.zero_()
    assert torch.equal(problem.x, before[0])
    assert all(torch.equal(a, b) for a, b in zip(problem.buffers, before[1], strict=True))


def test_the_users_module_is_left_alone_and_later_changes_to_it_do_not_matter() -> None:
    module = seeded(MODULES["batch-norm"]).eval()
    kinds, before = [type(m) for m in module.modules()], copy.deepcopy(module.state_dict())
    problem = task(module)
    batch = whole(normal(8, 4).float(), labels(8))
    first, aux = problem.grad_fn(problem.x, batch, problem.buffers)
    assert [type(m) for m in module.modules()] == kinds
    assert not any(m.training for m in module.modules())
    assert all(torch.equal(module.state_dict()[n], v) for n, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    assert torch.equal(problem.grad_fn(problem.x, batch, problem.buffers)[0], first)
    assert not torch.equal(aux.buffers[0], problem.buffers[0])


def test_a_gradient_changes_neither_the_task_nor_its_inputs() -> None:
    problem = task(seeded(MODULES["batch-norm"]), dtype=F64)
    batch = whole(normal(8, 4), labels(8))
    before = [t.clone() for t in (problem.x, *problem.buffers, batch.x)]
    first = problem.grad_fn(problem.x, batch, problem.buffers)
    second = problem.grad_fn(problem.x, batch, problem.buffers)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1].buffers, second[1].buffers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((problem.x, *problem.buffers, batch.x), before, strict=True))


class Counting(nn.Module):
    """A layer that writes a buffer in place and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.seen += out.detach().sum(0)
        self.last = out.detach()[-1]
        return out


def test_layers_may_write_their_buffers_in_place() -> None:
    problem, batch = task(seeded(Counting), dtype=F64), whole(normal(5, 4), labels(5))
    out = batch.x @ problem.parameters(problem.x)["layer.weight"].T + problem.parameters(problem.x)["layer.bias"]
    given = tuple(b.clone() for b in problem.buffers)
    _, once = problem.grad_fn(problem.x, batch, given)
    _, twice = problem.grad_fn(problem.x, batch, once.buffers)
    torch.testing.assert_close(once.buffers, (out.sum(0), out[-1]), **NEAR)
    torch.testing.assert_close(twice.buffers, (2 * out.sum(0), out[-1]), **NEAR)
    assert not any(b.any() for b in (*given, *problem.buffers))
    problem.evaluate(problem.x, batch, given)
    assert not any(b.any() for b in given)
    xs = torch.stack([problem.x, 2 * problem.x])
    stacked = tuple(torch.stack([b, b + 1]) for b in given)
    mapped = vmap(problem.grad_fn, in_dims=(0, None, 0))(xs, batch, stacked)[1].buffers
    torch.testing.assert_close(mapped[0], torch.stack([out.sum(0), 2 * out.sum(0) + 1]), **NEAR)
    assert not stacked[0][0].any()


def test_frozen_parameters_stay_out_of_x_and_are_used_as_they_are() -> None:
    module = seeded(frozen_first).to(F64)
    problem = task(module, dtype=F64)
    assert problem.names == ("1.weight", "3.weight", "3.bias")
    batch = whole(normal(8, 4), labels(8))
    g, _ = problem.grad_fn(problem.x, batch, problem.buffers)
    same_gradient(problem, g, torch_gradient(module, functional.cross_entropy(module(batch.x), batch.y)))


def test_tied_parameters_are_one_and_their_gradients_add_up() -> None:
    module = seeded(Tied).to(F64)
    problem = task(module, dtype=F64)
    assert problem.names == ("embed.weight", "body.weight", "body.bias")
    batch = whole(labels(8, classes=6), labels(8, classes=6, seed=3))
    g, _ = problem.grad_fn(problem.x, batch, ())
    same_gradient(problem, g, torch_gradient(module, functional.cross_entropy(module(batch.x), batch.y)))


def test_a_module_used_in_two_places_stays_one_module() -> None:
    module = seeded(Shared).to(F64)
    problem = task(module, dtype=F64)
    batch = whole(normal(8, 4), labels(8))
    g, aux = problem.grad_fn(problem.x, batch, problem.buffers)
    same_gradient(problem, g, torch_gradient(module, functional.cross_entropy(module(batch.x), batch.y)))
    after = dict(zip(problem.buffer_names, aux.buffers, strict=True))
    assert after["norm.num_batches_tracked"] == 2
    torch.testing.assert_close(after["norm.running_mean"], module.norm.running_mean, **NEAR)
    torch.testing.assert_close(after["norm.running_var"], module.norm.running_var, **NEAR)


def test_a_module_without_anything_to_train_is_refused() -> None:
    for module in (nn.Flatten(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(UsageError, match="nothing to train"):
            task(module)


# Padding


@pytest.mark.parametrize("garbage", [0.0, -3.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ["plain", "batch-norm", "only-a-batch-norm", "shared", "squared-error"])
def test_masked_rows_count_for_nothing(name: str, dtype: torch.dtype, garbage: float) -> None:
    make = MODULES.get(name, lambda: nn.Linear(4, 3))
    module = seeded(make)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    regression = name == "squared-error"
    problem = task(module, squared_error if regression else cross_entropy, dtype=dtype)
    batch = whole(normal(5, 4).to(dtype), normal(5, 3).to(dtype) if regression else labels(5))
    alone, padding = (
        problem.grad_fn(problem.x, b, problem.buffers) for b in (batch, padded(batch, 3, garbage))
    )  # fmt: skip
    near = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, F64: NEAR}[dtype]
    torch.testing.assert_close(padding[0], alone[0], **near)
    torch.testing.assert_close(padding[1], alone[1], **near)


@pytest.mark.parametrize("name", MODULES)
def test_a_batch_of_padding_alone_has_no_gradient_and_leaves_no_trace(name: str) -> None:
    problem = task(seeded(MODULES[name]), dtype=F64)
    data = labels(4, classes=6) if name == "tied" else normal(4, 4)
    batch = whole(data, labels(4))
    before = problem.grad_fn(problem.x, batch, problem.buffers)[1].buffers
    g, aux = problem.grad_fn(problem.x, batch._replace(mask=torch.zeros(4, dtype=torch.bool)), before)
    assert torch.equal(g, torch.zeros_like(problem.x))
    assert aux.loss == 0
    assert aux.examples == 0
    assert all(torch.equal(a, b) for a, b in zip(aux.buffers, before, strict=True))


# Batch norm

NORMS = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "1d-sequence": (lambda: nn.BatchNorm1d(3), (3, 4)),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 4, 5)),
    "3d": (lambda: nn.BatchNorm3d(3), (3, 2, 3, 2)),
    "not-affine": (lambda: nn.BatchNorm2d(3, affine=False), (3, 4, 5)),
    "no-running-statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 5)),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (3,)),
    "momentum": (lambda: nn.BatchNorm2d(3, momentum=0.7, eps=0.1), (3, 4, 5)),
}


class Normed(nn.Module):
    """A batch norm between a scale and a weighted sum."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(shape) + 0.5)
        self.norm = norm
        self.weights = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x * self.scale) * self.weights).flatten(1).cumsum(1)


def normed(name: str) -> tuple[nn.Module, Task, tuple[int, ...]]:
    make, shape = NORMS[name]
    module = seeded(lambda: Normed(make(), shape)).to(F64)
    return module, task(module, squared_error, {"output": lambda out, y: out[:, -1]}, dtype=F64), shape


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_trains_and_evaluates_as_torchs_does_on_the_unpadded_batch(name: str) -> None:
    module, problem, shape = normed(name)
    buffers = problem.buffers
    width = math.prod(shape)
    for step, size in enumerate((5, 2, 8)):
        batch = whole(normal(size, *shape, seed=step) * 2 + 1, normal(size, width, seed=7))
        loss = squared_error(module(batch.x), batch.y)
        expected = torch_gradient(module, loss.mean())
        g, aux = problem.grad_fn(problem.x, padded(batch, 5, 100.0), buffers)
        same_gradient(problem, g, expected)
        torch.testing.assert_close(aux.loss, loss.sum().detach(), **NEAR)
        buffers = aux.buffers
        after = dict(zip(problem.buffer_names, buffers, strict=True))
        torch.testing.assert_close(after, dict(module.named_buffers()), **NEAR)
    module.eval()
    batch = whole(normal(6, *shape, seed=11), normal(6, width, seed=12))
    values = problem.evaluate(problem.x, batch, buffers)
    torch.testing.assert_close(values["output"], module(batch.x)[:, -1].detach(), **NEAR)
    shifted = problem.evaluate(problem.x, batch, tuple(b + 1 for b in buffers))["output"]
    if buffers:  # evaluation reads the running statistics it is given
        assert not torch.allclose(shifted, values["output"])


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_under_vmap_equals_a_loop_with_masks_of_each_client(name: str) -> None:
    _, problem, shape = normed(name)
    xs = problem.x + 0.1 * normal(3, problem.x.numel())
    data, targets = normal(3, 6, *shape), normal(3, 6, math.prod(shape), seed=1)
    masks = torch.tensor([[True] * 6, [True, False] * 3, [False] * 5 + [True]])
    keys = random.split(random.key(0), 3)
    buffers = tuple(torch.stack([b, b + 1, b + 2]) for b in problem.buffers)
    mapped = vmap(problem.grad_fn)(xs, Batch(data, targets, masks, keys), buffers)
    for c in range(3):
        alone = problem.grad_fn(xs[c], Batch(data[c], targets[c], masks[c], keys[c]), tuple(b[c] for b in buffers))
        torch.testing.assert_close(mapped[0][c], alone[0], **NEAR)
        torch.testing.assert_close(mapped[1].loss[c], alone[1].loss, **NEAR)
        assert mapped[1].examples[c] == alone[1].examples
        torch.testing.assert_close([b[c] for b in mapped[1].buffers], list(alone[1].buffers), **NEAR)


def test_a_batch_of_one_example_is_normalized_to_the_bias() -> None:
    problem = task(nn.BatchNorm1d(3), squared_error, dtype=F64)
    g, aux = problem.grad_fn(problem.x, whole(normal(1, 3), torch.ones(1, 3, dtype=F64)), problem.buffers)
    torch.testing.assert_close(problem.parameters(g)["bias"], -torch.ones(3, dtype=F64))  # output 0, target 1
    assert all(b.isfinite().all() for b in aux.buffers)


# Dropout


class Dropped(nn.Module):
    """Weights of one passed through some dropouts: the gradient of their sum is the mask, scaled."""

    def __init__(self, *dropouts: nn.Module, shape: tuple[int, ...] = (20_000,)) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.ones(shape)) for _ in dropouts])
        self.drops = nn.ModuleList(dropouts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([d(w * x) for w, d in zip(self.w, self.drops, strict=True)], dim=1)


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(1).sum(1)


def drop_masks(*dropouts: nn.Module, key: Tensor, batch: int = 1, shape: tuple[int, ...] = (20_000,)) -> list[Tensor]:
    problem = task(Dropped(*dropouts, shape=shape), total)
    data = Batch(torch.ones(batch, *shape), torch.zeros(batch), torch.ones(batch, dtype=torch.bool), key)
    g, _ = problem.grad_fn(problem.x, data, ())
    return list(problem.parameters(g * batch).values())


KEY = random.key(4)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_entries_with_probability_one_minus_p_and_preserves_the_mean(p: float) -> None:
    (mask,) = drop_masks(nn.Dropout(p), key=KEY)
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    error = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * error
    assert abs(mask.double().mean().item() - 1) < 4 * error / (1 - p)


def test_dropout_of_nothing_and_of_everything_is_exact() -> None:
    (none,), (everything,) = (drop_masks(nn.Dropout(p), key=KEY) for p in (0.0, 1.0))
    assert (none == 1).all()
    assert (everything == 0).all()


def agreement(a: Tensor, b: Tensor) -> float:
    return ((a != 0) == (b != 0)).double().mean().item()


def test_the_same_key_draws_the_same_mask_and_another_key_an_unrelated_one() -> None:
    masks = [drop_masks(nn.Dropout(0.5), key=k)[0] for k in (KEY, KEY, random.fold_in(KEY, 1))]
    assert torch.equal(masks[0], masks[1])
    assert abs(agreement(masks[0], masks[2]) - 0.5) < 4 * 0.5 / math.sqrt(20_000)


def test_two_dropout_layers_draw_unrelated_masks() -> None:
    first, second = drop_masks(nn.Dropout(0.5), nn.Dropout(0.5), key=KEY)
    assert abs(agreement(first, second) - 0.5) < 4 * 0.5 / math.sqrt(20_000)


def test_one_dropout_layer_used_twice_draws_unrelated_masks() -> None:
    layer = nn.Dropout(0.5)
    first, second = drop_masks(layer, layer, key=KEY)
    assert abs(agreement(first, second) - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    again = drop_masks(layer, layer, key=KEY)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


def test_examples_of_a_batch_draw_unrelated_masks() -> None:
    counts = drop_masks(nn.Dropout(0.5), key=KEY, batch=2)[0] / 2  # 0, 1 or 2 of the two examples keep an entry
    assert abs((counts == 1).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(20_000)


def test_clients_under_vmap_draw_their_own_masks_as_in_a_loop() -> None:
    problem = task(Dropped(nn.Dropout(0.5), nn.Dropout(0.2), shape=(500,)), total)
    data = Batch(torch.ones(4, 500), torch.zeros(4), torch.ones(4, dtype=torch.bool), KEY)
    keys = random.split(KEY, 3)
    mapped = vmap(lambda k: problem.grad_fn(problem.x, data._replace(key=k), ())[0])(keys)
    loop = torch.stack([problem.grad_fn(problem.x, data._replace(key=k), ())[0] for k in keys])
    torch.testing.assert_close(mapped, loop)
    assert len(loop.unique(dim=0)) == 3


def test_padding_does_not_change_the_masks_of_the_examples_before_it() -> None:
    problem = task(Dropped(nn.Dropout(0.5), shape=(500,)), total)
    short = Batch(normal(3, 500).float(), torch.zeros(3), torch.ones(3, dtype=torch.bool), KEY)
    long = Batch(
        torch.cat([short.x, torch.ones(2, 500)]), torch.zeros(5), torch.tensor([True] * 3 + [False] * 2), KEY
    )  # fmt: skip
    torch.testing.assert_close(problem.grad_fn(problem.x, long, ())[0], problem.grad_fn(problem.x, short, ())[0])


def test_dropout_is_off_in_evaluation() -> None:
    problem = task(Dropped(nn.Dropout(0.9), nn.Dropout2d(0.9), shape=(2, 5, 5)), total)
    assert problem.evaluate(problem.x, whole(torch.ones(3, 2, 5, 5), torch.zeros(3)), ())["loss"].tolist() == [100] * 3


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Dropout1d, (3000, 4)), (nn.Dropout2d, (3000, 2, 2)), (nn.Dropout3d, (3000, 1, 2, 2))]
)
def test_channel_dropout_drops_whole_channels(layer, shape: tuple[int, ...]) -> None:
    (mask,) = drop_masks(layer(0.4), key=KEY, shape=shape)
    channels = mask.flatten(1)
    assert (channels == channels[:, :1]).all()
    kept = (channels[:, 0] != 0).double().mean().item()
    assert abs(kept - 0.6) < 4 * math.sqrt(0.24 / 3000)
    torch.testing.assert_close(channels[channels != 0], torch.full_like(channels[channels != 0], 1 / 0.6))


# Losses and metrics


def test_a_custom_loss_is_differentiated_and_custom_metrics_are_evaluated() -> None:
    module = seeded(lambda: nn.Linear(4, 3)).to(F64)

    def huber(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.huber_loss(outputs, targets, reduction="none").mean(1)

    problem = task(module, huber, {"worst": lambda out, y: (out - y).abs().amax(1)}, dtype=F64)
    x, y = normal(5, 4), normal(5, 3, seed=1)
    g, _ = problem.grad_fn(problem.x, whole(x, y), ())
    same_gradient(problem, g, torch_gradient(module, functional.huber_loss(module(x), y)))
    values = problem.evaluate(problem.x, whole(x, y), ())
    assert list(values) == ["loss", "worst"]
    torch.testing.assert_close(values["worst"], (module(x) - y).abs().amax(1).detach(), **NEAR)
    torch.testing.assert_close(values["loss"], huber(module(x), y).detach(), **NEAR)


def test_accuracy_comes_with_cross_entropy_alone() -> None:
    batch = whole(normal(5, 4), labels(5))
    module = seeded(lambda: nn.Linear(4, 3)).to(F64)
    problem = task(module, dtype=F64)
    values = problem.evaluate(problem.x, batch, ())
    assert list(values) == ["loss", "accuracy"]
    assert torch.equal(values["accuracy"], (module(batch.x).argmax(1) == batch.y).double())
    assert list(task(module, metrics={}, dtype=F64).evaluate(problem.x, batch, ())) == ["loss"]
    regression = task(module, squared_error, dtype=F64)
    assert list(regression.evaluate(problem.x, batch._replace(y=normal(5, 3)), ())) == ["loss"]


@pytest.mark.parametrize("reduce", [functional.cross_entropy, lambda out, y: functional.cross_entropy(out, y)[None]])
def test_a_loss_that_is_not_one_value_an_example_is_refused(reduce) -> None:
    batch = whole(normal(5, 4), labels(5))
    problem = task(nn.Linear(4, 3), reduce, dtype=F64)
    with pytest.raises(UsageError, match=r"loss must be one value an example, \[5\], not \[1?\]; reduction="):
        problem.grad_fn(problem.x, batch, ())
    with pytest.raises(UsageError, match=r"loss must be one value an example, \[5\], not \[1?\]; reduction="):
        problem.evaluate(problem.x, batch, ())
    problem = task(nn.Linear(4, 3), metrics={"mine": reduce}, dtype=F64)
    with pytest.raises(UsageError, match=r"mine must be one value an example, \[5\], not \[1?\]; reduction="):
        problem.evaluate(problem.x, batch, ())


def test_squared_error_is_half_the_sum_of_squares_an_example() -> None:
    outputs, targets = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    expected = [(0.5 * (o - t) ** 2).sum().item() for o, t in zip(outputs, targets, strict=True)]
    torch.testing.assert_close(squared_error(outputs, targets), torch.tensor(expected, dtype=F64), **NEAR)
    flat, wanted = outputs[:, 0, 0], targets[:, 0, 0]
    torch.testing.assert_close(squared_error(flat, wanted), 0.5 * (flat - wanted) ** 2, **NEAR)


def test_regression_on_one_output_takes_flat_targets() -> None:
    module = seeded(lambda: nn.Linear(4, 1)).to(F64)
    problem = task(module, squared_error, dtype=F64)
    x, y = normal(6, 4), normal(6, seed=1)
    g, aux = problem.grad_fn(problem.x, whole(x, y), ())
    loss = 0.5 * functional.mse_loss(module(x)[:, 0], y)
    same_gradient(problem, g, torch_gradient(module, loss))
    torch.testing.assert_close(aux.loss, 6 * loss.detach(), **NEAR)


def test_cross_entropy_of_sequences_is_the_mean_over_positions() -> None:
    outputs, targets = normal(4, 5, 3), labels(4, 5)
    expected = torch.stack([functional.cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(cross_entropy(outputs, targets), expected, **NEAR)
    each = functional.cross_entropy(outputs[:, 0], targets[:, 0], reduction="none")
    torch.testing.assert_close(cross_entropy(outputs[:, 0], targets[:, 0]), each, **NEAR)


def test_the_vmapped_cross_entropy_is_torchs_to_the_bit_and_leaves_out_what_torch_ignores() -> None:
    outputs, targets = normal(3, 8, 5), labels(3, 8)
    targets[1, :6] = -100

    weight = torch.arange(1.0, 9.0, dtype=F64)

    def torchs(o: Tensor, t: Tensor) -> Tensor:
        return functional.cross_entropy(o, t, reduction="none")

    def gradient(loss, o: Tensor, t: Tensor) -> Tensor:
        return grad(lambda o: loss(o, t) @ weight)(o)

    losses = vmap(cross_entropy)(outputs, targets)
    gradients = vmap(lambda o, t: gradient(cross_entropy, o, t))(outputs, targets)
    for c in range(3):
        assert torch.equal(losses[c], torchs(outputs[c], targets[c]))
        assert torch.equal(gradients[c], gradient(torchs, outputs[c], targets[c]))
    with pytest.raises(RuntimeError, match="out of bounds"):
        vmap(cross_entropy)(outputs, torch.full_like(targets, -1))


def test_accuracy_of_sequences_is_the_share_of_positions() -> None:
    outputs, targets = normal(4, 5, 3), labels(4, 5)
    hits = (outputs.argmax(-1) == targets).double()
    assert 0 < hits.mean() < 1
    torch.testing.assert_close(accuracy(outputs, targets), hits.mean(1))
    assert torch.equal(accuracy(outputs[:, 0], targets[:, 0]), hits[:, 0])


def test_losses_of_no_examples_are_empty() -> None:
    for outputs, targets in ((normal(0, 3), labels(0)), (normal(0, 5, 3), labels(0, 5))):
        assert cross_entropy(outputs, targets).shape == (0,)
        assert accuracy(outputs, targets).shape == (0,)
    assert squared_error(normal(0, 3), normal(0, 3)).shape == (0,)


def test_a_sequence_model_trains_as_torchs_does() -> None:
    module = seeded(Tied).to(F64)
    problem = task(module, dtype=F64)
    tokens, targets = labels(4, 5, classes=6), labels(4, 5, classes=6, seed=3)
    g, aux = problem.grad_fn(problem.x, whole(tokens, targets), ())
    loss = functional.cross_entropy(module(tokens).flatten(0, 1), targets.flatten())
    same_gradient(problem, g, torch_gradient(module, loss))
    torch.testing.assert_close(aux.loss, 4 * loss.detach(), **NEAR)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_everything_comes_in_the_tasks_dtype(dtype: torch.dtype) -> None:
    problem = task(seeded(MODULES["batch-norm"]), dtype=dtype)
    assert problem.x.dtype == dtype
    g, aux = problem.grad_fn(problem.x, whole(normal(8, 4).to(dtype), labels(8)), problem.buffers)
    assert g.dtype == aux.loss.dtype == dtype
    assert [b.dtype for b in aux.buffers] == [b.dtype for b in problem.buffers] == [dtype, dtype, torch.int64]
