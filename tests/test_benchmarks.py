"""The programs of benchmarks/, on tiny models: that they run, and where they write."""

import json
import os
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
from benchmark_programs import kept, programs
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from small_models import VOCABULARY, make_task
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe_ext.models import attention, precision
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel


@pytest.fixture
def program(monkeypatch, tmp_path):
    return programs(monkeypatch, tmp_path)


@pytest.fixture
def tiny(program):
    return program("peers").Shape(2, 16, 2, 96, 40, 2, 64)


@pytest.fixture
def measure(program, monkeypatch):
    """The module, on a machine whose facts a test names: measure.on(cores=64)."""
    module = program("measure")

    def on(name="a", **facts):
        machine = {
            "cpu": name,
            "cores": 2,
            "memory_gib": 8,
            "system": "x",
            "variables": "",
            **facts,
        }
        monkeypatch.setattr(module, "processor", lambda device="cpu": name)
        monkeypatch.setattr(module, "machine", lambda: dict(machine))
        return module

    monkeypatch.setattr(module, "on", on, raising=False)
    return module


def keep_row(measure, row):
    measure.keep("speed", {row: {"s": 1}})
    measure.keep_table("speed", "Speed", ["row", "s"], [[row, "1"]])


def test_no_machine_writes_over_the_results_of_another(measure, tmp_path):
    """Neither one of another processor, nor one of the same with other cores, nor the same with
    other environment variables: `export MALLOC_MMAP_MAX_=0` changes what a step takes."""
    places = {
        "a": {},
        "b": {"name": "b"},
        "a-64-cores-8-gib": {"cores": 64},
        "a-malloc-mmap-max-0": {"variables": "MALLOC_MMAP_MAX_=0"},
        "a-64-cores-8-gib-malloc-mmap-max-0": {"cores": 64, "variables": "MALLOC_MMAP_MAX_=0"},
    }
    for turn in range(2):
        for folder, facts in places.items():
            keep_row(measure.on(**facts), f"{folder} {turn}")
    assert {path.parent.name for path in tmp_path.glob("results/*/speed.json")} == set(places)
    for folder in places:
        content = json.loads((tmp_path / f"results/{folder}/speed.json").read_text())
        assert list(content["rows"]) == [f"{folder} 0", f"{folder} 1"]
        assert f"| {folder} 1 | 1 | " in (tmp_path / f"results/{folder}/speed.md").read_text()


def test_no_machine_of_as_many_cores_writes_over_the_results_of_another(measure, tmp_path):
    """Clouds sell one processor under several names."""
    names = ["AMD EPYC", "AMD EPYC 9R45", "AMD EPYC-Turin", "AMD EPYC-Turin 2"]
    for turn in range(2):
        for name in names:
            keep_row(measure.on(cpu=name), f"{name}, {turn}")
    found = {}
    for path in tmp_path.glob("results/*/speed.json"):
        content = json.loads(path.read_text())
        found[content["machine"]["cpu"]] = list(content["rows"])
    assert found == {name: [f"{name}, 0", f"{name}, 1"] for name in names}
    folders = {path.parent.name for path in tmp_path.glob("results/*/speed.json")}
    second = "a-2-cores-8-gib"
    assert folders == {"a", second, f"{second}-2", f"{second}-3"}


def test_results_kept_with_variables_stay_apart_from_those_without(measure, tmp_path):
    keep_row(measure.on(variables="MALLOC_MMAP_MAX_=0"), "kept")
    keep_row(measure.on(), "plain")
    kept = json.loads((tmp_path / "results/a/speed.json").read_text())["rows"]
    plain = json.loads((tmp_path / "results/a-no-variables/speed.json").read_text())["rows"]
    assert list(kept) == ["kept"] and list(plain) == ["plain"]


def test_rows_of_other_software_stay_and_say_so(measure, tmp_path):
    """With the day of each row; a row goes only if the same is measured again."""
    keep_row(measure.on(torch="1"), "first")
    keep_row(measure.on(torch="1"), "second")
    keep_row(measure.on(torch="2"), "second")
    keep_row(measure.on(torch="2"), "third")
    content = json.loads((tmp_path / "results/a/speed.json").read_text())
    assert list(content["rows"]) == ["first", "second", "third"]
    today = {"date": date.today().isoformat()}
    assert content["machine"]["torch"] == "1" and content["measured"] == {
        "first": today,
        "second": {**today, "torch": "2"},
        "third": {**today, "torch": "2"},
    }
    table = (tmp_path / "results/a/speed.md").read_text()
    assert "torch 1." in table and table.endswith(f"| third | 1 | {today['date']}, torch 2 |\n")


