"""A training step of ours against what else there is: plain PyTorch, dense and with experts, the
same under torch.compile, Hugging Face's GPT-2 and OLMoE, stock fairseq.

    python benchmarks/peers.py [--shapes wide 256 96] [--cases NAME ...] [--rounds 3]
    python benchmarks/peers.py --list

Forward, backward and fused AdamW (stock: its own Adam), in one process, in turn; dropout 0.1 but in
attention. Sparse models run one by one, each with plain PyTorch, which all are multiples of, and
with the dense model of equal FLOPs; if the others do not fit into memory together, they run in
groups. Calls with a part of the shapes or cases merge into one table,
benchmarks/results/PROCESSOR/peers.md.
"""

from __future__ import annotations

import argparse
import functools
import gc
from typing import Any, Callable, Collection, Dict, Iterable, List, NamedTuple, Optional, Set

import measure
import torch
from bfloat16_training import BFloat16Training
from peer_models import Shape, hugging_face, ours, plain, stock
from torch import Tensor, nn

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.study.plan import matching

SPARSE_WARMUP = 10  # steps; oneDNN makes a program for each new number of rows of an expert
FILLED = 0.75  # of the free memory, by models; the rest is for what a step allocates
GIB = 2**30
SHAPES = {
    "wide": Shape(4, 768, 12, 3072, 50_000, 4, 512),
    "256": Shape(6, 256, 4, 1024, 4104, 32, 256),
    "96": Shape(4, 96, 3, 384, 4104, 32, 256),
}
GPU_SHAPES = {"125m": Shape(12, 768, 12, 3072, 50_000, 16, 1024)}
Step = Callable[[Tensor, Tensor], Tensor]  # tokens, targets (B, T) -> loss


class Case(NamedTuple):
    build: Callable[[Shape], nn.Module]
    bf16: bool = False
    autocast: bool = False
    bf16_parameters: bool = False  # on a CPU, too; on a GPU all of bf16 without autocast have them
    compiled: bool = False  # by torch.compile from outside
    onednn: Optional[bool] = None  # False: what PyTorch alone would choose
    stock_adam: bool = False
    dense: str = ""  # of a sparse case, the dense one of equal FLOPs that it is compared with


OURS_BF16 = {"bf16": True}
CASES = {
    "plain PyTorch": Case(plain),
    "plain PyTorch, compiled": Case(plain, compiled=True),
    "ours": Case(ours),
    "ours, --compile": Case(functools.partial(ours, compile=True)),
    "ours, PyTorch's products": Case(ours, onednn=False),
    "Hugging Face GPT-2": Case(hugging_face),
    "stock fairseq": Case(stock, stock_adam=True),
    "bf16: plain PyTorch, autocast": Case(plain, True, autocast=True),
    "bf16: plain PyTorch, autocast, compiled": Case(plain, True, autocast=True, compiled=True),
    "bf16: ours": Case(functools.partial(ours, **OURS_BF16), True),
    "bf16: ours, --compile": Case(functools.partial(ours, compile=True, **OURS_BF16), True),
    "bf16: Hugging Face GPT-2, autocast": Case(hugging_face, True, autocast=True),
    "ours, 8 experts": Case(functools.partial(ours, experts=8), dense="ours"),
    "ours, 64 experts": Case(functools.partial(ours, experts=64), dense="ours"),
    **{
        f"plain PyTorch, {experts} experts, every other layer": Case(
            functools.partial(plain, experts=experts), dense="plain PyTorch"
        )
        for experts in (8, 64)
    },
    "OLMoE, 8 experts": Case(functools.partial(hugging_face, experts=8)),
    "OLMoE, 64 experts": Case(functools.partial(hugging_face, experts=64)),
    "bf16: ours, 8 experts": Case(
        functools.partial(ours, experts=8, **OURS_BF16), True, dense="bf16: ours"
    ),
    "bf16: ours, 64 experts": Case(
        functools.partial(ours, experts=64, **OURS_BF16), True, dense="bf16: ours"
    ),
    # autocast does not reach the grouped products of its experts
    "bf16: OLMoE, 8 experts": Case(
        functools.partial(hugging_face, experts=8), True, bf16_parameters=True
    ),
    # as in the paper
    **{
        f"{bf16}ours, {experts} experts, every other layer": Case(
            functools.partial(ours, experts=experts, every=2, bf16=bool(bf16)),
            bool(bf16),
            dense=f"{bf16}ours",
        )
        for bf16 in ("", "bf16: ")
        for experts in (8, 64)
    },
}
BASE = "plain PyTorch"
# Runs one after the other, with what may fail or take long behind what is wanted most.
GPU_CASES = (
    ("ours", "bf16: plain PyTorch, autocast", "bf16: ours")
    + ("bf16: ours, 8 experts", "bf16: ours, 64 experts"),
    ("bf16: Hugging Face GPT-2, autocast", "bf16: OLMoE, 8 experts"),
    ("bf16: plain PyTorch, autocast, compiled", "bf16: ours, --compile"),
)


