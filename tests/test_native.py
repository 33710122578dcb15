"""C++ as machine code: built once on a machine, found again, and one sentence where it cannot be built."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vfl import native

SOURCE = """
#include <cstdint>
extern "C" void add(const float* a, int64_t count, float* to) { for (int64_t i = 0; i < count; i++) to[i] += a[i]; }
"""
TYPES = ("const float*", "int64_t", "float*")


def add(source: Path) -> Callable[..., None]:
    return native.Source(source, {"add": TYPES}).built()["add"]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VFL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "source.cpp"
    path.write_text(SOURCE)
    return path


def test_a_function_is_built_once_and_serves_every_process(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.arange(5.0), torch.ones(5)
    add(source)(a.data_ptr(), 4, b.data_ptr())
    assert b.tolist() == [1, 2, 3, 4, 1]
    monkeypatch.setenv("PATH", "")  # no compiler
    add(source)(a.data_ptr(), 5, b.data_ptr())
    assert b.tolist() == [1, 3, 5, 7, 5]
    (library,) = (source.parent / "cache" / "native").iterdir()
    source.write_text(SOURCE.replace("+=", "-="))
    with pytest.raises(OSError, match=r"c\+\+"):
        add(source)
    assert library.exists()


def test_no_module_of_that_name_is_replaced(source: Path) -> None:
    source = source.rename(source.with_name("random.cpp"))
    add(source)
    assert sys.modules["random"] is random


def test_another_number_of_arguments_is_refused_before_anything_is_read(source: Path) -> None:
    with pytest.raises(TypeError, match="add takes 3 numbers, not 2"):
        add(source)(0, 1)
    with pytest.raises(TypeError):
        add(source)(0, 0.5, 0)


def test_what_a_compiler_says_is_kept_and_nothing_is_left(source: Path) -> None:
    source.write_text(SOURCE.replace("int64_t i = 0", "int64_t i = nothing"))
    with pytest.raises(RuntimeError, match=r"cannot compile source\.cpp: .*nothing"):
        add(source)
    assert not list((source.parent / "cache" / "native").iterdir())


def test_an_included_file_is_a_part_of_the_source(source: Path) -> None:
    header = source.with_name("size.h")
    header.write_text("constexpr float SIZE = 2;\n")
    source.write_text('#include "size.h"\n' + SOURCE.replace("a[i]", "SIZE * a[i]"))
    a, b = torch.ones(2), torch.zeros(2)
    add(source)(a.data_ptr(), 2, b.data_ptr())
    header.write_text("constexpr float SIZE = 3;\n")
    add(source)(a.data_ptr(), 2, b.data_ptr())
    assert b.tolist() == [5, 5]


def test_what_cannot_be_built_is_none_with_one_warning(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native._warn.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    for _ in range(2):
        code = native.Source(source, {"add": TYPES, "other": TYPES})
        assert code.found("add") is None
        assert code.found("other") is None
    (record,) = caplog.records
    assert "building vfl's C++ failed" in record.message and "no-such-compiler" in record.message