def test_results_of_an_older_version_are_read(measure, tmp_path):
    """It kept neither days nor all variables."""
    machine = {"cpu": "a", "cores": 2, "memory_gib": 8, "system": "x", "malloc": "", "torch": "1"}
    path = tmp_path / "results/a/speed.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": machine, "rows": {"old": {"s": 2}, "again": {"s": 2}}}))
    rows = measure.on(torch="1").keep("speed", {"again": {"s": 1}})
    assert rows == {"old": {"s": 2}, "again": {"s": 1}}
    measure.keep_table("speed", "Speed", ["row", "s"], [["old", "2"], ["again", "1"]])
    today = date.today().isoformat()
    last = path.with_suffix(".md").read_text().splitlines()[-2:]
    assert last == ["| old | 2 | - |", f"| again | 1 | {today}, variables none |"]


def test_a_table_with_rows_as_columns_says_when_each_was_measured(measure, tmp_path):
    keep_row(measure.on(), "first")
    measure.keep_table("speed", "Speed", ["what", "first"], [["s", "1"]])
    last = (tmp_path / "results/a/speed.md").read_text().splitlines()[-1]
    assert last == f"| measured | {date.today().isoformat()} |"


def test_variables_that_change_speeds_are_kept(program, monkeypatch):
    measure = program("measure")
    for name in list(os.environ):
        if name.startswith(measure._VARIABLES):
            monkeypatch.delenv(name)
    assert measure.machine()["variables"] == ""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert measure.machine()["variables"] == "MALLOC_MMAP_MAX_=0 THP_MEM_ALLOC_ENABLE=1"


@pytest.mark.parametrize("name", ["trainer", "train_step"])
def test_what_a_program_sets_for_its_processes_is_kept(program, monkeypatch, name):
    module, kept = program(name), []
    for variable in module.THREADS:
        monkeypatch.setenv(variable, "")
    measured = {"trainer": "compare", "train_step": "speeds"}[name]
    monkeypatch.setattr(module, measured, lambda *of: kept.append(program("measure").machine()))
    monkeypatch.setattr(module, "make_data", lambda *of: None)
    monkeypatch.setattr(program("measure"), "keep", lambda *of: {})
    monkeypatch.setattr(module, "show", lambda rows: None, raising=False)
    monkeypatch.setattr(sys, "argv", [name])
    module.main()
    assert "OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive" in kept[0]["variables"]


