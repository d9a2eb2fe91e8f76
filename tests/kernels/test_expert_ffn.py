"""Every way to compute experts against a loop over rows with autograd's own gradients."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near

from fairseq_moe_ext.kernels import chunks, expert_ffn
from fairseq_moe_ext.kernels.batched_ffn import batched
from fairseq_moe_ext.kernels.expert_ffn import by_expert, kernel_for
from fairseq_moe_ext.kernels.grouped_ffn import grouped, grouped_serves
from fairseq_moe_ext.kernels.stacks import Weights
from fairseq_moe_ext.moe.experts import plain_expert_ffn

COUNTS = [5, 0, 3, 1]
MANY = [2, 0, 1, 3, 1, 0, 4] * 8  # few rows each: several experts make a block
D, HIDDEN = 8, 16
needs_grouped_mm = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm"
)
ON_A_CPU = [batched, by_expert]
ANYWHERE = [plain_expert_ffn, pytest.param(grouped, marks=needs_grouped_mm)]
WAYS = [*ON_A_CPU, *ANYWHERE]
ON_CUDA = [by_expert, *ANYWHERE]


def loop(x, counts, weights, activation, mask=None, grad_scale=1.0):
    rows = []
    for e, count in enumerate(counts):
        for _ in range(count):
            hidden = activation(weights.w1[e] @ x[len(rows)] + weights.b1[e])
            if mask is not None:
                hidden = hidden * mask[len(rows)]
            rows.append(weights.w2[e] @ hidden + weights.b2[e])
    return torch.stack(rows)


def made(dtype=torch.float64, counts=COUNTS):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    e = len(counts)
    weights = normal(e, HIDDEN, D), normal(e, HIDDEN), normal(e, D, HIDDEN), normal(e, D)
    x, mask = normal(sum(counts), D), normal(sum(counts), HIDDEN)
    for each in (x, *weights):
        each.requires_grad_()
    return x, Weights(*weights), mask


def results(way, x, weights, *rest, counts=COUNTS):
    inputs = [each for each in (x, *weights) if each.requires_grad]
    out = way(x, counts, weights, *rest)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", [F.gelu, torch.relu, lambda h: h])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("counts", [COUNTS, MANY], ids=["few", "many"])
def test_output_and_gradients(way, activation, masked, counts):
    # grouped_mm has no float64
    dtype, near = (torch.float64, 1e-12) if way is not grouped else (torch.float32, 1e-5)
    x, weights, mask = made(dtype, counts)
    mask = mask if masked else None
    for mine, true in zip(
        results(way, x, weights, activation, mask, counts=counts),
        results(loop, x, weights, activation, mask, counts=counts),
    ):
        assert_near(mine, true, near, way.__name__)


@pytest.mark.parametrize("way", WAYS)
def test_scale_is_on_the_weights_gradients_alone(way):
    x, weights, _ = made(torch.float32)
    out, grad_x, *grads = results(way, x, weights, F.gelu, None, 0.25)
    expected, expected_x, *plain = results(way, x, weights, F.gelu)
    assert torch.equal(out, expected)
    assert_near(grad_x, expected_x, 1e-6, "x")
    for grad, without in zip(grads, plain):
        assert_near(grad, 0.25 * without, 1e-6, "weights")


@pytest.mark.parametrize("way", ON_CUDA)
def test_ways_on_a_gpu_keep_their_tensors_there(way):
    """As on `meta`, which takes no tensor of another device either."""
    x, weights, mask = made(torch.bfloat16)
    there = Weights(*(each.to("meta") for each in weights))
    found = results(way, x.to("meta"), there, F.gelu, mask.to("meta"))
    assert {each.device.type for each in found} == {"meta"}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_many_rows_are_added_in_float32(way):
    many_rows(way, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("way", ON_CUDA)
def test_gradients_of_many_rows_are_added_in_float32_on_a_gpu(way):
    many_rows(way, "cuda")


def many_rows(way, device):
    """One after the other in bfloat16, 256 and 1 are 256."""
    counts = [600, 0, 1000]
    x, weights, _ = made(torch.bfloat16, counts)
    there = Weights(*(each.to(device) for each in weights))
    out = way(x.to(device), counts, there, lambda h: h)
    b1, b2 = torch.autograd.grad(out.sum(), (weights.b1, weights.b2))
    rows = torch.tensor(counts, dtype=torch.float64).unsqueeze(1)  # (E, 1)
    assert_near(b2.double(), rows.expand(-1, D), 0.01, "b2")
    assert_near(b1.double(), rows * weights.w2.double().sum(dim=1), 0.01, "b1")


class GarbageWithoutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, ends):
        ctx.empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return w.view_as(w)

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(ctx.empty.view(-1, 1, 1), torch.nan), None


@needs_grouped_mm
@pytest.mark.parametrize("counts", [COUNTS, MANY, [5, 1, 2, 1]], ids=["few", "many", "all"])
def test_grouped_products_that_leave_gradients_without_rows_unwritten(monkeypatch, counts):
    """As PyTorch's do on Blackwell (pytorch #172439)."""
    x, weights, _ = made(torch.float32, counts)
    true = results(loop, x, weights, F.gelu, counts=counts)
    multiply = F.grouped_mm

    def careless(a, b, offs):
        if b.dim() == 3:
            return multiply(a, GarbageWithoutRows.apply(b, offs), offs=offs)
        empty = offs.diff(prepend=offs.new_zeros(1)) == 0
        return multiply(a, b, offs=offs).masked_fill(empty.view(-1, 1, 1), torch.nan)

    monkeypatch.setattr(F, "grouped_mm", careless)
    for mine, each in zip(results(grouped, x, weights, F.gelu, counts=counts), true):
        assert_near(mine, each, 1e-5)


