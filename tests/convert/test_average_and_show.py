"""`fairseq-moe average` against a plain mean, and `fairseq-moe show`."""

import itertools
import json
import math
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from converting import DENSE, MOE, convert, load, logits
from training import TRAIN, train_on

from fairseq_moe_ext.checkpoint.collective import code_version
from fairseq_moe_ext.cli import main
from fairseq_moe_ext.convert import model_card, readers, show, training, writing
from fairseq_moe_ext.convert.average import mean_of
from fairseq_moe_ext.convert.readers import open_checkpoint
from fairseq_moe_ext.convert.source import Source
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.locks import Lock


@pytest.fixture
def saved(run):
    """flags -> the checkpoints of a run at updates 4, 8 and 12."""

    def of(flags):
        folder = run(flags)[0].parent
        return [folder / f"checkpoint_1_{updates}.pt" for updates in (4, 8, 12)]

    return of


def average(*arguments):
    assert main(["average", *map(str, arguments)]) == 0


def plain_mean(paths):
    models = [load(path)["model"] for path in paths]
    return {
        name: (sum(m[name].double() for m in models) / len(models)).to(models[0][name].dtype)
        for name in models[0]
    }


@pytest.mark.parametrize("flags", [MOE, DENSE])
def test_the_mean_is_that_of_a_plain_loop(saved, tmp_path, flags):
    paths = saved(flags)
    average(*paths, "--output", tmp_path / "mean.pt")
    found, expected = load(tmp_path / "mean.pt"), plain_mean(paths)
    assert found["model"].keys() == expected.keys()
    assert all(torch.equal(found["model"][name], expected[name]) for name in expected)
    assert found["last_optimizer_state"] is None
    assert found["optimizer_history"] == load(paths[-1])["optimizer_history"]


def test_experts_in_files_are_averaged_too(saved, data, tmp_path):
    """Inputs of 1, 2 and 4 files of experts, and an output of 2: the same mean."""
    paths = saved(MOE)
    average(*paths, "--output", tmp_path / "mean.pt")
    spread = []
    for number, path in zip((1, 2, 4), paths):
        spread.append(tmp_path / f"in{number}" / "x.pt")
        convert(path, spread[-1], "--expert-files", number)
    average(*spread, "--output", tmp_path / "out" / "mean.pt", "--expert-files", 2)
    assert len(list((tmp_path / "out" / "experts").glob("*.pt"))) == 2
    assert torch.equal(
        logits(tmp_path / "mean.pt", data), logits(tmp_path / "out" / "mean.pt", data)
    )


def test_a_checkpoint_beside_another_tokenizer_is_converted_and_averaged(saved, tmp_path, caplog):
    for number, path in enumerate(saved(MOE)):
        state = load(path)
        state["task_state"]["tokenizer"] = {"dict.txt": "0" * 64}
        state["cfg"]["task"]["data"] = "none"
        torch.save(state, tmp_path / f"{number}.pt")
    (tmp_path / "dict.txt").write_text("of another model 1\n")
    (tmp_path / "new").mkdir()
    inputs = [tmp_path / "0.pt", tmp_path / "1.pt"]
    convert(inputs[0], tmp_path / "new" / "x.pt")
    convert(inputs[0], tmp_path / "new" / "x.pt", "--overwrite")
    average(*inputs, "--output", tmp_path / "new" / "y.pt")
    words = "without the tokenizer of .*dict.txt: does not belong to the tokenizer"
    assert len(re.findall(words, caplog.text)) == 3
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x.pt", "y.pt"]


