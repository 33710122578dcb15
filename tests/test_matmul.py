"""Matrix products of our own: the numbers of the definition, for any shape and stride, in programs and out of them."""

import copy
import ctypes
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vfl import matmul, native
from vfl.base import take
from vfl.programs import compile_graph

aten, ours = torch.ops.aten, torch.ops.vfl

SHAPES = [(1, 1, 1, 1), (1, 20, 784, 10), (3, 10, 20, 33), (2, 13, 7, 64), (1, 5, 16, 5), (2, 24, 17, 48)]
SHAPES += [(1, 31, 50, 47), (1, 700, 100, 11), (4, 6, 1, 15), (1, 12, 0, 8)]  # k = 0: sums over nothing


def error(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None, factor: float) -> float:
    """The largest error, relative to the bound on one by rounding, k ε Σ|a||b|."""
    wanted, bound = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    if base is not None:
        wanted, bound = base.double() + factor * wanted, base.abs().double() + abs(factor) * bound
    return float(((found.double() - wanted).abs() / (bound * (a.shape[-1] + 2) * 2**-24 + 1e-30)).max())


def factors(z: int, m: int, k: int, n: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(z, m, k), torch.randn(z, k, n)
    if "a" in layout:
        a = torch.randn(z, k, m).mT
    if "b" in layout:
        b = torch.randn(z, n, k).mT
    return (a, b) if z > 1 else (a[0], b[0])


@pytest.mark.parametrize("layout", ["", "a", "b", "ab"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_sums_with_them_are_right_to_rounding(shape: tuple[int, int, int, int], layout: str) -> None:
    a, b = factors(*shape, layout)
    base = torch.randn(*a.shape[:-1], b.shape[-1])
    assert error(ours.product(a, b), a, b, None, 1.0) <= 1
    assert error(ours.add_product(base, torch.tensor(-0.3), a, b), a, b, base, -0.3) <= 1


def test_each_product_of_several_has_its_own_factor_base_and_strides() -> None:
    a, b, factor = torch.randn(4, 3, 20), torch.randn(9, 20).t().expand(4, 20, 9), torch.tensor([1.0, -2.0, 0.5, 0.0])
    base = torch.randn(3, 9)
    found = ours.add_product(base.expand(4, 3, 9), factor, a, b)
    torch.testing.assert_close(found, base + factor[:, None, None] * (a @ b))
    every_other = torch.randn(4, 40, 18)[:, ::2, ::2]  # neither rows nor columns side by side
    torch.testing.assert_close(ours.product(a, every_other), a @ every_other)
    torch.testing.assert_close(
        ours.add_product(base.expand(4, 3, 9), factor, a, every_other), base + factor[:, None, None] * (a @ every_other)
    )


def test_rows_named_by_number_are_those_of_the_table() -> None:
    table, w, g = torch.randn(50, 33), torch.randn(4, 9, 33), torch.randn(4, 7, 9)
    rows, base, factor = torch.randint(50, (4, 7)), torch.randn(9, 33), torch.tensor([1.0, -2.0, 0.5, 0.0])
    for b in (w.mT, w.mT.contiguous()):
        torch.testing.assert_close(ours.product_of_rows(table, rows, b), table[rows] @ b)
    torch.testing.assert_close(ours.product_of_rows(table, rows[0], w[0].t()), table[rows[0]] @ w[0].t())
    found = ours.add_product_of_rows(base.expand(4, 9, 33), factor, g.mT, table, rows)
    torch.testing.assert_close(found, base + factor[:, None, None] * (g.mT @ table[rows]))
    every_other = torch.arange(50)[::7][:7]
    found = ours.add_product_of_rows(base, factor[1], g[0].t(), table, every_other)
    torch.testing.assert_close(found, base - 2 * (g[0].t() @ table[every_other]))


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    for layout in ("", "b"):
        a, b = factors(3, 100, 200, 90, layout)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                results.append(ours.product(a, b))
            finally:
                torch.set_num_threads(before)
        assert torch.equal(*results)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options name x86's instructions")
@pytest.mark.parametrize("options", [["-mavx2", "-mfma"], ["-mavx2", "-mno-fma"], ["-msse2"]])
def test_processors_with_shorter_vectors_compute_the_same(options: list[str], tmp_path: Path) -> None:
    source, library = Path(matmul.__file__).with_suffix(".cpp"), tmp_path / "matmul.so"
    subprocess.run(["g++", "-O1", *options, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    kernel = ctypes.CDLL(str(library)).products
    kernel.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 13
    for z, m, k, n in SHAPES:
        for layout in ("", "b"):
            a, b = factors(z, m, k, n, layout)
            base, factor, c = torch.randn(z * m, n).view(*a.shape[:-1], n), torch.tensor(-0.3), torch.empty(z, m, n)
            pointers = [t.data_ptr() for t in (a, b, base, factor)]
            sizes = (z, m, k, n, m * k, k, 1, k * n, k if layout else n, m * n, 0, bool(layout), 1)
            kernel(*pointers, None, c.data_ptr(), *sizes)
            assert error(c.view_as(base), a, b, base, -0.3) <= 1


def targets(module: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes]


@pytest.mark.parametrize("faster", [False, True])
def test_products_go_to_the_library_that_is_faster_in_this_process_and_the_next(
    faster: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    monkeypatch.setattr(matmul, "_seconds", lambda product, a, b: 1.0 if (product is ours.product) == faster else 2.0)
    a, b, c = torch.randn(64, 200), torch.randn(200, 300), torch.randn(300)
    graph = make_fx(lambda a, b, c: (a @ b, torch.addmm(c, a, b), a[:1] @ b))(a, b, c)
    wanted, before = graph(a, b, c), copy.deepcopy(graph)
    graph = matmul.faster_products(graph, [a, b, c])
    assert targets(graph).count(ours.product.default) == (2 if faster else 0)  # the small one stays
    monkeypatch.setattr(matmul, "_seconds", lambda *_: pytest.fail("timed again"))
    assert targets(matmul.faster_products(before, [a, b, c])) == targets(graph)
    for found, want in zip(graph(a, b, c), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)


def descent(w: torch.Tensor, x: torch.Tensor, g: torch.Tensor, lr: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two steps along gradients that are products, on flat weights [m n], and one whose gradient is used again."""
    for _ in range(2):
        w = torch.addcmul(w, (g.mT @ x).flatten(-2), lr, value=-1)
    gradient = (g.mT @ (x + 1)).flatten(-2)
    return torch.addcmul(w, gradient, lr, value=2), gradient


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on loading inductor
@pytest.mark.parametrize("kind", ["lone", "many", "many rates"])
def test_a_step_along_a_product_is_one_operation_in_a_compiled_program(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul.choices, "fastest", lambda *_: "vfl")
    z = () if kind == "lone" else (3,)
    x, g, w = torch.randn(*z, 20, 100), torch.randn(*z, 20, 50), torch.randn(5_000)
    lr = torch.tensor([[0.1], [0.2], [0.0]]) if kind == "many rates" else torch.tensor(0.1)
    inputs = [w, x, g, lr]
    graph = matmul.faster_products(make_fx(descent)(*inputs), inputs, lowered=True)
    assert targets(graph).count(ours.add_product.default) == 2
    assert targets(graph).count(ours.product.default) == 1  # whose own value is asked for, too
    compiled = compile_graph(graph, inputs)
    for run in (lambda: graph(*inputs), lambda: compiled(*inputs)):
        for found, wanted in zip(run(), descent(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def learnt(examples: torch.Tensor, rows: torch.Tensor, w: torch.Tensor, lr: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A step of a linear layer [60, 64] along some gradient, on a minibatch."""
    x = take(examples, rows).flatten(1)
    y = x @ w.view(60, 64).t()
    return torch.addcmul(w, (y.t() @ x).flatten(), lr, value=-1), y


def seen_otherwise(
    examples: torch.Tensor, rows: torch.Tensor, w: torch.Tensor, lr: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    x = take(examples, rows).flatten(1)
    return x @ w.view(60, 64).t(), (lr * x) @ w.view(60, 64).t(), x.t() @ x


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on loading inductor
@pytest.mark.parametrize("C", [None, 1, 4])
@pytest.mark.parametrize(("function", "named", "copies"), [(learnt, (1, 1), 0), (seen_otherwise, (1, 0), 1)])
def test_a_minibatch_that_products_alone_read_is_not_copied_together(
    function: Callable[..., tuple[torch.Tensor, ...]],
    named: tuple[int, int],
    copies: int,
    C: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul.choices, "fastest", lambda *_: "vfl")
    many = () if C is None else (C,)
    inputs = [torch.randn(40, 1, 8, 8), torch.randint(40, (*many, 20)), torch.randn(*many, 60 * 64), torch.tensor(0.1)]
    mapped = function if C is None else torch.func.vmap(function, (None, 0, 0, None))
    graph = matmul.faster_products(make_fx(mapped)(*inputs), inputs, lowered=True)
    found = targets(graph)
    assert (found.count(ours.product_of_rows.default), found.count(ours.add_product_of_rows.default)) == named
    assert found.count(aten.embedding.default) == copies
    for run in (graph, compile_graph(graph, inputs)):
        for got, wanted in zip(run(*inputs), mapped(*inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_a_step_whose_rate_or_order_differs_within_a_product_stays_two_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul.choices, "fastest", lambda *_: "vfl")
    w, x, g, rates = torch.randn(2_500), torch.randn(20, 50), torch.randn(20, 50), torch.rand(2_500)

    def function(w, x, g, rates):
        product = g.t() @ x * 1.0
        turned = torch.addcmul(w, (g.t() @ x).t().flatten(), torch.tensor(0.1))
        return torch.addcmul(w, (g.t() @ x).flatten(), rates), turned, torch.addcmul(w, product.flatten(), rates[0])

    inputs = [w, x, g, rates]
    graph = matmul.faster_products(make_fx(function)(*inputs), inputs)
    assert ours.add_product.default not in targets(graph)
    for found, wanted in zip(graph(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_product_of_which_one_part_is_used_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.choices, "fastest", lambda *_: "vfl")
    inputs = [torch.randn(2_500), torch.randn(3, 50, 20), torch.randn(3, 20, 50), torch.tensor(0.1)]

    def function(w, a, b, lr):
        return torch.addcmul(w, torch.bmm(a, b)[0].flatten(), lr)

    graph = matmul.faster_products(make_fx(function)(*inputs), inputs)
    assert ours.add_product.default not in targets(graph)
    torch.testing.assert_close(graph(*inputs), function(*inputs))


def test_programs_of_small_products_build_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.NATIVE, "found", lambda _: pytest.fail("built"))
    inputs = [torch.randn(5, 8), torch.randn(8, 5)]
    assert aten.mm.default in targets(matmul.faster_products(make_fx(torch.mm)(*inputs), inputs))


def test_without_a_compiler_for_it_the_program_keeps_torchs_products(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("no such instruction")

    native._warn.cache_clear()
    monkeypatch.setattr(matmul, "NATIVE", native.Source(matmul.NATIVE.path, matmul.NATIVE.functions))
    monkeypatch.setattr(matmul.NATIVE, "built", fails)
    a, b = torch.randn(100, 100), torch.randn(100, 100)
    graph = matmul.faster_products(make_fx(torch.mm)(a, b), [a, b])
    assert aten.mm.default in targets(graph)
    assert "no such instruction" in caplog.text


def test_other_number_types_keep_torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.choices, "fastest", lambda *_: "vfl")
    a, b = torch.randn(2, 100, 100, dtype=torch.float64).unbind()
    assert aten.mm.default in targets(matmul.faster_products(make_fx(torch.mm)(a, b), [a, b]))
