"""Products by oneDNN and as PyTorch has them, against sums in float64."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from fairseq_moe_ext.kernels import matmul
from fairseq_moe_ext.kernels.linear_cross_entropy import linear_cross_entropy
from fairseq_moe_ext.moe.experts import Experts

switch = getattr(torch.backends.mkldnn, "matmul", None)
has_onednn = torch.backends.mkldnn.is_available() and hasattr(switch, "fp32_precision")
needs_onednn = pytest.mark.skipif(not has_onednn, reason="this PyTorch has no switch to oneDNN")


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    """oneDNN computes the small products of these tests, too."""
    monkeypatch.setattr(matmul, "SMALL", 0)


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["mkl", "onednn"])
def onednn(request, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: request.param)
    return request.param


LAYOUTS = {
    "rows": lambda n, m: torch.randn(n, m),
    "columns": lambda n, m: torch.randn(m, n).t(),
    "a part": lambda n, m: torch.randn(n, m + 3)[:, :m],
    "expanded": lambda n, m: torch.randn(n, 1).expand(n, m),
}


@pytest.mark.parametrize("n, k, m", [(1, 1, 1), (7, 65, 2), (32, 3, 17), (2, 16, 64), (33, 5, 1)])
@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_every_shape_and_layout(n, k, m, a_layout, b_layout, onednn):
    torch.manual_seed(0)
    a, b, bias = LAYOUTS[a_layout](n, k), LAYOUTS[b_layout](k, m), torch.randn(m)
    true = torch.einsum("nk,km->nm", a.double(), b.double())
    assert_near(matmul.product(a, b), true, 1e-5, "product")
    assert_near(matmul.product(a, b, bias), true + bias, 1e-5, "with bias")
    for out in (torch.full((n, m), torch.nan), torch.full((n, m + 2), torch.nan)[:, :m]):
        matmul.write_product(out, a, b)
        assert_near(out, true, 1e-5, "written")
        matmul.write_outer(out, a.t(), b)
        assert_near(out, true, 1e-5, "outer products")
        matmul.add_outer(out, a.t(), b)
        assert_near(out, 2 * true, 1e-5, "added")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_linear_and_its_gradients(bias, frozen, onednn):
    torch.manual_seed(0)
    layer, x = matmul.Linear(5, 7, bias=bias), torch.randn(2, 3, 5)
    layer.weight.requires_grad_(frozen != "weight")
    x.requires_grad_(frozen != "x")

    def results(compute, *inputs):
        out = compute(*inputs)
        wanted = [each for each in inputs if each is not None and each.requires_grad]
        # The gradient of a sum is one number everywhere, without memory of its own.
        return [out, *torch.autograd.grad(out.sum() + out.square().sum(), wanted)]

    parameters = (layer.weight, layer.bias)
    exact = [p if p is None else p.detach().double().requires_grad_(p.requires_grad)
             for p in (x, *parameters)]  # fmt: skip
    found = results(lambda x, *_: layer(x), x, *parameters)
    true = results(
        lambda x, w, b: torch.einsum("bti,oi->bto", x, w) + (0 if b is None else b), *exact
    )
    assert len(found) == len(true)
    for mine, each in zip(found, true):
        assert_near(mine, each, 1e-5)


def test_no_rows(onednn):
    layer = matmul.Linear(5, 7)
    out = layer(torch.ones(0, 5))
    out.sum().backward()
    assert out.shape == (0, 7) and not layer.weight.grad.any()


def test_experts_and_loss_in_float32(onednn):
    torch.manual_seed(0)
    experts, x = Experts(4, 32, 64, grad_scale=0.5), torch.randn(60, 32, requires_grad=True)
    weight = torch.randn(200, 32, requires_grad=True)
    target = torch.randint(200, (60,))

    def results(experts, x, weight):
        loss = linear_cross_entropy(experts(x, [40, 0, 3, 17]), weight, target, -1)
        return [loss, *torch.autograd.grad(loss, [x, weight, *experts.parameters()])]

    found = results(experts, x, weight)
    exact = (each.detach().double().requires_grad_() for each in (x, weight))
    for mine, true in zip(found, results(experts.double(), *exact)):
        assert_near(mine, true, 1e-5)


@pytest.fixture
def computed(monkeypatch):
    """Of each product: the value of PyTorch's switch, and the shape of the first factor."""
    found = []
    for name in ("mm", "addmm"):
        multiply = getattr(torch, name)

        def watch(*args, multiply=multiply, first=(name == "addmm"), **kwargs):
            found.append((torch.backends.mkldnn.matmul.fp32_precision, tuple(args[first].shape)))
            return multiply(*args, **kwargs)

        monkeypatch.setattr(torch, name, watch)
    return found


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_sizes(dtype, computed, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    weight = torch.ones(3, 5, dtype=dtype)
    for rows in range(1, 257):
        assert matmul.product(torch.ones(rows, 5, dtype=dtype), weight.t()).shape == (rows, 3)
    padded = [shape[0] for _, shape in computed]
    assert all(n <= rows < 1.13 * n + 4 for n, rows in zip(range(1, 257), padded))
    sizes = sorted(set(padded))
    left = [1, 2] if dtype == torch.float32 else []  # to PyTorch's choice
    assert sizes[: len(left) + 4] == [*left, 4, 8, 12, 16]
    assert sizes[-1] == 256 and len(sizes) == len(left) + 32
    computed.clear()
    for rows in range(1, 257):
        a, b = torch.ones(rows, 3, dtype=dtype), torch.ones(rows, 5, dtype=dtype)
        matmul.write_outer(torch.empty(3, 5, dtype=dtype), a, b)
    assert [shape[1] for _, shape in computed] == [4, 4, *padded[2:]]


@needs_onednn
def test_the_switch_is_on_in_our_products_alone(computed, monkeypatch):
    before = switch.fp32_precision
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    layer, x = matmul.Linear(5, 7), torch.ones(4, 5, requires_grad=True)
    layer(x).sum().backward()
    assert [precision for precision, _ in computed] == ["bf16"] * 3
    assert switch.fp32_precision == before


@needs_onednn
def test_products_in_bfloat16_leave_it_off(computed):
    """Another thread's in float32 would be in bfloat16 meanwhile, where a processor has AMX."""
    a, b = torch.ones(8, 8, dtype=torch.bfloat16), torch.ones(8, 8, dtype=torch.bfloat16)
    matmul.product(a, b)
    matmul.write_product(torch.empty_like(a), a, b)
    matmul.add_outer(torch.empty_like(a), a, b)
    with matmul.faster_products(a):
        torch.mm(a, b)
    assert [precision for precision, _ in computed] == [switch.fp32_precision] * 4


@needs_onednn
def test_what_the_switch_inherits_it_inherits_afterwards(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    every, own = torch.backends.mkldnn, switch.fp32_precision
    before = every.fp32_precision
    try:
        for inherited in ("bf16", "ieee"):
            every.fp32_precision = inherited
            matmul.product(torch.ones(4, 5), torch.ones(5, 3))
            assert switch.fp32_precision == inherited
        switch.fp32_precision = "tf32"
        matmul.product(torch.ones(4, 5), torch.ones(5, 3))
        assert switch.fp32_precision == "tf32"
    finally:
        every.fp32_precision, switch.fp32_precision = before, own


@needs_onednn
def test_of_several_threads_the_last_turns_the_switch_off(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    before, multiply = switch.fp32_precision, torch.mm
    inside, leave = threading.Barrier(3), {4: threading.Event(), 8: threading.Event()}

    def mm(a, b):
        inside.wait(10)
        leave[len(a)].wait(10)
        return multiply(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    with ThreadPoolExecutor(2) as pool:
        first, second = (
            pool.submit(matmul.product, torch.ones(n, 3), torch.ones(3, 2)) for n in leave
        )
        inside.wait(10)
        leave[4].set()
        first.result()
        assert switch.fp32_precision == "bf16"
        leave[8].set()
        second.result()
    assert switch.fp32_precision == before


@needs_onednn
def test_compiled_twice_for_all_lengths(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    layer, counter = matmul.Linear(8, 16), CompileCounter()
    compiled = torch.compile(lambda x: layer(x), backend=counter)
    for rows in (20, 24, 33, 50, 57, 101):
        x = torch.randn(rows, 8, requires_grad=True)
        found, true = compiled(x), layer(x)
        assert_near(found, true, 1e-5)
        for mine, each in zip(
            torch.autograd.grad(found.square().sum(), [x, layer.weight, layer.bias]),
            torch.autograd.grad(true.square().sum(), [x, layer.weight, layer.bias]),
        ):
            assert_near(mine, each, 1e-5)
    assert counter.frame_count <= 2  # one for the first, one for any other


def test_compiled_in_one_piece_with_the_answer_of_this_machine():
    torch.manual_seed(0)
    layer, x = matmul.Linear(8, 16), torch.randn(20, 8)
    compiled = torch.compile(lambda x: F.gelu(layer(x)), backend="eager", fullgraph=True)
    assert_near(compiled(x), F.gelu(layer(x)), 1e-6)


@needs_onednn
def test_where_onednn_is_not_asked(computed, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    layer, x = matmul.Linear(5, 7), torch.ones(3, 5)
    layer(x)
    assert len(computed) == 1
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7
    layer(x[:2])  # it would take longer than the rest of the product
    monkeypatch.setattr(matmul, "SMALL", 3 * 5 * 7)
    layer(x)
    layer.double()(x.double())
    assert len(computed) == 1
    layer.float()(torch.ones(4, 5))
    assert len(computed) == 2


@needs_onednn
@pytest.mark.parametrize(
    "multiplications, dtype, switched",
    [
        (None, torch.float32, True),
        (101, torch.float32, True),
        (100, torch.float32, False),
        (None, torch.bfloat16, False),  # oneDNN without the switch
        (None, torch.float64, False),
    ],
)
def test_few_products_of_experts_are_left_to_pytorch(multiplications, dtype, switched, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matmul, "SMALL", 100)
    x = torch.ones(3, 8, dtype=dtype)
    before = switch.fp32_precision
    with matmul.faster_products(x, multiplications):
        assert switch.fp32_precision == ("bf16" if switched else before)
    assert switch.fp32_precision == before


@needs_onednn
def test_rows_of_a_size_that_onednn_has_a_program_for(monkeypatch):
    """From 9 rows on, one of eight sizes between two powers of two; of one row or two, no more."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    counts, x = [0, 1, 2, 3, 9, 33, 34, 65, 1025], torch.ones(3, 8)
    rounded = [0, 1, 2, 4, 12, 36, 36, 72, 1152]
    assert matmul.program_rows(x, counts) == rounded
    assert matmul.program_rows(x.bfloat16(), counts) == rounded
    assert matmul.program_rows(x.double(), counts) == counts
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    assert matmul.program_rows(x, counts) == counts


@pytest.mark.parametrize(
    "capability, speed, error, taken",
    [
        ("AVX512", 2.3, 3e-7, True),
        ("AVX512", 1.1, 3e-7, False),
        ("AVX512", 9.0, 3e-3, False),
        ("AVX2", 2.3, 3e-7, False),
    ],
)
@needs_onednn
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
def test_onednn_is_taken_where_it_is_clearly_faster_and_exact(
    capability, speed, error, taken, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(matmul, "compared_with_mkl", lambda: (speed, error))
    monkeypatch.setattr(matmul, "_faster", None)
    assert matmul.onednn_is_faster() is taken


def test_the_best_time_of_each_way(monkeypatch):
    """On one thread, in turn; what a process had is back behind it, also after an error."""
    seconds, now, called = {"a": [5, 3, 4], "b": [7, 9, 8]}, [0.0], []
    monkeypatch.setattr(matmul, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))

    def way(name):
        called.append((name, threads[0], torch.is_grad_enabled()))
        now[0] += seconds[name][len(called) // 2 - (name == "b")]

    ways = [lambda: way("a"), lambda: way("b")]
    assert matmul.best_times(ways, 3) == [3, 7]
    assert called == [("a", 1, False), ("b", 1, False)] * 3 and threads == [2]
    assert matmul.best_times([lambda: called.append(threads[0])], 1, threads=3) == [0]
    assert called[-1] == 3
    with pytest.raises(IndexError):
        matmul.best_times(ways, 1)
    assert threads == [2]


@needs_onednn
def test_its_speed_and_error_are_measured():
    speed, error = matmul.compared_with_mkl()
    assert 0.05 < speed < 50
    assert 0 < error < 1e-5 or 1e-4 < error < 1e-2  # that of float32, or of bfloat16


@needs_onednn
def test_they_are_measured_on_the_cpu_while_a_model_is_built_on_meta(computed):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert matmul.compared_with_mkl()[1] > 0
    finally:
        torch.set_default_dtype(default)
    assert {precision for precision, _ in computed} > {"bf16"}