def test_the_last_ones_of_a_folder(saved, tmp_path, capsys):
    paths = saved(MOE)
    average(paths[0].parent, "--last", 2, "--output", tmp_path / "a.pt")
    average(*paths[1:], "--output", tmp_path / "b.pt")
    a, b = (load(tmp_path / name)["model"] for name in ("a.pt", "b.pt"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "checkpoint_1_8.pt, " in capsys.readouterr().out


@pytest.fixture
def nothing_read(monkeypatch):
    def open_checkpoint(path, weights_only):
        raise AssertionError("read")

    monkeypatch.setattr(readers, "open_checkpoint", open_checkpoint)


@pytest.mark.parametrize(
    "more, words",
    [
        ("{t}/none.pt", "none.pt: no such checkpoint"),
        ("{b} --expert-files 3", "--expert-files 3 does not divide the 4 experts"),
        ("{dense}", "are different models: moe_expert_count is 4 and 0"),
    ],
)
def test_no_checkpoint_is_read_before_a_mistake(saved, tmp_path, capsys, nothing_read, more, words):
    a, b, _ = saved(MOE)
    more = more.format(t=tmp_path, b=b, dense=saved(DENSE)[0])
    assert main(f"average {a} {more} --output {tmp_path}/m.pt".split()) == 1
    assert words in capsys.readouterr().err


@pytest.fixture
def trains(tmp_path, monkeypatch):
    """A folder that a training saves to; nobody waits for it."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(writing, "time", clock)
    with Lock(tmp_path / "lock", "training"):
        yield tmp_path


def test_one_file_is_written_beside_a_training(saved, trains):
    average(*saved(MOE), "--output", trains / "mean.pt")
    convert(saved(MOE)[0], trains / "x.pt")
    assert {"mean.pt", "x.pt"} < {path.name for path in trains.iterdir()}


@pytest.mark.parametrize("command", ["average {a} {b} --output", "convert {a}"])
@pytest.mark.parametrize("flag", ["--overwrite", "--expert-files 2"])
def test_nothing_is_read_where_a_training_is_in_the_way(
    saved, trains, capsys, nothing_read, command, flag
):
    a, b, _ = saved(MOE)
    line = f"{command.format(a=a, b=b)} {trains}/m.pt {flag}"
    assert main(line.split()) == 1
    assert f"{trains} is being worked on by PID" in capsys.readouterr().err
    assert [path.name for path in trains.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{a} --output {t}/m.pt", "give two or more different checkpoints"),
        ("{a} {a} --output {t}/m.pt", "give two or more different checkpoints"),
        ("{a} {b} --output {t}/m", "must end in .pt"),
        ("{a} {b} --output {t}/m-rank-1.pt", "--output {t}/m-rank-1.pt: would be read as a part"),
        ("{a} {b} --output {a}", "is also an input"),
        ("{a} {b} --output {t}/f.pt --overwrite", "--output {t}/f.pt: is a folder; name a file"),
        ("{a} {b} --output {t}/link.pt --overwrite", "link.pt: is a link to {there}; name that"),
        (
            "{dense} {dense2} --output {t}/m.pt --expert-files 2",
            "distribute: remove --expert-files\n",
        ),
        ("{a} {dense} --output {t}/m.pt", "are different models"),
        ("{a} {half} --output {t}/m.pt", "are different models"),
        ("{a} {t}/none.pt --output {t}/m.pt", "none.pt: no such checkpoint"),
        ("{folder} --output {t}/m.pt", "a folder; add --last N"),
        ("{folder} --last 9 --output {t}/m.pt", "--last 9: {folder} has 3 numbered checkpoints"),
        ("{folder} --last 1 --output {t}/m.pt", "--last 1: use 2 or more"),
        ("{a} {b} --last 2 --output {t}/m.pt", "needs exactly one folder"),
        ("{t}/none --last 2 --output {t}/m.pt", "--last 2: {t}/none: no such folder; name"),
        ("{a} {b} --output {t}/m.pt --expert-files 3", "--expert-files 3 does not divide"),
        ("{a} {b} --output {t}/m.pt --expert-files 0", "--expert-files 0: use 1 or more"),
        ("{a} {b} --output {there}", "exists; choose another name"),
    ],
)
def test_mistakes_are_one_line(saved, tmp_path, capsys, line, words):
    a, b, _ = saved(MOE)
    there = tmp_path / "there.pt"
    there.write_bytes(b"mine")
    half = tmp_path / "half.pt"
    convert(b, half, "--dtype", "float16")
    (tmp_path / "f.pt").mkdir()
    (tmp_path / "link.pt").symlink_to(there)
    before = sorted(tmp_path.rglob("*"))
    names = dict(a=a, b=b, folder=a.parent, half=half, t=tmp_path, there=there)
    names.update(dense=saved(DENSE)[0], dense2=saved(DENSE)[1])
    capsys.readouterr()
    assert main(["average", *line.format(**names).split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words.format(**names) in error
    assert there.read_bytes() == b"mine" and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name, value",
    [
        ("moe_score", "sigmoid"),
        ("moe_normalize_weights", "before"),
        ("moe_normalize_gate_prob_before_dropping", True),
        ("moe_route_scale", 2.5),
        ("moe_groups", 2),
        ("moe_gating_use_fp32", False),
        ("moe_gating_fp32_product", True),
        ("layernorm_embedding", True),
        ("dropout", None),
        ("moe_capacity_factor", None),
        ("max_target_positions", None),
    ],
)
def test_models_that_compute_differently_are_refused(saved, name, value):
    """The tensors have the same shapes. Settings that only training uses may differ (None)."""
    one, other = (open_checkpoint(str(path), True) for path in saved(MOE)[:2])
    other.settings[name] = 0.3 if value is None else value
    if value is None:
        assert mean_of([one, other]).settings is other.settings
        return
    with pytest.raises(UserError, match=f"are different models: {name} is .* and {value}; average"):
        mean_of([one, other])


def test_a_checkpoint_is_averaged_with_one_that_came_through_the_branch(saved, tmp_path):
    a, b, _ = saved(MOE)
    convert(a, tmp_path / "x.pt", "--to", "branch", "--weights-only")
    convert(tmp_path / "x.pt", tmp_path / "a.pt", "--weights-only")
    average(tmp_path / "a.pt", b, "--output", tmp_path / "mean.pt")
    expected = plain_mean([a, b])
    found = load(tmp_path / "mean.pt")["model"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_true_of_the_last_checkpoint_alone_is_not_said_of_the_mean(saved, tmp_path):
    """Nor is the second model of --store-ema kept with weights only."""
    paths = saved(MOE)[:2]
    state = load(paths[1])
    state["extra_state"].update(val_loss=3.5, best=3.25, ema=state["model"])
    torch.save(state, tmp_path / "x.pt")
    average(paths[0], tmp_path / "x.pt", "--output", tmp_path / "mean.pt")
    mean = load(tmp_path / "mean.pt")["extra_state"]
    gone = {"val_loss", "best", "ema"}
    assert mean.keys() == state["extra_state"].keys() - gone
    convert(tmp_path / "x.pt", tmp_path / "half.pt", "--dtype", "fp16")
    assert gone <= load(tmp_path / "half.pt")["extra_state"].keys()
    for flags in ([], ["--expert-files", 2], ["--to", "branch"]):
        name = "b.pt" if "branch" in flags else "y.pt"
        convert(tmp_path / "x.pt", tmp_path / name, "--weights-only", "--overwrite", *flags)
        kept = load(tmp_path / name.replace("b.pt", "b-shared.pt"))["extra_state"]
        assert "ema" not in kept and kept["best"] == 3.25


def test_no_training_is_told_of_a_model_that_was_not_trained(saved, tmp_path, capsys):
    """The settings in its file are fairseq's defaults, or those of the dense model's run."""
    path = saved(DENSE)[1]
    convert(path, tmp_path / "hf", "--to", "hf", "--no-tokenizer")
    assert "| criterion | " in (tmp_path / "hf" / "README.md").read_text()
    convert(tmp_path / "hf", tmp_path / "back.pt", "--from", "hf")
    convert(path, tmp_path / "up.pt", "--upcycle", "--moe-expert-count", 2)
    convert(path, tmp_path / "b.pt", "--weights-only")
    for name in ("back.pt", "up.pt"):
        capsys.readouterr()
        assert main(["show", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert "training    not recorded\n" in out and "\nwith " not in out
        assert "written by  fairseq_moe_ext\n" in out
        assert training_of(tmp_path / name, capsys) == {"updates": 0}
        convert(tmp_path / name, tmp_path / "card", "--to", "hf", "--no-tokenizer", "--overwrite")
        card = (tmp_path / "card" / "README.md").read_text()
        facts = card.partition("## Training")[2].partition("## ")[0]
        assert "not recorded in the checkpoint" in facts
        assert not re.search("updates|epoch|criterion|lr|seed", facts)
    capsys.readouterr()
    assert training_of(tmp_path / "b.pt", capsys)["updates"] == 8


def test_the_metric_of_the_best_checkpoint_is_named(saved, tmp_path, capsys):
    state = load(saved(MOE)[1])
    state["extra_state"].update(val_loss=450.25, best=444.6816)
    for metric in ("in_domain_ppl", "loss"):
        state["cfg"]["checkpoint"]["best_checkpoint_metric"] = metric
        torch.save(state, tmp_path / "x.pt")
        assert main(["show", str(tmp_path / "x.pt")]) == 0
        assert f"validation {metric} 450.2, best {metric} 444.7" in capsys.readouterr().out
        assert main(["show", str(tmp_path / "x.pt"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["training"]
        assert found["best_checkpoint_metric"] == metric and found["best"] == 444.6816
        rows = model_card._training(open_checkpoint(str(tmp_path / "x.pt"), True))
        assert [f"best validation {metric}", "444.6816"] in rows


def test_a_validation_that_is_not_finite_is_null_in_json(saved, tmp_path, capsys):
    state = load(saved(MOE)[1])
    state["extra_state"].update(val_loss=math.nan, best=math.inf)
    torch.save(state, tmp_path / "x.pt")
    assert main(["show", str(tmp_path / "x.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["training"]
    assert found["validation_loss"] is None and found["best"] is None


def test_the_training_of_an_older_checkpoint_is_told():
    """Its settings are in one namespace, without groups."""
    args = Namespace(best_checkpoint_metric="ppl", lr=[0.5], optimizer="sgd", seed=0)
    old = {"args": args, "cfg": None, "optimizer_history": [{"num_updates": 3}]}
    told = show._training(old)
    assert told["best_checkpoint_metric"] == "ppl" and told["lr"] == [0.5]
    rows = model_card._training(Source("x.pt", old, {}, {}, [], None))
    assert ["optimizer", "sgd"] in rows and ["updates", "3"] in rows
    assert training.results({**old, "args": None})["best_checkpoint_metric"] == "loss"


def training_of(path, capsys):
    assert main(["show", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["training"]


def test_show_counts_the_tokens_of_all_runs_and_the_last_epoch(data, tmp_path, capsys):
    """fairseq's meters begin anew with a run that continues at the start of an epoch, of 1,000
    tokens in 16 updates."""
    line = f"{data} {TRAIN} {MOE} --sentence-avg --save-dir {tmp_path} --max-epoch"
    for epoch in (1, 2):
        train_on(1, f"{line.replace('--max-update 14', '')} {epoch}")
        found = training_of(tmp_path / "checkpoint_last.pt", capsys)
        counted = [found[name] for name in ("epoch", "updates", "tokens")]
        assert counted == [epoch, 16 * epoch, 1000 * epoch]
    state = load(tmp_path / "checkpoint_last.pt")
    del state["extra_state"]["tokens"]  # as older checkpoints of a run that was continued
    torch.save(state, tmp_path / "old.pt")
    assert "tokens" not in training_of(tmp_path / "old.pt", capsys)
    pre = f"--finetune-from-model {tmp_path / 'old.pt'} --save-dir {tmp_path / 'new'} --max-update"
    train_on(1, f"{line} 9 {pre} 2")
    found = training_of(tmp_path / "new" / "checkpoint_last.pt", capsys)
    assert [found[name] for name in ("epoch", "updates", "tokens")] == [1, 2, 128]


def test_show_says_what_a_checkpoint_is(saved, tmp_path, capsys):
    path = saved(MOE)[1]
    assert main(["show", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = load(path)["model"]
    tied = {v.data_ptr(): v for k, v in model.items() if not k.endswith(("version", "_tensor"))}
    assert found["parameters"]["total"] == sum(v.numel() for v in tied.values())
    assert found["model"]["experts"] == 4 and found["model"]["sparse_layers"] == [1]
    assert found["training"]["updates"] == 8
    assert found["training"]["tokens"] == 8 * 64  # 8 rows of 8 tokens an update
    assert found["files"] == {"count": 1, "bytes": Path(path).stat().st_size}
    convert(path, tmp_path / "x.pt", "--expert-files", 2, "--dtype", "bfloat16")
    capsys.readouterr()
    assert main(["show", str(tmp_path / "x.pt"), "--settings"]) == 0
    out = capsys.readouterr().out
    assert f"written by  {code_version()}\n" in out
    assert "3 files" in out and "bfloat16" in out and "4 experts in layer 1, top 2" in out
    assert "8 updates, 512 tokens" in out and "moe_expert_count = 4" in out
    convert(path, tmp_path / "b.pt", "--to", "branch")
    assert main(["show", str(tmp_path / "b.pt")]) == 0
    assert "written by  fairseq's moe branch or in its format, 2 files" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "none.pt")]) == 1
    assert "no such checkpoint" in capsys.readouterr().err
