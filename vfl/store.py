"""Client state: a row for each client that has taken part. R rows on this rank, ... the shape of one client's leaf."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor

from vfl.base import Tree, filled, leaves, on_device, to_place, tree_map


class Store:
    """Rows of client state, allocated when a client first takes part and updated in place.

    A client that never took part reads the template, `init_client(x⁰)`. Under several ranks each rank holds the rows
    of the clients it owns; `owners` knows them all. In-place rows are the one mutable thing of a run: a copy of all
    clients' states each round would cost more than the round.
    """

    def __init__(self, template: Tree, place: torch.device | str) -> None:
        self.template = tree_map(lambda leaf: leaf.detach().to(place), template)
        self.place = torch.device(place)
        self.round = 0  # rounds whose states it holds
        self.row: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        self._rows = [leaf.new_empty((0, *leaf.shape)) for leaf in leaves(self.template)]

    @property
    def empty(self) -> bool:
        """Whether clients of this algorithm keep nothing at all."""
        return not self._rows

    def gather(self, ids: np.ndarray, device: torch.device) -> Tree:
        """The states of these clients, stacked [len(ids), ...], on the device."""
        if self.empty:
            return self.template
        at = np.array([self.row.get(i, -1) for i in ids.tolist()], dtype=np.int64)
        known, new = (on_device(a, self.place) for a in (at.clip(0), np.flatnonzero(at < 0)))
        stacked = []
        for rows, first in zip(self._rows, leaves(self.template), strict=True):
            if len(new) == len(ids):
                taken = first.expand(len(ids), *first.shape).clone()
            else:  # states may be as large as the memory allows: one pass over them, no masked copy of a copy
                taken = rows.index_select(0, known)
                taken[new] = first
            stacked.append(to_place(taken, device))
        return filled(self.template, stacked)

    def scatter(self, ids: np.ndarray, states: Tree, keep: Tensor) -> None:
        """Writes the states [len(ids), ...] of the clients for which keep [len(ids)] is true."""
        if self.empty or not len(ids):
            return
        positions = np.flatnonzero(keep.cpu().numpy())
        kept, everyone, ids = on_device(positions, self.place), len(positions) == len(ids), ids[positions]
        for i in ids.tolist():
            self.row.setdefault(i, len(self.row))
        self._reserve(len(self.row))
        at = on_device(np.array([self.row[i] for i in ids.tolist()], dtype=np.int64), self.place)
        for rows, new in zip(self._rows, leaves(states), strict=True):
            placed = new.detach().to(self.place)
            rows.index_copy_(0, at, placed if everyone else placed[kept])

    def rows(self) -> tuple[np.ndarray, list[Tensor]]:
        """The ids [R] that have a row on this rank, ascending, and their leaves [R, ...]."""
        ids = np.array(sorted(self.row), dtype=np.int64)
        at = torch.tensor([self.row[i] for i in ids.tolist()], dtype=torch.int64, device=self.place)
        return ids, [rows[at] for rows in self._rows]

    def load(self, ids: np.ndarray, states: list[Tensor], rank: int, world: int) -> None:
        """Takes over saved rows [R, ...]: every world-th of them is this rank's."""
        self.owners = {i: n % world for n, i in enumerate(ids.tolist())}
        mine = np.arange(rank, len(ids), world)
        tree = filled(self.template, [s[mine] for s in states])
        self.scatter(ids[mine], tree, torch.ones(len(mine), dtype=torch.bool))

    def _reserve(self, count: int) -> None:
        """Grows by doubling, so that taking in clients one by one copies each row O(1) times."""
        for n, rows in enumerate(self._rows):
            if len(rows) < count:
                grown = rows.new_empty((max(count, 2 * len(rows)), *rows.shape[1:]))
                grown[: len(rows)] = rows
                self._rows[n] = grown


_REPLICA = 2**40  # above any client's number: a client of replica r is r · _REPLICA + its number in a checkpoint


class Stores:
    """The client states of R replicas, each in a store of its own."""

    def __init__(self, each: list[Store]) -> None:
        self.each = each

    @property
    def empty(self) -> bool:
        """Whether clients of this algorithm keep nothing at all."""
        return self.each[0].empty

    @property
    def round(self) -> int:
        """Rounds whose states they hold."""
        return self.each[0].round

    @round.setter
    def round(self, round: int) -> None:
        for store in self.each:
            store.round = round

    @property
    def template(self) -> Tree:
        """The clients' first states [R, ...]."""
        return tree_map(lambda *leaves: torch.stack(leaves), *(store.template for store in self.each))

    @template.setter
    def template(self, stacked: Tree) -> None:
        for r, store in enumerate(self.each):
            store.template = tree_map(operator.itemgetter(r), stacked)

    def rows(self) -> tuple[np.ndarray, list[Tensor]]:
        """Every replica's rows, one replica after the other."""
        found = [store.rows() for store in self.each]
        ids = np.concatenate([r * _REPLICA + ids for r, (ids, _) in enumerate(found)])
        return ids, [torch.cat(parts) for parts in zip(*(rows for _, rows in found), strict=True)]

    def load(self, ids: np.ndarray, states: list[Tensor], rank: int, world: int) -> None:
        """Takes over saved rows."""
        for r, store in enumerate(self.each):
            mine = np.flatnonzero(ids // _REPLICA == r)
            store.load(ids[mine] % _REPLICA, [s[mine] for s in states], rank, world)