def optional(label: str) -> bool:
    """Whether the others are measured without it where it raises: it is another's, or compiled."""
    return label != BASE and ("ours" not in label or "--compile" in label)


def training_step(case: Case, shape: Shape, like: Tensor) -> Callable[[], None]:
    """A new model's; `like` gives the device."""
    torch.manual_seed(0)
    with like.device:  # initialises there, too
        model = case.build(shape).to(like.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.stock_adam:
        from fairseq.optim.adam import Adam

        optimizer: Any = Adam(parameters, lr=1e-4, weight_decay=0.01)
    elif case.bf16_parameters or (like.is_cuda and case.bf16 and not case.autocast):
        optimizer = BFloat16Training(model)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    forward: Step = torch.compile(model) if case.compiled else model
    words = torch.randint(4, shape.vocabulary, (shape.rows, shape.context + 1), device=like.device)
    tokens, target = words[:, :-1].contiguous(), words[:, 1:].contiguous()
    scale = 1 / tokens.numel()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(like.device.type, torch.bfloat16, enabled=case.autocast):
            loss = forward(tokens, target)
        (loss * scale).backward()
        optimizer.step()

    def without_onednn() -> None:
        with torch.backends.mkldnn.flags(enabled=False):
            run()

    return without_onednn if case.onednn is False else run


def model_bytes(case: Case, shape: Shape) -> int:
    """Of the parameters, their gradients and Adam's two moments, in float32."""
    with torch.device("meta"):
        return 16 * sum(p.numel() for p in case.build(shape).parameters())


def groups(cases: Dict[str, Case], sizes: Dict[str, int], room: float) -> List[List[str]]:
    """Names of the cases to measure together, so that their models take at most `room` bytes. A
    group of one case may take more: it cannot be measured. Sparse cases are apart: of all their
    numbers of rows together, oneDNN would not keep the programs."""
    found: List[List[str]] = []
    for label in (label for label, case in cases.items() if not case.dense):
        for group in found:
            more = list(dict.fromkeys([*group, label]))
            if sum(sizes[each] for each in more) <= room:
                group[:] = more
                break
        else:
            found.append(list(dict.fromkeys([BASE, label])))
    sparse = {label: case.dense for label, case in cases.items() if case.dense}
    return found + [list(dict.fromkeys([BASE, dense, label])) for label, dense in sparse.items()]


def repeated(step: Callable[[], None], times: int) -> bool:
    for _ in range(times):
        step()
    return True


def together(
    name: str, shape: Shape, cases: Dict[str, Case], rounds: int, like: Tensor
) -> Dict[str, Dict]:
    """The rows of cases that take turns."""
    runs = {}
    for label, case in cases.items():
        make = functools.partial(training_step, case, shape, like)
        step = measure.attempted(label, make, optional(label))
        if step is not None:
            runs[label] = step
    for label in [label for label in runs if cases[label].dense]:
        warm_up = functools.partial(repeated, runs[label], SPARSE_WARMUP)
        if measure.attempted(label, warm_up, optional(label)) is None:
            del runs[label]
    seconds = measure.in_turn(runs, rounds, optional=list(filter(optional, runs)))
    device, threads = like.device.type, torch.get_num_threads()

    @functools.cache
    def floor(bf16: bool, onednn: bool) -> float:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return shape.flops / measure.matrix_rate(9, dtype, threads, device, onednn)

    rows = {}
    for label in seconds:
        case = cases[label]
        row = rows[f"{name}: {label}"] = {
            "seconds": round(measure.median(seconds[label]), 4),
            "floor": round(floor(case.bf16, case.onednn is not False), 4),
            "speed": round(1 / measure.ratio(seconds, label, BASE), 3),
            "mib": round(measure.peak_memory(runs[label], device) / 2**20),
        }
        if case.dense:
            row["to_dense"] = round(measure.ratio(seconds, label, case.dense), 3)
    return rows


def compare(
    name: str, shape: Shape, cases: Dict[str, Case], rounds: int, like: Tensor, done: Set[str]
) -> None:
    """Measure the cases on one shape, group by group; keep and show each as it ends. Of a case that
    is in several, the first counts: the names of rows that are kept are in `done`."""
    sizes: Dict[str, int] = {}
    for label, case in cases.items():
        make = functools.partial(model_bytes, case, shape)
        size = measure.attempted(label, make, optional(label))
        if size is not None:
            sizes[label] = size
    if len(sizes) == 1 < len(cases):  # plain PyTorch alone would replace its row
        return
    cases = {label: cases[label] for label in sizes}
    room = FILLED * measure.free_memory(like.device.type)
    for group in groups(cases, sizes, room):
        needed = sum(sizes[label] for label in group)
        if needed > room:
            print(
                f"{name}: {group[-1]}: left out: needs {needed / FILLED / GIB:.1f} GiB of free "
                f"memory, there are {room / FILLED / GIB:.1f}; end other programs",
                flush=True,
            )
            continue
        print(f"{name}: {'; '.join(group)}", flush=True)
        rows = together(name, shape, {label: cases[label] for label in group}, rounds, like)
        new = {key: row for key, row in rows.items() if key not in done}
        done.update(new)
        table(measure.keep("peers", new, like.device.type), like)
        gc.collect()
        torch.compiler.reset()  # frees compiled models; the next ones are compiled for their sizes


def run(
    shapes: Dict[str, Shape], choices: Iterable[Collection[str]], rounds: int, like: Tensor
) -> Set[str]:
    """Measure choices of cases one after the other, each on all of `shapes` and with what its cases
    are compared with. Returns the names of the rows."""
    done: Set[str] = set()
    for chosen in choices:
        in_bfloat16 = {label: CASES[label].bf16 for label in chosen}
        chosen = measure.worthwhile(in_bfloat16, like.device.type)
        wanted = {BASE, *chosen, *(CASES[label].dense for label in chosen)}
        cases = {label: case for label, case in CASES.items() if label in wanted}
        for name, shape in shapes.items() if chosen else ():
            compare(name, shape, cases, rounds, like, done)
    return done


def to_dense(rows: Dict[str, Dict], key: str) -> str:
    """A sparse case's time over the dense one's; with a star if they did not take turns, from the
    speeds against plain PyTorch, which did with each."""
    name, label = key.split(": ", 1)
    row, dense = rows[key], rows.get(f"{name}: {CASES[label].dense}")
    if "to_dense" in row:
        return f"{row['to_dense']:.2f}"
    return f"{dense['speed'] / row['speed']:.2f}*" if dense else "-"


def table(rows: Dict[str, Dict], like: Tensor) -> None:
    """Of all that was measured, now or before."""
    every = {**SHAPES, **GPU_SHAPES}
    order = [f"{name}: {label}" for name in every for label in CASES]
    shapes = "; ".join(
        f"{name}: {s.layers} x {s.dim}, vocabulary {s.vocabulary}, {s.rows} x {s.context} tokens"
        for name, s in every.items()
        if any(key.startswith(f"{name}: ") for key in rows)
    )
    measure.keep_table(
        "peers",
        f"A training step ({shapes}). Speed: against plain PyTorch in float32, in the same run. "
        "Plain PyTorch's: its seconds in that run, seconds x speed. To dense: the time of a sparse "
        "model over that of the dense one of equal FLOPs and the same precision, in the same run; "
        "*: they ran apart, and this is the quotient of their speeds. Of the floor: the FLOPs at "
        "the rate of the best product of that precision (in the row of PyTorch's products: of its "
        "own), over the time. MiB: the most that a step allocates beside parameters and moments.",
        ["case", "seconds", "speed", "plain PyTorch's", "to dense", "of the floor", "MiB"],
        [
            [key, f"{row['seconds']:.3f}", f"{row['speed']:.2f}"]
            + [f"{row['seconds'] * row['speed']:.2f}", to_dense(rows, key)]
            + [f"{row['floor'] / row['seconds']:.2f}", str(row["mib"])]
            for key in order
            if (row := rows.get(key))
        ],
        like.device.type,
    )


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *GPU_SHAPES])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="* stands for any text")
    parser.add_argument("--rounds", type=measure.count, default=3)
    parser.add_argument("--gpu", action="store_true", help="on a CUDA device")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    args = parser.parse_args()
    if args.list:
        parser.exit(0, "\n".join(CASES) + "\n")
    try:
        cases = args.cases and matching(list(CASES), args.cases, "--cases", "case")
    except UserError as error:
        parser.error(str(error))
    device = measure.device_of(parser, args.gpu)
    torch.set_num_threads(2)
    names = args.shapes or (GPU_SHAPES if args.gpu else SHAPES)
    shapes = {name: {**SHAPES, **GPU_SHAPES}[name] for name in names}
    like = torch.empty(0, device=device)
    choices = [cases] if cases else GPU_CASES if args.gpu else [list(CASES)]
    if not run(shapes, choices, args.rounds, like):
        parser.exit(1, "nothing was measured\n")


if __name__ == "__main__":
    main()
