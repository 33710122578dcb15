"""Aggregation weights that a small network learns by reinforcement (Dimitriadis et al., arXiv 2106.07578, beside DGA).

Letters: D parameters, P the network's, H its hidden units, S a cohort, M examples on the server.

Client k's state is f = [log of its weight, and the magnitude, mean and variance of its message's entries], where the
magnitude is the root mean square; f counts in standard deviations of the last cohort from that cohort's mean. The
network μ(f) = v·tanh(Wf + b) gives its log-weight a, so that the model would move along Σ eᵃ message / Σ eᵃ. ε-greedy:
in a round that explores, a = μ(f) + σξ with ξ ~ N(0, 1) of its own; in the others a = μ(f).

The server steps twice from the same messages: by the algorithm's own weights (DGA's, FedAvg's) and by these. The reward
R is by how much the second model's accuracy on examples of the server is above the first's; it keeps the second where
R > 0, and the first otherwise. Then θ = (W, b, v) ascends R Σₖ ∇ log π(aₖ | fₖ), with ∇ log π = ξ/σ ∇μ(f): an unbiased
gradient of the expected reward of exploring (REINFORCE, Williams 1992), whose baseline is the model of the plain
weights. A round that did not explore, or in which the models tie, teaches nothing.

The paper, as FLUTE (arXiv 2203.13789) has it, gives one network the states of a whole cohort of fixed size, and fits
the product of its outputs and the weights to rewards of 1, 0.1 and −1 replayed from a memory. Here clients share one
network, so that cohorts may have any size; R is a difference; and each round's gradient is used once, in that round,
since what the policy of another round would have done says nothing unbiased about this one's. It is a sum over clients:
no message need be kept.

A message's bits stay what they were: f, a and ∇ log π follow from the message and from what the server knows. That
they are computed with the clients is the simulator's convenience.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vfl import random
from vfl.base import Algorithm, Broadcast, Mean, Message, Metrics, Tree, expecting, leaves, nested, tree_map
from vfl.data.container import Examples, Transform, cast
from vfl.errors import UsageError
from vfl.local import Batches, keep_where
from vfl.optimizers import optimizer
from vfl.privacy.central import Clipped
from vfl.task import Batch, Task
from vfl.wrappers import Context

FEATURES = 4
_FAR = 10.0  # standard deviations beyond which a client is no farther away
_MOST = 60.0  # e^±60 times a message is a number in single precision
_SAME = 1e-6  # a standard deviation of so little of a feature's size, and a variance of its square, may be rounding
_STREAM = 0x1EA2  # of a key, which no algorithm uses


class Learning(NamedTuple):
    """The server's state."""

    inner: Any  # the algorithm's own
    theta: Tensor  # [P] the network
    opt: Tree  # its optimizer's memory
    center: Tensor  # [4] the last cohort's mean features
    scale: Tensor  # [4] one over their standard deviations; 0 where they do not differ, and before the first round
    t: Tensor  # [] rounds done

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


class Policy(NamedTuple):
    """What clients' log-weights are drawn from in a round."""

    theta: Tensor  # [P]
    center: Tensor  # [4]
    scale: Tensor  # [4]
    noise: Tensor  # [] σ in a round that explores, else 0


class Sent(NamedTuple):
    """What the server sends."""

    content: Tree  # the algorithm's own
    policy: Policy  # the server's own business, so not counted as sent


class Learned(NamedTuple):
    """What a client sends, and what the server makes of it, which comes divided by the client's own weight."""

    payload: Tree  # the algorithm's own
    first: Tensor  # [4] its features, from the last cohort's mean
    second: Tensor  # [4] their squares
    score: Tensor  # [P] ∇ log π(a | f)
    one: Tensor  # [] 1


def features(message: Message, shape: torch.Size) -> Tensor:
    """f [4] of a message: log weight, and root mean square, mean and variance over its vectors' entries.

    Its vectors are the leaves of the model's shape. Raises UsageError where there are none.
    """
    vectors = [leaf for leaf in leaves(message.payload) if leaf.shape == shape]
    if not vectors:
        raise UsageError("learned weights look at changes of the model, which this algorithm's clients do not send")
    entries = torch.cat(vectors)
    mean, square = entries.mean(), entries.square().mean()
    weight = torch.where(message.weight > 0, message.weight, 1).to(entries.dtype)
    return torch.stack([weight.log(), square.sqrt(), mean, (entries - mean).square().mean()])