@pytest.mark.parametrize("way", ON_A_CPU)
@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_what_is_frozen_gets_no_gradient(frozen, way):
    x, weights, mask = made()
    for each in (x,) if frozen == "x" else weights:
        each.requires_grad_(False)
    mine, true = results(way, x, weights, F.gelu), results(loop, x, weights, F.gelu)
    assert len(mine) == len(true) == (5 if frozen == "x" else 2)
    for a, b in zip(mine, true):
        assert_near(a, b, 1e-12, frozen)


@pytest.mark.parametrize("way", ON_A_CPU)
@pytest.mark.parametrize("counts", [COUNTS, MANY], ids=["few", "many"])
def test_without_gradients_no_hidden_numbers_are_kept(counts, way):
    x, weights, _ = made(counts=counts)
    with torch.no_grad():
        out = way(x, counts, weights, F.gelu)
        listed = Weights(*(list(each) for each in weights))
        from_list = way(x, counts, listed, F.gelu)
    assert out.grad_fn is None
    assert torch.equal(out, from_list)
    assert_near(out, loop(x, counts, weights, F.gelu), 1e-12, "evaluation")


@pytest.mark.parametrize("way", ON_A_CPU)
def test_no_rows_at_all(way):
    x, weights, _ = made(counts=[0, 0])
    out, grad_x, *grads = results(way, x, weights, F.gelu, counts=[0, 0])
    assert out.shape == grad_x.shape == (0, D)
    assert not any(grad.any() for grad in grads)


def test_listed_weights_come_to_where_the_rows_are():
    x, weights, _ = made()
    listed = Weights(*([part.detach() for part in each] for each in weights))
    out = by_expert(x.detach().to("meta", torch.float32), COUNTS, listed, F.gelu)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.float32, x.shape)


