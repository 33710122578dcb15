"""The seven steps of a federated round, each where it is written: in an algorithm of 40 lines, or in a word to vfl.

    1. send the model      `broadcast`: all that a client will know of the server, and its bits
    2. train locally       `client_update`: local steps on the client's own examples; here `trainer.train`
    3. send information    the message it returns: the change of its model, its model, logits, whatever the method needs
    4. combine             the engine sums the weighted messages, over clients, chunks and ranks; `server_update` steps
    5. rehearse            `vfl.rehearsed`: the server trains on examples of its own
    6. send back           the next round's `broadcast`, of the new model
    7. resample            the engine draws the next cohort: `clients_per_round`, `sampling`

    python scripts/workflow.py --sends model

Digits on 50 clients, labels split by Dirichlet(0.3); a tenth of the examples are the server's. It takes some seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

import vfl


class Server(NamedTuple):
    """What the server remembers between rounds."""

    x: Tensor  # [D] the model
    t: Tensor  # [] rounds done


@dataclass(frozen=True, kw_only=True)
class Workflow(vfl.LocalTraining):
    """FedAvg, step by step; LocalTraining brings its options and the trainer."""

    sends: Literal["change", "model"] = "change"
    """What a client sends: the change of its model (the pseudo-gradient, negated), or the model itself."""

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""
        trainer = self.trainer(task)

        def init_server(x: Tensor) -> Server:
            return Server(x, x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return trainer.broadcast(server.x, server.t)  # 1 and, in the next round, 6

        def client_update(
            sent: vfl.ModelAndRate, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            y, metrics = trainer.train(sent, batches)  # 2
            information = y - sent.x if self.sends == "change" else y
            return vfl.message(information, trainer.weight(batches)), client, metrics  # 3

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            change = mean.payload if self.sends == "change" else mean.payload - server.x
            return Server(server.x + self.server_lr * change, server.t + 1), {}  # 4

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)


def main(
    sends: Literal["change", "model"] = "change", rehearsal_steps: int = 10, rounds: int = 20, seed: int = 0
) -> list[dict]:
    """Plays the rounds and says what each step did; returns their metrics.

    Args:
        sends: What a client sends.
        rehearsal_steps: Steps of the server on its own examples, a round; 0: none.
        rounds: How many rounds.
        seed: Of the data's partition, the model and the run.
    """
    data = vfl.data.federated("digits", partition="dirichlet:0.3", clients=50, seed=seed, validation=0.1)
    torch.manual_seed(seed)
    task = vfl.task(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    algorithm = Workflow(sends=sends).build(task, data.clients.population)
    rehearsal = vfl.Rehearsal(rehearsal_steps=rehearsal_steps, rehearsal_lr=0.05)
    algorithm = rehearsal.wrap(algorithm, task, vfl.Context(data.clients.population, 10, "uniform", rounds, data))  # 5
    history = []
    cohorts = {"clients_per_round": 10, "sampling": "uniform", "seed": seed}  # 7
    work = {"batch_size": 10, "local_epochs": 2, "execution": "vmap"}
    for state, metrics in vfl.rounds(algorithm, task, data, rounds, **work, **cohorts):
        history.append(metrics)
        print(
            f"round {state.round:2d}: {metrics['round_bits_down'] / 8e3:.0f} kB to {metrics['clients']} clients, "
            f"training loss {metrics['train_loss']:.3f}, {metrics['round_bits_up'] / 8e3:.0f} kB back, "
            f"rehearsal loss {metrics.get('rehearsal_loss', float('nan')):.3f}, "
            f"test accuracy {metrics['test_accuracy']:.1%}"
        )
    return history


if __name__ == "__main__":
    tyro.cli(main)
