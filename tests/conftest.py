"""What holds for every test."""

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the tensors here are too small to share, and waiting threads take the processors from others


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_remembered_from_other_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Timings of earlier runs, and those of these tests, stay out of each other's way; subprocesses inherit it."""
    os.environ["VFL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["VFL_CACHE"]


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules start from the same parameters, and execution auto stays with vmap but where auto itself is tested."""
    torch.manual_seed(0)
    if request.path.stem != "test_execute":
        monkeypatch.setattr("vfl.tuning.TRIES", 10**9)