@pytest.fixture
def few_sizes(monkeypatch):
    """Products as where they are best of sizes with a program."""
    monkeypatch.setattr(
        expert_ffn, "program_rows", lambda x, counts: [-(-n // 4) * 4 for n in counts]
    )
    monkeypatch.setattr(chunks, "program_size", lambda n: -(-n // 4) * 4)


@pytest.mark.parametrize("way", ON_A_CPU)
@pytest.mark.parametrize("masked", [False, True])
def test_spare_rows_change_nothing(masked, way, few_sizes, monkeypatch):
    x, weights, mask = made(counts=MANY)
    mask = mask if masked else None
    true = results(loop, x, weights, F.gelu, mask, counts=MANY)
    sizes, name = set(), "baddbmm" if way is batched else "addmm"
    multiply = getattr(torch, name)
    monkeypatch.setattr(
        torch,
        name,
        lambda c, a, *rest, **more: sizes.add(a.shape[-2:]) or multiply(c, a, *rest, **more),
    )
    found = results(way, x, weights, F.gelu, mask, counts=MANY)
    # forward and the weights' gradients: a multiple of four rows in each
    backward = {(HIDDEN, 4), (D, 4)}
    assert sizes == {(4, D), (4, HIDDEN)} | (set() if way is batched else backward)
    for mine, each in zip(found, true):
        assert_near(mine, each, 1e-12)
    monkeypatch.undo()
    with torch.no_grad():
        listed = Weights(*(list(each) for each in weights))
        assert_near(way(x, MANY, listed, F.gelu, mask), true[0], 1e-12)


@pytest.mark.parametrize("way", ON_A_CPU)
@pytest.mark.parametrize("counts", [COUNTS, [2, 0, 1, 2, 1, 2]], ids=["few", "together"])
def test_bfloat16_rows_through_float32_weights(counts, way):
    """As --bf16 on a CPU has them. Each number is rounded once to 8 bits when it is stored; the
    bound is the sum of these roundings, carried to the end to the first order, twice."""
    x, weights, _ = made(torch.float32, counts)
    x = x.detach().bfloat16().requires_grad_()
    out, grad_x, *grads = results(way, x, weights, torch.relu, counts=counts)
    assert out.dtype == grad_x.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    quarter = results(way, x, weights, torch.relu, None, 0.25, counts=counts)
    for grad, scaled in zip(grads, quarter[2:]):
        assert torch.equal(scaled, grad / 4)

    half = 2.0**-9  # the largest relative error of rounding to bfloat16
    x, (w1, b1, w2, b2) = x.detach().double(), (each.detach().double() for each in weights)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    size_h = (w1.abs()[expert] @ x.abs().unsqueeze(2)).squeeze(2) + b1.abs()[expert]
    h = (w1[expert] @ x.unsqueeze(2)).squeeze(2) + b1[expert]
    a, error_a = h.relu(), half * (size_h + h.abs())
    size_out = (w2.abs()[expert] @ a.unsqueeze(2)).squeeze(2) + b2.abs()[expert]
    true = (w2[expert] @ a.unsqueeze(2)).squeeze(2) + b2[expert]
    error = (w2.abs()[expert] @ error_a.unsqueeze(2)).squeeze(2) + half * (size_out + true.abs())
    assert ((out.detach().double() - true).abs() <= 2 * error).all()

    grad = 2 * out.detach().double()  # exact: of a sum of squares of bfloat16 numbers
    grad_b2, grad_w2, error_w2 = (torch.zeros_like(each) for each in (b2, w2, w2))
    grad_b2.index_add_(0, expert, grad)
    grad_w2.index_add_(0, expert, grad.unsqueeze(2) * a.unsqueeze(1))
    error_w2.index_add_(0, expert, grad.abs().unsqueeze(2) * error_a.unsqueeze(1))
    assert_near(grads[3], grad_b2, 1e-6, "added in float32")
    error_w2 += half * grad_w2.abs()
    assert ((grads[2].double() - grad_w2).abs() <= 2 * error_w2).all()


def test_which_way_is_taken():
    x, weights, _ = made(torch.bfloat16)
    assert not grouped_serves(x, weights) and kernel_for(x, weights) is batched
    assert kernel_for(x.to("meta"), weights) is by_expert
    wide = Weights(*(each.new_empty(1, 1).expand(1, 2**17) for each in weights))
    assert kernel_for(x, wide) is by_expert

    class OfAnotherKind:
        device, is_cuda = torch.device("mps"), False

    assert kernel_for(OfAnotherKind(), weights) is None


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="needs PyTorch 2.10")
@pytest.mark.parametrize(
    "capability, serves",
    [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)],
)
def test_grouped_products_only_where_pytorch_has_a_kernel_for_them(capability, serves, monkeypatch):
    _, weights, _ = made(torch.bfloat16)

    class OnAGPU:
        device, is_cuda, dtype = torch.device("cuda"), True, torch.bfloat16

        def size(self, dim):
            return 8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped_serves(OnAGPU(), weights) == serves
    assert kernel_for(OnAGPU(), weights) is (grouped if serves else by_expert)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_grouped_products_on_a_gpu():
    x, weights, mask = made(torch.bfloat16)
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("PyTorch has no kernel for them on this GPU")
    here = [each.detach().cuda().requires_grad_() for each in (x, *weights)]
    assert grouped_serves(here[0], Weights(*here[1:]))
    found = results(grouped, here[0], Weights(*here[1:]), F.gelu, mask.cuda())
    exact = [each.detach().double().requires_grad_() for each in (x, *weights)]
    true = results(loop, exact[0], Weights(*exact[1:]), F.gelu, mask.double())
    for mine, each in zip(found, true):
        assert_near(mine.double().cpu(), each, 0.05, "bfloat16")


@pytest.mark.parametrize("way", ON_A_CPU)
def test_second_derivatives_are_refused(way):
    x, weights, _ = made()

    def loss(x):
        return (x + way(x, COUNTS, weights, F.gelu)).square().sum()

    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.functional.hvp(loss, x.detach(), torch.ones_like(x))
