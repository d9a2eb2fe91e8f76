"""Experts side by side: the numbers of one thread, errors told, forks survived."""

import multiprocessing
import threading

import pytest
import torch
from closeness import assert_near
from torch.utils.flop_counter import FlopCounterMode

from fairseq_moe_ext.kernels.expert_ffn import by_expert
from fairseq_moe_ext.kernels.threads import side_by_side
from fairseq_moe_ext.moe.experts import Experts

COUNTS = [40, 0, 31, 1, 50, 6]
AS_IF = 256  # times as large matrices, for which threads pay
LONG = 120  # seconds, after which a thread that has not come will not come


@pytest.fixture(params=[2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Watched:
    """Calls side_by_side, and notes which threads work on an expert."""

    def __init__(self):
        self.threads = set()
        self.two = threading.Event()
        self.as_if = AS_IF
        self.patience = 0  # seconds that an expert waits until a second thread works on another

    def __call__(self, work, counts, size, cpu):
        def watched(expert):
            self.threads.add(threading.get_ident())
            if len(self.threads) > 1:
                self.two.set()
            if self.patience and not self.two.wait(self.patience):
                self.patience = 0
            work(expert)

        side_by_side(watched, counts, size * self.as_if, cpu)


@pytest.fixture
def watched(monkeypatch):
    watched = Watched()
    monkeypatch.setattr("fairseq_moe_ext.kernels.expert_ffn.side_by_side", watched)
    monkeypatch.setattr("fairseq_moe_ext.moe.experts.kernel_for", lambda x, weights: by_expert)
    return watched


def results(experts, x):
    x = x.clone().requires_grad_()
    experts.zero_grad()
    out = experts(x, COUNTS)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in experts.parameters())]


def test_threads_change_no_number(threads, watched):
    torch.manual_seed(0)
    experts = Experts(len(COUNTS), 160, 320, grad_scale=0.5).double()
    x = torch.randn(sum(COUNTS), 160, dtype=torch.float64)
    watched.patience = LONG
    found = results(experts, x)
    assert watched.two.is_set() and torch.get_num_threads() == threads
    torch.set_num_threads(1)
    watched.patience = 0
    watched.threads.clear()
    expected = results(experts, x)
    assert watched.threads == {threading.get_ident()}
    for mine, one in zip(found, expected):
        assert_near(mine, one, 1e-12, "side by side")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, threads, watched):
    torch.manual_seed(0)
    experts, x = Experts(len(COUNTS), 32, 64).double(), torch.randn(sum(COUNTS), 32).double()
    expected = experts(x, COUNTS).detach()
    watched.patience = LONG
    watched.as_if = 256 * AS_IF
    watched.threads.clear()
    watched.two.clear()
    with mode():
        found = experts(x, COUNTS)
    assert watched.two.is_set()
    assert_near(found, expected, 1e-12, "without gradients")


def test_little_work_crowded_or_filled_experts_and_counters_stay_on_one_thread(threads, watched):
    torch.manual_seed(0)
    little, much = Experts(3, 8, 8), Experts(3, 256, 512)
    little(torch.randn(30, 8), [10, 10, 10])
    much(torch.randn(300, 256), [290, 5, 5])
    enough = 128 * threads
    much(torch.randn(3 * enough, 256), [enough] * 3)
    with FlopCounterMode(display=False) as counter:
        much(torch.randn(300, 256), [100, 100, 100])
    assert counter.get_total_flops() == 2 * 2 * 300 * 256 * 512
    assert watched.threads == {threading.get_ident()}


def test_a_helper_s_error_is_raised_and_the_threads_are_set_again(threads):
    raising, caller = threading.Event(), threading.get_ident()

    def work(expert):
        if threading.get_ident() == caller:
            raising.wait(LONG)
        else:
            raising.set()
            raise ValueError("from a helper")

    with pytest.raises(ValueError, match="from a helper"):
        side_by_side(work, [100] * 50, 10**6, True)
    assert torch.get_num_threads() == threads


def forked(queue):
    torch.set_num_threads(2)
    done = []
    side_by_side(done.append, [100] * 50, 10**6, True)
    queue.put(sorted(done))


def test_a_forked_process_has_its_own_helpers(threads):
    side_by_side(lambda expert: None, [100] * 50, 10**6, True)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=forked, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=LONG) == list(range(50))
    finally:
        process.kill()
        process.join()