def log_weight(theta: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """μ(f) [] of the network theta [P] at f [4], and its gradient ∇μ [P]."""
    H = len(theta) // (FEATURES + 2)
    W, b, v = theta.split([FEATURES * H, H, H])
    h = torch.tanh(W.view(H, FEATURES) @ f + b)
    slope = v * (1 - h * h)  # ∂μ/∂(Wf + b)
    return (v * h).sum(), torch.cat([(slope[:, None] * f).flatten(), slope, h])


def first_network(hidden: int, like: Tensor) -> Tensor:
    """θ [P] before the first round, the same in every run: W and b random, v zero, so that all clients weigh alike."""
    drawn = random.normal(random.key(_STREAM, like.device), ((FEATURES + 1) * hidden,), like.dtype)
    return torch.cat([drawn / math.sqrt(FEATURES + 1), like.new_zeros(hidden)])


@dataclass(frozen=True, kw_only=True)
class LearnedWeights:
    """Clients' weights from a small network that learns from the server's own examples (2106.07578)."""

    learn_weights: bool = False
    """Whether a network learns the clients' weights, from the accuracy on the validation set beside that of the
    algorithm's own weights; whichever model is better there is kept."""
    weights_hidden: int = 8
    """Its hidden units."""
    weights_lr: float = 0.05
    """Its step size."""
    weights_optimizer: str = "adam"
    """Its optimizer (see local-optimizer for the names)."""
    weights_noise: float = 1.0
    """Standard deviation of a log-weight in rounds that explore."""
    weights_explore: float = 1.0
    """Probability that the first round explores."""
    weights_explore_decay: float = 0.99
    """What that probability is multiplied with from round to round."""
    weights_explore_least: float = 0.1
    """Its least value."""
    weights_reward: Literal["accuracy", "loss"] = "accuracy"
    """What is better: a higher accuracy, as in the paper, or a lower loss, of which few examples tell more."""
    weights_reward_examples: int = 1000
    """Examples of the validation set, at most, on which the two models of a round are compared; drawn each round."""

    def __post_init__(self) -> None:
        for name in ("weights_hidden", "weights_reward_examples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not (self.weights_lr >= 0 and math.isfinite(self.weights_lr)):
            raise UsageError(f"weights-lr must be a finite number ≥ 0, not {self.weights_lr}")
        if not (self.weights_noise > 0 and math.isfinite(self.weights_noise)):
            raise UsageError(f"weights-noise must be a finite number > 0, not {self.weights_noise}")
        for name in ("weights_explore", "weights_explore_decay", "weights_explore_least"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name.replace('_', '-')} must be from 0 to 1, not {getattr(self, name)}")
        if self.weights_reward not in ("accuracy", "loss"):
            raise UsageError(f"weights-reward must be accuracy or loss, not {self.weights_reward!r}")
        optimizer(self.weights_optimizer)

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm with weights that are learned on the global validation set; itself without `learn_weights`.

        Raises UsageError where there is no such set.
        """
        if not self.learn_weights:
            return algorithm
        examples, transform = context.server_examples("learned weights are rewarded on examples of the server")
        return learned(algorithm, task, examples, self, transform)


def learned(
    algorithm: Algorithm, task: Task, examples: Examples, options: LearnedWeights, transform: Transform = cast
) -> Algorithm:
    """The algorithm whose clients' weights a network learns from these examples [M, ...] on the server.

    Metrics, beside those of the step that is kept: `reward`, R; `followed`, 1 where the network's model is kept.
    Raises UsageError for no examples, a module with buffers (a candidate model would need its own running statistics),
    a reward by an accuracy that the task does not measure, and an algorithm whose messages have no weighted mean.
    """
    if not len(examples.y):
        raise UsageError("learned weights need at least one example on the server, and it holds none")
    if task.buffers:
        raise UsageError("learned weights compare models on the server, where a batch norm's statistics of each are "
                         "known: use group norm")  # fmt: skip
    if algorithm.combine is not None:
        raise UsageError("learned weights are those of a mean: aggregator must be mean or norm_clip")
    held = examples.to(task.x.device)
    opt = optimizer(options.weights_optimizer)
    size = min(options.weights_reward_examples, len(held.y))
    mask = torch.ones(size, dtype=torch.bool, device=task.x.device)
    receive, sigma = algorithm.receive, options.weights_noise

    def init_server(x: Tensor) -> Learning:
        theta = first_network(options.weights_hidden, x)
        zeros = x.new_zeros(FEATURES)
        return Learning(algorithm.init_server(x), theta, opt.init(theta), zeros, zeros, x.new_zeros(()))

    def broadcast(server: Learning, key: Tensor) -> Broadcast:
        sent = algorithm.broadcast(server.inner, key)
        epsilon = options.weights_explore * options.weights_explore_decay**server.t
        epsilon = epsilon.clamp(min=options.weights_explore_least)
        explores = random.bernoulli(random.fold_in(key, _STREAM), epsilon, ())
        policy = Policy(server.theta, server.center, server.scale, sigma * explores.to(server.t.dtype))
        return Broadcast(Sent(sent.content, policy), sent.bits)

    def client_update(sent: Sent, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        message, client, metrics = algorithm.client_update(sent.content, client, batches, key)
        if message.weight.dim():
            raise UsageError("this algorithm's clients have several weights, as late updates do: it runs without "
                             "learned ones")  # fmt: skip
        if isinstance(message.payload, Clipped):
            raise UsageError("central privacy hides clients in a mean in which all weigh the same: leave learned "
                             "weights out")  # fmt: skip
        message = message if receive is None else receive(message)
        theta, center, scale, noise = sent.policy
        apart = features(message, task.x.shape) - center
        mu, slope = log_weight(theta, (apart * scale).clamp(-_FAR, _FAR))
        xi = random.normal(random.fold_in(key, _STREAM), (), mu.dtype)
        a = (mu + noise * xi).clamp(-_MOST, _MOST)
        score = noise / sigma**2 * xi * slope  # ξ/σ ∇μ, 0 where the round does not explore
        own = message.weight > 0
        parts = (apart, apart.square(), score, torch.ones_like(a))
        scaled = [torch.where(own, part / message.weight, 0) for part in parts]
        weight = torch.stack([message.weight, torch.where(own, a.exp(), 0).to(message.weight.dtype)])
        return message._replace(payload=Learned(message.payload, *scaled), weight=weight), client, metrics

    def goodness(x: Tensor, batch: Batch) -> Tensor:
        values = task.evaluate(x, batch, task.buffers)
        if options.weights_reward == "loss":
            return -values["loss"].mean()
        if "accuracy" not in values:
            raise UsageError("this task measures no accuracy: weights-reward must be loss")
        return values["accuracy"].mean()

    def server_update(server: Learning, mean: Mean, key: Tensor) -> tuple[Learning, Mapping[str, Tensor]]:
        sent: Learned = mean.payload
        plain, other = (
            algorithm.server_update(
                server.inner, Mean(tree_map(operator.itemgetter(i), sent.payload), mean.weight[i], mean.clients[i]), key
            )
            for i in range(2)
        )
        draw, noise = random.split(random.fold_in(key, _STREAM)).unbind(-1)
        rows = random.choice(draw, len(held.y), size)
        batch = Batch(transform(held.x[rows], server.x.dtype), held.y[rows], mask, noise)
        reward = goodness(other[0].x, batch) - goodness(plain[0].x, batch)
        better = reward > 0
        inner, reported = keep_where(better, (other[0], dict(other[1])), (plain[0], dict(plain[1])))
        # Parts over clients' own weights: times Σ w, their weighted means are plain sums.
        g = -reward * sent.score[0] * mean.weight[0].to(reward.dtype)
        stepped = opt.step(g, server.opt, server.theta, options.weights_lr)
        theta, memory = keep_where((g != 0).any(), stepped, (server.theta, server.opt))
        first, second = sent.first[0] / sent.one[0], sent.second[0] / sent.one[0]
        center, variance = server.center + first, second - first.square()
        rms = center[1]  # what the entries' mean and variance are small beside, if they are
        rounding = torch.maximum(_SAME * second, (_SAME * torch.stack([rms**0, rms, rms, rms**2])).square())
        scale = torch.where(variance > rounding, variance.clamp(min=0).rsqrt(), 0)
        after = Learning(inner, theta, memory, center, scale, server.t + 1)
        return after, {**reported, "reward": reward, "followed": better.to(reward.dtype)}

    def expect(server: Learning, payload: Learned) -> Learning:
        return server._replace(inner=expecting(algorithm, server.inner, payload.payload))

    return nested(algorithm)._replace(
        init_server=init_server,
        broadcast=broadcast,
        client_update=client_update,
        server_update=server_update,
        receive=None,
        expect=expect if algorithm.expect else None,
    )
