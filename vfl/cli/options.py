"""The options of `vfl run`: one typed dataclass, those of the changes that any algorithm can undergo, and others."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from vfl.cli.arguments import unset
from vfl.delays import Delays
from vfl.devices import Devices
from vfl.errors import UsageError, flag
from vfl.leakage import Leakage
from vfl.learned_weights import LearnedWeights
from vfl.local import Draw, Reshuffle, Work
from vfl.personal import FineTuning
from vfl.plateau import Plateau
from vfl.privacy import Privacy
from vfl.quantization import Quantization
from vfl.regularizers import regularizer
from vfl.rehearsal import Rehearsal
from vfl.replicas import Replication, parse_grid
from vfl.stopping import Stopping
from vfl.training import AlgorithmConfig
from vfl.wrappers import Wrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What an experiment is made of, beside its algorithm."""

    data: str = "digits"
    """Data set: digits, mnist, fashion_mnist, cifar10, femnist, shakespeare, tiny_shakespeare, libsvm:a9a,
    synthetic:features=32,classes=10, or quadratic:dim=20,L=2,mu=1 (see `vfl list data`)."""
    data_root: Annotated[Path | None, unset("$VFL_DATA, else the user's cache folder")] = None
    """Folder of the data sets."""
    partition: Annotated[str | None, unset("natural where the data has users, else iid")] = None
    """How the training examples are dealt to clients: iid, sorted, rows, dirichlet:0.3, shards:2, labels:2,
    lognormal:1.0, powerlaw:1.5, natural (see `vfl list partitions`)."""
    clients: Annotated[int | None, unset("100, or the data's users for a natural partition")] = None
    """Population: how many clients there are."""
    validation: float = 0.0
    """Fraction of the training examples set aside as the global validation set."""
    held_out: float = 0.0
    """Fraction of each client's examples set aside as its own test examples."""
    corrupt_labels: float = 0.0
    """Fraction of the clients whose training labels are shuffled among their examples."""
    model: str = "auto"
    """Model: linear, softmax, mlp (two layers of 200), mlp:64,32, cnn, lenet, resnet18, char_lstm, char_gru, or your
    own as package.module:factory (see `vfl list models`); auto: what goes with the data (linear for quadratic and
    libsvm, else mlp)."""
    frozen: Annotated[str | None, unset("none")] = None
    """Parameters that are neither trained nor sent, by patterns of their names: 0.*, or all but the last: *,!last."""
    init_from: Annotated[Path | None, unset("drawn from --seed")] = None
    """The first model: a safetensors file of the same module, such as another run's model.safetensors."""
    regularizer: Annotated[str | None, unset("none")] = None
    """Added to every client's loss: l2:0.01 (λ/2 ‖x‖²) or nonconvex:0.1 (α Σ x²/(1 + x²))."""
    clients_per_round: str = "10"
    """Clients that take part in a round: a count, a fraction of the population (0.1 or 10%), all, or a range from
    which each round draws a count (5..20)."""
    sampling: str = "uniform"
    """How they are drawn: uniform (without replacement), replacement, poisson, weighted (by size), or fixed:0,3,5."""
    rounds: int = 100
    """Communication rounds, those before a resume included."""
    step_size: Literal["given", "theory"] = "given"
    """given: the step sizes of the options; theory: those of the method's theorem, where it has one and the
    objective's L and μ are known (model linear)."""
    batch_size: str = "20"
    """Examples in a local minibatch: a count, a fraction of the client's own (0.1 or 10%), rounded up, or all."""
    local_epochs: int = 1
    """Passes over a client's own examples in a round."""
    local_steps: Annotated[int | None, unset("as many as the local epochs take")] = None
    """Local minibatch steps in a round, in place of --local-epochs."""
    draw: Draw = "epochs"
    """How minibatches are drawn: in epochs, or afresh in each of --local-steps (1): nice (without replacement), multi
    (with), importance (with, by the inputs' squared norms, reweighted to stay unbiased)."""
    reshuffle: Reshuffle = "epoch"
    """When a client's order of examples is drawn, in epochs: for each epoch, each round, or once."""
    seed: int = 0
    """Seed of every random draw: data split, model, cohorts, minibatches. A whole number from 0."""
    data_seed: Annotated[int | None, unset("--seed")] = None
    """Seed of the data and its split alone."""
    replicas: Annotated[int | None, unset("one run")] = None
    """Play so many runs at once, of the seeds from --seed on, all on the data of --data-seed; metrics are their means
    and standard deviations, and each run's own."""
    grid: Annotated[str | None, unset("none")] = None
    """Play runs of several step sizes at once, as replicas: server-lr=0.1,0.2,0.5 or local-lr=0.01,0.1, or both with ;
    between them."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, or cuda:1."""
    ranks: str = "1"
    """Processes on this machine that share each round's clients: a count, or auto (one a GPU, else one a core)."""
    dtype: Literal["float32", "float64", "bfloat16", "tf32"] = "float32"
    """Floating-point type of the model and the training; bfloat16: of the layers, with the model and all sums, and so
    what is sent, in float32; tf32: float32, with a GPU's matrix products in TF32."""
    recompute: Annotated[str | None, unset("none")] = None
    """Submodules of the model, separated by commas, that compute their activations again for the gradient: less memory
    a client, more time."""
    execution: Literal["auto", "vmap", "trace", "compile", "loop"] = "auto"
    """vmap: a chunk of clients at once; trace: its operators, recorded and replayed; compile: these compiled; loop: one
    client after the other, for debugging (breakpoints and prints work); auto: the fastest of them, found meanwhile."""
    chunk: str = "auto"
    """Clients computed at once: a count, or auto (the fastest that fits into the memory)."""
    client_state: Literal["device", "host"] = "device"
    """Where the clients' own states are kept between rounds: in the device's memory or in the host's."""
    on_nonfinite: Literal["stop", "drop"] = "stop"
    """When a client's message holds NaN or infinity: stop the run, or drop the client from the round and count it."""
    eval_every: int = 1
    """Rounds between evaluations on the global test and validation sets; 0: never."""
    metrics: Annotated[str | None, unset("none")] = None
    """What to evaluate as often of f, the mean over clients of their training losses, separated by commas: objective,
    grad_norm, suboptimality (f − f*), distance (‖x − x*‖)."""
    validation_every: Annotated[int | None, unset("--eval-every")] = None
    """Rounds between evaluations on the global validation set; 0: never."""
    client_eval_every: int = 0
    """Rounds between evaluations on each client's own data (held out, else training); 0: never."""
    checkpoint_every: int = 50
    """Rounds between checkpoints; 0: only at the end, or when interrupted."""
    keep: int = 2
    """How many checkpoints to keep, the newest."""
    out: Annotated[Path | None, unset("runs/<time>-<algorithm>-<data>")] = None
    """The run's folder."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; options not given are those of the run there."""
    overwrite: bool = False
    """Replace the run that lies in --out."""
    track: Annotated[str | None, unset("nobody")] = None
    """Who else is told the metrics: tensorboard, mlflow, wandb, separated by commas."""
    profile: bool = False
    """Show where the rounds' time goes, and write a trace of three of them to the run's folder (chrome://tracing)."""
    quiet: bool = False
    """Print errors only."""
    config: Annotated[Path | None, unset("none")] = None
    """YAML file of options, such as a run's config.yaml; options on the command line come on top."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < _MANY:
                bound = f"at least {least}" if value < least else f"below {_MANY}"
                raise UsageError(f"{flag(name)} must be {bound}, not {value}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63:
                raise UsageError(f"{flag(name)} must be a whole number from 0 to 2^63 − 1, not {value}")
        for name in ("validation", "held_out"):
            value = getattr(self, name)
            if not (0 <= value < 1 and math.isfinite(value)):
                raise UsageError(f"{flag(name)} is a fraction from 0 to below 1, not {value}")
        if not 0 <= self.corrupt_labels <= 1:
            raise UsageError(f"--corrupt-labels is a fraction from 0 to 1, not {self.corrupt_labels}")
        if self.resume and self.overwrite:
            raise UsageError("--resume keeps the run in --out and --overwrite replaces it; give one of them")
        self.work().check()
        self.replication()
        self.wanted_ranks()
        regularizer(self.regularizer)

    def work(self) -> Work:
        """What a client does in a round."""
        return Work(self.batch_size, self.local_epochs, self.local_steps, self.draw, self.reshuffle)

    def replication(self) -> Replication | None:
        """The runs that are played at once; None: one."""
        if self.replicas is None and self.grid is None:
            return None
        chosen = Replication(1 if self.replicas is None else self.replicas, parse_grid(self.grid))
        chosen.check()
        return chosen

    def wanted_ranks(self) -> int | None:
        """The number of ranks; None: auto."""
        return _count("ranks", self.ranks, "auto", _MOST_RANKS)

    def forgetful(self) -> tuple[str, ...]:
        """The submodules that compute their activations again."""
        return tuple(name.strip() for name in self.recompute.split(",")) if self.recompute else ()

    def chosen_metrics(self) -> tuple[str, ...]:
        """The metrics' names."""
        return tuple(name.strip() for name in self.metrics.split(",")) if self.metrics else ()


