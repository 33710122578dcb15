"""FedPer (Arivazhagan et al., arXiv 1912.00818): some layers are each client's own, the others are averaged.

Client: y ← (its own entries, the server's shared ones), then K local steps on all of y; it keeps its own entries of y
and sends the change of the shared ones.
Server: FedAvg on the shared entries. Those of its x that are personal stay as they were: they are what a client starts
with, so its own accuracy says little; `personal_test_accuracy_mean` is the clients'.
Buffers that the patterns name, such as a norm layer's statistics, are kept and never sent either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

import vfl


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model; its personal entries are the initial ones
    opt: vfl.Tree  # the server optimizer's memory, of the shared entries
    t: Tensor  # [] rounds done


class Own(NamedTuple):
    """A client's state."""

    x: Tensor  # [P] its personal entries
    buffers: tuple[Tensor, ...]  # those of the module's buffers that are personal


LocalSteps = Callable[[vfl.ModelAndRate, vfl.Batches], tuple[Tensor, vfl.Metrics]]
"""(the model put together [D] and the step size, minibatches) → the local model [D] and what the work cost."""


def fedper(config: vfl.LocalTraining, part: vfl.Part, local_steps: LocalSteps) -> vfl.Algorithm:
    """Clients take `local_steps` with a part of the model of their own."""

    shared = part.trainer(config, inside=False)

    def init_server(x: Tensor) -> Server:
        return Server(x, shared.server.init(part.split(x)[1]), x.new_zeros(()))

    def init_client(x: Tensor) -> Own:
        buffers = part.own_buffers(part.task.buffers)
        return Own(part.split(x)[0], tuple(b.clone() for b in buffers))

    def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
        return shared.broadcast(part.split(server.x)[1], server.t, key)

    def client_update(
        sent: vfl.ModelAndRate, own: Own, batches: vfl.Batches, key: Tensor
    ) -> tuple[vfl.Message, Own, vfl.Metrics]:
        mine = batches._replace(buffers=part.join_buffers(own.buffers, batches.buffers))
        y, metrics = local_steps(vfl.ModelAndRate(part.join(own.x, sent.x), sent.lr), mine)
        y_own, y_shared = part.split(y)
        after = Own(y_own, part.own_buffers(metrics.buffers))
        # What the engine averages of the personal buffers is what everyone has been given.
        given = part.join_buffers(part.own_buffers(batches.buffers), metrics.buffers)
        message = shared.message(y_shared - sent.x, shared.weight(batches), key)
        return message, after, metrics._replace(buffers=given)

    def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
        initial, x = part.split(server.x)
        x, opt = shared.server_step(mean.payload, server.opt, x, server.t)
        return Server(part.join(initial, x), opt, server.t + 1), {}

    def model(server: Server, own: Own, batches: vfl.Batches) -> vfl.Model:
        x = part.join(own.x, part.split(server.x)[1])
        return vfl.Model(x, part.join_buffers(own.buffers, batches.buffers))

    return vfl.Algorithm(
        init_server, init_client, broadcast, client_update, server_update, personal=vfl.Personal(model)
    )


@dataclass(frozen=True, kw_only=True)
class FedPer(vfl.LocalTraining):
    """FedPer: named layers stay on the clients (Arivazhagan et al., 1912.00818)."""

    personal: str = "last"
    """Which parameters never leave the client: names (`head.*`), `last` layer, `norm` layers, `*,!last` for others."""

    compresses: ClassVar[bool] = True

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""
        return fedper(self, vfl.personal_part(task, self.personal), self.trainer(task).train)
