"""Which of its examples a client's minibatches hold: the local gradient estimators.

Every draw depends on the client's own key, size and batch alone, and a wider chunk only pads it.
Letters: C clients, K local steps, B batch, M packed examples, N clients that have examples, n examples of a client.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vfl import native, random
from vfl.data.container import Transform
from vfl.errors import UsageError

MANY = 2**11  # numbers; fewer take as long to put in order as building what does it sooner would, over a run
BLOCK = 2**22  # random numbers, or entries of examples, held at once
UNIT = 2**36  # a client's probabilities are multiples of 1/UNIT; N of them must stay below 2⁶³

NATIVE = native.Source(
    Path(__file__).with_suffix(".cpp"),
    {"shuffled": ("const int64_t*", "const int64_t*", "int64_t*", "int64_t", "int64_t")},
)


def shuffled(keys: Tensor, n: Tensor, slots: int, *, once: bool = False) -> Tensor:
    """Uniform permutations of 0 … n − 1, one after the other, for keys [C] and n [C, 1]: int64 [C, slots].

    `once` says that every n is `slots`: the same, sooner.
    """
    if (
        len(keys) * slots >= MANY
        and slots < 2**24
        and keys.device.type == "cpu"
        and (by := NATIVE.found("shuffled")) is not None
    ):
        keys, n, order = keys.contiguous(), n.contiguous(), keys.new_empty((len(keys), slots))
        by(keys.data_ptr(), n.data_ptr(), order.data_ptr(), len(keys), slots)
        return order
    # One sort gives every permutation: slot j is example j mod n of pass j div n, ordered by (pass, hash).
    hashes = random.bits(keys, slots) & (2**40 - 1)
    if once:
        return hashes.argsort(dim=1, stable=True)
    slot = torch.arange(slots, device=keys.device)
    return (((slot // n) << 40) | hashes).argsort(dim=1, stable=True) % n


def nice(keys: Tensor, n: Tensor, steps: int, batch: int, largest: int) -> Tensor:
    """A uniform subset of 0 … n − 1 for each step, drawn without replacement: int64 [C, K, B].

    The first τ places, τ ≤ n, are the subset of size τ: the examples with the τ smallest of n hashes.
    """
    place = torch.arange(largest, device=keys.device)

    def some(k: Tensor) -> Tensor:
        hashes = random.bits(random.fold_in(keys[:, None], k), largest)  # [C, k, largest]
        hashes = hashes.where(place < n[:, :, None], torch.iinfo(torch.int64).max)
        return hashes.topk(batch, largest=False).indices

    at_once = max(BLOCK // (len(keys) * largest), 1)
    return torch.cat([some(k) for k in torch.arange(steps, device=keys.device).split(at_once)], 1)


def multi(keys: Tensor, n: Tensor, steps: int, batch: int) -> Tensor:
    """Numbers uniform on 0 … n − 1, drawn with replacement, for n [C, 1] below 2³¹: int64 [C, K, B]."""
    return ((_words(keys, steps, batch) & (2**32 - 1)) * n[:, :, None]) >> 32


def weighted(keys: Tensor, n: Tensor, start: Tensor, marks: Tensor, steps: int, batch: int) -> tuple[Tensor, Tensor]:
    """Numbers of 0 … n − 1 drawn with replacement by their probabilities p, and 1/(n p): [C, K, B] each.

    Σⱼ 1/(n pⱼ) ∇ℓⱼ / B over the drawn j is unbiased for the mean gradient. `start` [C, 1] is the client's first row and
    `marks` [M + 1] what `marks` gives.
    """
    at = marks[start][:, :, None] + (_words(keys, steps, batch) & (UNIT - 1))
    row = torch.searchsorted(marks, at, right=True).sub(1).clamp(max=len(marks) - 2)
    p = (marks[row + 1] - marks[row]).double() / UNIT
    return row - start[:, :, None], 1 / (n[:, :, None] * p)


def marks(weights: np.ndarray, offsets: np.ndarray) -> Tensor:
    """Where each example's share of its client's probability begins, in units: int64 [M + 1], ascending.

    `weights` [M] are proportional to the probabilities within a client, whose examples are offsets[i] … offsets[i+1]−1.
    Each client with examples takes UNIT units and each example at least one, so that none is left out; integers make
    the probabilities exact, and with them the weights that undo them. Raises UsageError for a weight that is no finite
    number above 0.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (offsets[-1],):
        raise UsageError(f"importance must be one number an example, [{offsets[-1]}], not {list(weights.shape)}")
    bad = np.flatnonzero(~((weights > 0) & np.isfinite(weights)))
    if len(bad):
        raise UsageError(f"importance must be a finite number above 0 for every example, but example {bad[0]} has "
                         f"{weights[bad[0]]:g}; draw=multi draws all alike")  # fmt: skip
    if not len(weights):
        return torch.zeros(1, dtype=torch.int64)
    sizes = np.diff(offsets)
    first, sizes = offsets[:-1][sizes > 0], sizes[sizes > 0]

    def each(per_client: np.ndarray) -> np.ndarray:
        return np.repeat(per_client, sizes)

    share = weights / each(np.maximum.reduceat(weights, first))  # of any magnitude; their sum is at least 1
    share /= each(np.add.reduceat(share, first))
    upto = np.cumsum(share)
    before = np.concatenate([[0.0], upto])[first]
    within = (upto - each(before)) / each(upto[first + sizes - 1] - before)  # in (0, 1], exactly 1 at the last
    count = np.arange(1, len(weights) + 1) - each(first)
    units = np.floor(within * each(UNIT - sizes)).astype(np.int64) + count
    return torch.from_numpy(np.concatenate([[0], each(np.arange(len(sizes)) * UNIT) + units]))


def squared_norms(x: Tensor, transform: Transform) -> np.ndarray:
    """‖aⱼ‖² of the inputs x [M, ...] as the model sees them: float64 [M]; ∝ the smoothness of a linear model's losses.

    Raises UsageError for an input that is all zeros.
    """
    rows = max(BLOCK // max(x[:1].numel(), 1), 1)
    norms = [transform(part, torch.float64).double()[:, None].square().flatten(1).sum(1) for part in x.split(rows)]
    found = torch.cat(norms).cpu().numpy()
    zero = np.flatnonzero(found == 0)
    if len(zero):
        raise UsageError(f"draw=importance draws by the inputs' squared norms, but example {zero[0]} is all zeros and "
                         "would never be drawn; give importance of your own, or use draw=multi")  # fmt: skip
    return found


def _words(keys: Tensor, steps: int, batch: int) -> Tensor:
    """64 random bits for each example of each step, the same in a wider batch: int64 [C, K, B]."""
    return random.bits(random.fold_in(keys[:, None], torch.arange(steps, device=keys.device)), batch)