_LEAST = {"rounds": 1, "local_epochs": 1, "local_steps": 1, "clients": 1, "keep": 1,
          "eval_every": 0, "validation_every": 0, "client_eval_every": 0, "checkpoint_every": 0}  # fmt: skip
_MANY = 2**31  # more than anyone means, and the product of two still fits into 63 bits
_MOST_RANKS = 1024  # a slip of the finger must not start more processes than a machine can hold


def _count(name: str, text: str, word: str, most: int) -> int | None:
    """A value that is this word (None) or a whole number from 1 to `most`."""
    if text == word:
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        bound = "from 1" if number < 1 else f"up to {most}"
        raise UsageError(f"{flag(name)} must be {word} or a whole number {bound}, not {text!r}")
    return number


# They say where a run lies, who computes it and who is told, not what it is.
ABOUT_THE_CALL = {"out", "resume", "overwrite", "profile", "quiet", "config", "ranks", "track"}
# They do not change the results, so a resumed run may change them.
NEUTRAL = {"rounds", "data_root", "device", "recompute", "execution", "chunk", "client_state", "eval_every",
           "validation_every", "client_eval_every", "metrics", "checkpoint_every", "keep", "best_by", "patience",
           "stop_at"}  # fmt: skip


# What can be done to any algorithm, the first one innermost: to a client's message, to the server, to when they meet.
WRAPPERS: dict[str, type[Wrapper]] = {
    "quantization": Quantization, "privacy": Privacy, "leakage": Leakage, "devices": Devices,
    "learned_weights": LearnedWeights, "rehearsal": Rehearsal, "delays": Delays,
    "fine_tuning": FineTuning,
}  # fmt: skip
GROUPS: dict[str, type] = {"plateau": Plateau, "stopping": Stopping, **WRAPPERS}


def option_fields(cls: type[AlgorithmConfig] | None) -> dict[str, dataclasses.Field]:
    """Every option of a run of such an algorithm, by name; None: of an algorithm that is not known."""
    parts = (RunOptions, *GROUPS.values(), *([cls] if cls else []))
    return {name: field for part in parts for name, field in fields_of(part).items()}


def fields_of(part: Any) -> dict[str, dataclasses.Field]:
    """The options of one dataclass, by name."""
    return {field.name: field for field in dataclasses.fields(part)}