@pytest.mark.parametrize("line, said", [
    *(
        (f"{name} --{flag} 0", f"argument --{flag}: '0': use a whole number from 1 on")
        for name, flags in {
            "ablation": "rounds", "attention": "rounds threads", "evaluate": "rounds experts",
            "generate": "rounds batches", "layer": "rounds", "peers": "rounds",
            "prepare": "rounds", "train_step": "updates tokens context", "trainer": "rounds",
        }.items()
        for flag in flags.split()
    ),
    ("layer --rounds -1", "'-1': use a whole number from 1 on"),
    ("layer --rounds 2.5", "'2.5': use a whole number from 1 on"),
    ("layer --rows 0 6", "--rows 6: the shapes are 0 to 5; name some"),
    ("layer --rows -1", "--rows -1: the shapes are 0 to 5; name some"),
    *(
        (f"prepare --megabytes {value}", f"'{value}': use a number from 0.01 to 1000")
        for value in ("nan", "-1", "0", "0.001", "1e9", "inf", "many")
    ),
    *((f"gpu --minutes {value}", "use a number above 0") for value in ("nan", "-1", "0", "inf")),
    *(
        (f"{name} --gpu", "--gpu: this machine has no CUDA device; leave it out\n")
        for name in ("layer", "peers")
    ),
    ("peers --cases our", "--cases our: there is no such case; use plain PyTorch, "),
])  # fmt: skip
def test_numbers_are_checked_before_anything_is_measured(program, line, said, monkeypatch, capsys):
    name, *arguments = line.split()
    if name == "generate":
        pytest.importorskip("transformers")
    module = program(name)
    for works in ("measured", "run", "compare", "speeds", "make_data"):
        monkeypatch.setattr(module, works, None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit):
        module.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("peers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generate(program, tiny, peers, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    generate = program("generate")
    cases = list(generate.CASES) if peers else ["ours"]
    monkeypatch.setattr(generate, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(generate, "PROMPT", 3)
    monkeypatch.setattr(generate, "NEW", 4)
    line = "generate.py --shapes tiny --batches 2 --rounds 1 --one-thread --cases"
    monkeypatch.setattr(sys, "argv", [*line.split(), *cases])
    generate.main()
    rows = kept(tmp_path, "generate_one_thread")
    assert len(rows) == len(cases)
    assert rows["tiny, batch 2: ours"]["ours_is_faster"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_peers_that_are_not_installed_are_left_out(
    program, tiny, name, monkeypatch, tmp_path, capsys
):
    module = program(name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(program("peers").SHAPES, "tiny", tiny)
    if name == "evaluate":
        module.against_peers(["tiny"], 1)
        cases, left = list(module.PEERS), ["Hugging Face GPT-2", "OLMoE, 8 experts"]
    else:
        monkeypatch.setattr(module, "SHAPES", {"tiny": tiny})
        monkeypatch.setattr(module, "PROMPT", 3)
        monkeypatch.setattr(module, "NEW", 4)
        left = ["ours, converted, by transformers", "GPT-2"]
        cases = ["ours", *left]
        module.compare("rows", "tiny", 2, cases, 1)
    (path,) = tmp_path.glob("results/*/*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row.split(": ")[1] for row in rows] == [each for each in cases if each not in left]
    out = capsys.readouterr().out
    assert all(f"{label}: left out: ModuleNotFoundError" in out for label in left)


def test_evaluate_against_peers(program, tiny, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    evaluate = program("evaluate")
    monkeypatch.setitem(program("peers").SHAPES, "tiny", tiny)
    evaluate.against_peers(["tiny"], 1)
    file = "evaluate_peers" + ("_one_thread" if torch.get_num_threads() == 1 else "")
    rows = kept(tmp_path, file)
    assert [name.split(": ")[1] for name in rows] == list(evaluate.PEERS)


def dropped(model, tokens):
    """Percentage of choices that no expert computes, of each layer."""
    with torch.no_grad():
        return [float(record.stats["overflow"]) for record in model(tokens)[1]["moe"]]


@pytest.mark.parametrize("training", [True, False])
def test_peers_and_evaluation_have_equal_flops(program, tiny, training):
    tokens = torch.randint(4, tiny.vocabulary, (tiny.rows, tiny.context))
    for case in (*program("peers").CASES.values(), program("evaluate").PEERS["ours, 8 experts"][1]):
        build = getattr(case, "build", case)
        if getattr(build, "func", None) is program("peer_models").ours or build is case:
            model = build(tiny).model.train(training)
            assert not any(dropped(model, tokens)), case


def test_bfloat16_on_a_gpu_is_trained_by_float32_copies(program):
    """A hundred steps of 1e-4; below 1, numbers of bfloat16 are 40 such steps apart."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = program("bfloat16_training").BFloat16Training(model)
    for _ in range(100):
        optimizer.zero_grad(set_to_none=True)
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert 0.98 < float(model.weight) < 0.995


@pytest.mark.parametrize("name", ["8 experts", "8 experts, --compile"])
def test_training_steps_have_equal_flops(program, monkeypatch, name):
    train_step = program("train_step")
    shape = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
    monkeypatch.setattr(train_step, "SHAPE", f"{shape} --decoder-attention-heads 2")
    flags = train_step.flags(Path("data"), train_step.GROUPS["sparse"][name], 64, 128, 1)
    args = options.parse_args_and_arch(options.get_training_parser(), flags)
    cfg = convert_namespace_to_omegaconf(args).model
    cfg.compile = False
    model = MoETransformerLanguageModel.build_model(cfg, make_task()).train()
    found = dropped(model, torch.randint(4, VOCABULARY, (2, 64)))
    assert len(found) == 1 and not any(found)


@pytest.mark.parametrize("ours", [True, False])
def test_the_time_of_attention_is_told_apart(program, ours, monkeypatch):
    """Ours, of many operators, and PyTorch's of one, forward and backward. Its projections and an
    activation are of other kinds."""
    train_step = program("train_step")
    monkeypatch.setattr(attention, "serves", lambda q, dropout: ours)
    monkeypatch.setattr(train_step, "DIM", 64)
    block, x = attention.CausalSelfAttention(64, 2), torch.randn(2, 128, 64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        torch.nn.functional.gelu(block(x)).sum().backward()
    kinds = {}
    for event in profile.events():
        kinds.setdefault(train_step.kind(event), set()).add(event.name)
    core = kinds["attention's core"]
    inside = {"aten::bmm", "aten::_softmax"} if ours else set()
    forward = "_CausalAttention" if ours else "aten::scaled_dot_product_attention"
    assert core >= {*inside, forward} and any(n.startswith("autograd::engine") for n in core)
    assert {"aten::gelu", "aten::gelu_backward", "aten::sum"} <= kinds["all else"]
    others = set.union(*(kinds[name] for name in kinds if name != "attention's core"))
    assert not others & {"aten::bmm", "aten::_softmax"} and not core & {"aten::gelu", "aten::addmm"}
    shares = train_step.by_kind(profile)
    assert set(shares) == set(kinds) and sum(shares.values()) == pytest.approx(1)


def test_prepare(program, monkeypatch, tmp_path):
    """With commands that run in this process."""
    prepare = program("prepare")
    from fairseq_cli import preprocess

    from fairseq_moe_ext.cli import main

    def command(name, *arguments):
        arguments = [str(one) if one != prepare.CORES else "1" for one in arguments]
        if name == "fairseq-moe":
            assert main(arguments) == 0
        else:
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            preprocess.cli_main()

    monkeypatch.setattr(prepare, "command", command)
    monkeypatch.setattr(prepare, "VOCABULARY", 300)
    monkeypatch.setattr(sys, "argv", "prepare.py --megabytes 0.02 --rounds 1".split())
    prepare.main()
    rows = kept(tmp_path, "prepare")
    assert len(rows) == 6 and rows["0.02 MB: tokenizers alone"]["speed"] == 1


def test_a_text_that_is_too_small_is_not_measured(program, monkeypatch, tmp_path):
    prepare = program("prepare")
    monkeypatch.setattr(prepare, "make_text", lambda path, most: 31_000_000)
    with pytest.raises(SystemExit, match="--megabytes 50: Python's library has 31.0; use fewer"):
        prepare.measured(50_000_000, 1)
    assert not (tmp_path / "results").exists()


def test_growth_draws_nothing_before_it_has_measured(program, monkeypatch, tmp_path, capsys):
    growth = program("growth")
    monkeypatch.setattr(sys, "argv", ["growth.py", "--draw"])
    with pytest.raises(SystemExit):
        growth.main()
    assert (
        "growth.json does not exist; run `python benchmarks/growth.py`" in capsys.readouterr().err
    )


@pytest.mark.parametrize("gb_per_s", [1e-3, 1e3], ids=["of the bytes", "of the FLOPs"])
def test_the_floor_of_a_layer(program, monkeypatch, tmp_path, gb_per_s):
    """The longer of equal FLOPs in the faster dense layer and three times the experts' bytes."""
    layer = program("layer")
    monkeypatch.setattr(layer.measure, "copy_bandwidth", lambda device: gb_per_s * 1e9)
    layer.run([layer.Shape(64, 4, 16, 32)], 1, False, torch.empty(0))
    (row,) = kept(tmp_path, "layer").values()
    expert_bytes = 4 * 4 * (2 * 16 * 32 + 16 + 32)
    traffic = 3 * expert_bytes / (gb_per_s * 1e6) / row["dense_ms"]
    dense = min(1, row["times"]["our dense"])
    assert (traffic > dense) == (gb_per_s < 1)
    assert row["floor"] == pytest.approx(max(traffic, dense))


def test_rates_are_of_random_numbers_and_large_copies(program, monkeypatch):
    """A GPU multiplies ones a seventh faster than numbers of a model, and starting a copy of 256
    MiB takes a tenth of its time there. Tensors on `meta` have sizes alone."""
    measure, factors, copied = program("measure"), [], []
    monkeypatch.undo()
    monkeypatch.setattr(measure, "product", lambda x, y: factors.extend([x, y]))
    measure.matrix_rate(1)
    assert all(0.9 < float(each.std()) < 1.1 for each in factors[:2])
    monkeypatch.setattr(measure, "_COPIED", 1024)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.copy_.default:
                copied.append(args[1])
            return function(*args, **(kwargs or {}))

    with Copies():
        measure.copy_bandwidth()
    assert {each.nbytes for each in copied} == {1024} and len(copied[0].unique()) > 100
    copied.clear()
    monkeypatch.undo()
    with Copies():
        measure.copy_bandwidth("meta")
    assert {each.nbytes for each in copied} == {2**32}


def test_memory_of_work_on_a_cpu_is_the_cpus_beside_a_gpu(program, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    measure = program("measure")
    assert 2**20 <= measure.peak_memory(lambda: torch.ones(2**18)) < 2**21
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    assert measure.peak_memory(lambda: None, "cuda") == 5


def test_memory_that_pytorch_keeps_for_later_is_free(program, monkeypatch):
    for name, value in (("mem_get_info", (3, 9)), ("memory_reserved", 5), ("memory_allocated", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert program("measure").free_memory("cuda") == 3 + 5 - 1


def test_an_optional_case_that_raises_is_left_out(program, capsys):
    """In whichever round; one that is not optional ends the run."""

    def work(name, last):
        calls.append(name)
        if calls.count(name) > last:
            raise RuntimeError("no kernel\nfor this device")

    calls = []
    lasts = {"ours": 9, "never": 0, "twice": 2}
    cases = {name: lambda name=name, last=last: work(name, last) for name, last in lasts.items()}
    seconds = program("measure").in_turn(cases, 3, warmup=1, optional=["never", "twice"])
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 3}
    assert {name: calls.count(name) for name in lasts} == {"ours": 4, "never": 1, "twice": 3}
    said = [f"{name}: left out: RuntimeError: no kernel" for name in ("never", "twice")]
    assert sorted(capsys.readouterr().out.splitlines()) == said
    with pytest.raises(RuntimeError):
        program("measure").in_turn(cases, 3, optional=["never"])


@pytest.mark.parametrize("pays", [True, False])
def test_ablation(program, monkeypatch, tmp_path, pays):
    """Each part is left out while a step runs, and is back behind it."""
    from fairseq_moe_ext.kernels import chunks, expert_ffn, matmul
    from fairseq_moe_ext.moe import experts

    ablation = program("ablation")
    parts = [
        (expert_ffn, "side_by_side"),
        (expert_ffn, "program_rows"),
        (chunks, "program_rows"),
        (chunks, "program_size"),
        (experts, "kernel_for"),
        (chunks, "_NARROW"),
        (matmul, "onednn_is_faster"),
    ]
    before = [getattr(*part) for part in parts]
    changed = {}
    for name, change in ablation.WITHOUT.items():
        with change(ablation.SHAPES[0]):
            changed[name] = [p[1] for p, old in zip(parts, before) if getattr(*p) is not old]
    expected = [
        ["_NARROW"],
        ["side_by_side"],
        ["program_rows", "program_rows", "program_size"],
        ["kernel_for"],
    ]
    assert list(changed.values()) == expected
    monkeypatch.setattr(ablation, "SHAPES", [ablation.Shape(16, 4, 8, 16)])
    monkeypatch.setattr(sys, "argv", "ablation.py --rounds 1".split())
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: pays)
    ablation.main()
    assert [getattr(*part) for part in parts] == before
    rows = kept(tmp_path, "ablation")
    assert len(rows) == len(ablation.PRECISIONS) - (not pays)
    assert all(row[name] > 0 for row in rows.values() for name in ablation.WITHOUT)


@pytest.mark.parametrize("pays", [True, False])
def test_attention(program, monkeypatch, tmp_path, pays):
    """Both compute the same, and every row is kept."""
    attention = program("attention")
    q, k, v = torch.randn(3, 2, 3, 128, 8)
    torch.testing.assert_close(
        attention.pytorchs(q, k, v, 0.0), attention.causal_attention(q, k, v, 0.0)
    )
    monkeypatch.setattr(attention, "SHAPES", [attention.Shape(1, 2, 128, 8)])
    monkeypatch.setattr(sys, "argv", "attention.py --rounds 1".split())
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: pays)
    attention.main()
    rows = kept(tmp_path, "attention")
    assert len(rows) == 2 * (len(attention.PRECISIONS) - (not pays))
    assert all(row["PyTorch : ours"] > 0 and row["ours : floor"] > 0 for row in rows.values())
