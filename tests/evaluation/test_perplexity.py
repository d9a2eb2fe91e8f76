"""Perplexity over many sets against a plain loop and against fairseq-eval-lm."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from small_models import MOE, build_model
from training import fairseq, prepare_near_and_far, train_small

import fairseq_moe_ext
from fairseq_moe_ext import cli, data_bin
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation import capacity, evaluate_command, evaluated, perplexity, texts
from fairseq_moe_ext.evaluation.loading import language_modeling_task, load_model
from fairseq_moe_ext.models import precision
from fairseq_moe_ext.patches import checkpoint_io

EOS = 2


def text_of(length=45):
    torch.manual_seed(3)
    return texts.Text("t", None, True, torch.randint(4, 40, (length,)), np.array([0]), None)


@pytest.mark.parametrize("length, context, stride", [(45, 16, 16), (45, 16, 5), (7, 16, 16)])
def test_every_token_is_scored_once_as_a_plain_loop_does(length, context, stride):
    model = build_model(**MOE, moe_dropless=True).double().eval()
    text = text_of(length)
    spans = perplexity.windows(length, context, stride)
    covered = [i for _, end, new in spans for i in range(new, end)]
    assert covered == list(range(length))
    done = []
    got = perplexity.score(model, text, EOS, context, stride, batch_size=3, progress=done.append)
    assert sum(done) == len(text.tokens)
    stream = [EOS, *text.tokens.tolist()]
    for begin, end, new in spans:
        assert end - begin <= context
        assert new == begin or new - begin >= context - stride, "context before each new token"
        with torch.no_grad():
            logits = model(torch.tensor([stream[begin:end]]))[0][0].double()
        for i in range(new, end):
            expected = -torch.log_softmax(logits[i - begin], 0)[text.tokens[i]]
            assert got.nll[i] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("how", ["greedy", "balanced"])
def test_a_router_that_looks_ahead_is_warned_of(capsys, how):
    """Where all commands, fairseq's too, load models."""
    router = dict(moe_router="base", moe_balance="none", moe_base_evaluation=how)
    flags = {**MOE, **router, "moe_second_expert_policy": "sampling"}
    model = build_model(**flags)
    checkpoint_io.load_model_ensemble_and_task(lambda *_, **__: ([model], None, None), ["x.pt"])
    warned = capsys.readouterr().err
    assert warned.startswith("x.pt: has --moe-base-evaluation balanced") == (how == "balanced")
    assert len(warned.splitlines()) == (how == "balanced")


def test_dropped_choices_are_counted():
    model = build_model(**MOE).eval()
    text = text_of(64)
    capacity.set_capacity(model, 1.0)
    free = perplexity.score(model, text, EOS, 32, 32, batch_size=2)
    assert free.dropped == (0.0, 0.0)
    capacity.set_capacity(model, 1 / 64)  # one token of the batch of 64 an expert
    tight = perplexity.score(model, text, EOS, 32, 32, batch_size=2)
    kept = 64 * (2 - sum(tight.dropped))  # choices, mean over layers
    assert 1 <= kept <= MOE["moe_expert_count"] + 1e-3
    assert not np.allclose(tight.nll, free.nll)
    assert perplexity.score(build_model().eval(), text, EOS, 32, 32, 2).dropped is None


def test_units_end_at_blank_lines_and_are_not_too_short():
    tokens = np.array([5, 6, EOS, EOS, 7, EOS, EOS, 8, 9, EOS, 7, EOS, EOS, 4, EOS])
    assert texts.unit_starts(tokens, EOS, 1).tolist() == [0, 4, 7, 13]
    assert texts.unit_starts(tokens, EOS, 5).tolist() == [0, 7, 13]


def test_the_bootstrap_knows_how_much_units_differ():
    units = np.arange(0, 100, 10)
    alike = perplexity.bootstrap(np.full(100, 2.0), units, 50)
    assert alike == pytest.approx(math.exp(2.0))
    rng = np.random.default_rng(0)
    nll = np.repeat(rng.normal(2.0, 0.3, size=400), 10)
    drawn = np.log(perplexity.bootstrap(nll, np.arange(0, 4000, 10), 1000))
    assert drawn.std() == pytest.approx(nll[::10].std() / 20, rel=0.15), "sd / sqrt(units)"


def test_a_model_that_is_beyond_hope_has_no_finite_perplexity():
    hopeless = np.full(20, 1000.0)
    assert np.isinf(perplexity.bootstrap(hopeless, np.arange(0, 20, 10), 3)).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data folder, checkpoint) of a few updates of an MoE model."""
    folder = tmp_path_factory.mktemp("perplexity")
    prepare_near_and_far(folder, ["far"])
    line = f"""fairseq-train {folder / "data"} --task mixture_language_modeling --arch moe_lm_tiny
        --user-dir {fairseq_moe_ext.__path__[0]} --criterion moe_cross_entropy
        --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --max-update 5
        --decoder-attention-heads 2 --tokens-per-sample 32 --batch-size 4 --optimizer adam
        --lr 0.01 --cpu --num-workers 0 --save-dir {folder / "model"}"""
    fairseq(line)
    return folder / "data", folder / "model" / "checkpoint_best.pt"


def test_bfloat16_is_near(trained, monkeypatch, tmp_path):
    data, checkpoint = trained
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: True)
    losses = {}
    for flag in ("", "--bf16"):
        out = tmp_path / f"found{flag}.json"
        line = f"evaluate {data} --path {checkpoint} --cpu --json {out} {flag}"
        assert cli.main(line.split()) == 0
        sets = json.loads(out.read_text())["sets"]
        losses[flag] = {name: math.log(one["perplexity"]) for name, one in sets.items()}
    for name, exact in losses[""].items():
        # Two layers of seven roundings by 2**-9 at most, and the logits'.
        assert 0 < abs(losses["--bf16"][name] - exact) < 15 * 2**-9 * exact


def test_the_result_says_of_which_state_it_is(trained, tmp_path):
    """As told by its updates and its bytes, whatever its name is."""
    data, checkpoint = trained
    out = tmp_path / "found.json"
    overrides = "{'moe_top_k':1}"
    line = f"evaluate {data} --path {checkpoint} --cpu --json {out} --model-overrides {overrides}"
    assert cli.main(line.split()) == 0
    found = json.loads(out.read_text())
    assert found["checkpoint"] == evaluated.state_of(str(checkpoint))
    assert found["checkpoint"]["updates"] == 5 and found["model_overrides"] == overrides
    branch = "--to branch --rank-files 2 --weights-only"
    for name, flags in (("one.pt", ""), ("many.pt", "--expert-files 2"), ("x.pt", branch)):
        assert cli.main(f"convert {checkpoint} {tmp_path / name} {flags}".split()) == 0
    for name, changed in (("one", "one"), ("many", "many"), ("x", "x-shared"), ("x", "x-rank-1")):
        path, file = str(tmp_path / f"{name}.pt"), tmp_path / f"{changed}.pt"
        before = evaluated.state_of(path)
        shutil.copy(file, tmp_path / "kept")
        state = torch.load(file, weights_only=False)
        next(iter(state["model"].values())).view(-1)[0] += 1
        torch.save(state, file)
        after = evaluated.state_of(path)
        assert after["updates"] == before["updates"] and after["digest"] != before["digest"]
        shutil.copy(tmp_path / "kept", file)
        assert evaluated.state_of(path) == before


def test_it_gives_what_fairseq_eval_lm_gives(trained, caplog, capsys, tmp_path):
    data, checkpoint = trained
    out = tmp_path / "found.json"
    line = f"evaluate {data} --path {checkpoint} --cpu --batch-size 4 --json {out}"
    assert cli.main([*line.split(), "--unit-losses", str(tmp_path / "units.json")]) == 0
    assert "far (held out)" in capsys.readouterr().out
    found = json.loads(out.read_text())
    counts = json.loads((data / "counts.json").read_text())["corpora"]
    assert found["protocol"] == "blocks" and found["context"] == 32
    drops = "--model-overrides {'moe_eval_capacity_token_fraction':%s}"
    for name, one in found["sets"].items():
        caplog.clear()
        tested = (
            f"fairseq-eval-lm {data / name} --user-dir {fairseq_moe_ext.__path__[0]} --path "
            f"{checkpoint} --gen-subset test --tokens-per-sample 32 --batch-size 4 --cpu "
            "--num-workers 0 "
        )
        with caplog.at_level("INFO"):
            fairseq(tested + drops % 1.0)
        assert "mean load" not in caplog.text
        bits = float(re.search(r"Loss \(base 2\): ([\d.]+)", caplog.text)[1])
        assert math.log2(one["perplexity"]) == pytest.approx(bits, abs=1e-3)
        assert one["in_domain"] == (name == "near")
        assert one["tokens"] == counts[name]["test"]["tokens"]
        size = counts[name]["test"]["bytes"]
        assert one["bits_per_byte"] == pytest.approx(bits * one["tokens"] / size, rel=1e-3)
        low, high = one["interval"]
        assert low < one["perplexity"] < high
    for name, units in json.loads((tmp_path / "units.json").read_text()).items():
        one, count = found["sets"][name], sum(units["tokens"])
        assert (len(units["tokens"]), count) == (one["units"], one["tokens"])
        assert min(units["tokens"][:-1]) >= 32, "joined to at least a context"
        assert math.exp(sum(units["nats"]) / count) == pytest.approx(one["perplexity"])
    fairseq(tested + drops % 0.25)
    assert "0.25: this command computes at most 25 % of the tokens for each expert" in caplog.text
    both = [one["perplexity"] for one in found["sets"].values()]
    assert found["mean"]["all"]["perplexity"] == pytest.approx(sum(both) / 2)

    line += " --overwrite"
    overrides = "{'moe_experts_on_disk':True}"
    assert cli.main([*line.split(), "--model-overrides", overrides]) == 0
    again = json.loads(out.read_text())
    for name, one in found["sets"].items():
        assert again["sets"][name]["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)

    page = tmp_path / "page.html"
    line += f" --sweep-capacity 0.02,1.0 --stride 16 --figure {page}"
    assert cli.main(line.split()) == 0
    swept = json.loads(out.read_text())
    assert swept["protocol"] == "sliding"
    lost = [entry["sets"]["near"]["dropped"] for entry in swept["sweep"]]
    assert sum(lost[0]) > 0 and lost[1] == [0.0, 0.0]
    drawn = page.read_text()
    assert drawn.count("<svg") == 4 and "Speed" in drawn  # two means, two sets
    for found in swept["sweep"]:
        assert f"<td>{found['mean']['all']['perplexity']:.2f}</td>" in drawn


WITHOUT = {  # models in which nothing can be dropped
    "a dense model": {},
    "its router": {**MOE, "moe_router": "threshold", "moe_balance": "none"},
}


@pytest.mark.parametrize("flag", ["--sweep-capacity 0.1,1", "--capacity 0.5"])
@pytest.mark.parametrize("what", WITHOUT)
def test_a_capacity_of_a_model_without_one_is_refused(
    trained, monkeypatch, tmp_path, capsys, what, flag
):
    monkeypatch.chdir(tmp_path)  # where a page would be
    model = build_model(**WITHOUT[what]).eval()
    monkeypatch.setattr(evaluate_command, "load_model", lambda *_: (model, None))
    data, checkpoint = trained
    assert cli.main(f"evaluate {data} --path {checkpoint} --cpu {flag}".split()) == 1
    assert capsys.readouterr().err == (
        f"error: {flag}: has no effect, because {what} has no capacity; remove it\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--capacity 0", "--capacity 0.0: use shares of a batch"),
        ("--sweep-capacity 0.1,x", "--sweep-capacity x: use shares"),
        ("--context 64", "--context 64: the model takes 32 at most"),
        ("--stride 33", "--stride 33 is above --context 32"),
        ("--model-overrides 5", "--model-overrides '5': use a Python dictionary"),
        ("--json no/x.json", "--json no/x.json: no folder no; make it first"),
        ("--sweep-capacity 1 --figure no/x.html", "--figure no/x.html: no folder no"),
        ("--sweep-capacity 1 --unit-losses x", "--unit-losses x: needs one capacity"),
        ("--unit-losses no/x.json", "--unit-losses no/x.json: no folder no"),
        ("--subset nothing", "no data-bin for --subset nothing"),
        ("--bootstrap 0", "--bootstrap 0: use 1 or more"),
    ],
)
def test_mistakes(trained, flags, words, capsys):
    data, checkpoint = trained
    line = f"evaluate {data} --path {checkpoint} --cpu {flags}"
    assert cli.main(line.split()) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--context 64", "--context 64: the model takes 32 at most"),
        ("--stride 33", "--stride 33 is above --context 32"),
        ("--context 8 --stride 9", "--stride 9 is above --context 8"),
        ("--context 9 --model-overrides {'max_target_positions':8}", "the model takes 8 at most"),
    ],
)
def test_the_context_is_checked_before_weights_are_read(trained, flags, words, capsys, monkeypatch):
    """A minute, and 29 GB, for a large one."""
    monkeypatch.setattr(evaluate_command, "load_model", None)
    data, checkpoint = trained
    assert cli.main(f"evaluate {data} --path {checkpoint} --cpu {flags}".split()) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("corpus", ["far", "near"])  # the first and the last
@pytest.mark.parametrize("command", ["evaluate {} --path {}", "inspect {1} --data {0} --page p"])
def test_a_missing_dictionary_is_a_copy_of_the_folders(trained, tmp_path, capsys, corpus, command):
    data = shutil.copytree(trained[0], tmp_path / "data")
    (data / corpus / "dict.txt").unlink()
    assert cli.main(command.format(data, trained[1]).split()) == 1
    assert capsys.readouterr().err == (
        f"error: {data}/{corpus}/dict.txt: missing; it must be a copy of {data}/dict.txt\n"
    )


def test_a_second_folder_has_the_dictionary_of_the_first(trained, tmp_path, capsys):
    data = shutil.copytree(trained[0], tmp_path / "data")
    more = shutil.copytree(data, tmp_path / "more")
    for file in more.rglob("dict.txt"):
        file.write_text(file.read_text() + "new 1\n")
    assert cli.main(f"evaluate {data} {more} --path {trained[1]}".split()) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {more}/dict.txt (") and f"differs from {data}/dict.txt (" in err


def test_dictionaries_are_compared_once(trained, monkeypatch):
    compared, check = [], data_bin.check_dictionaries
    monkeypatch.setattr(
        data_bin, "check_dictionaries", lambda *found: compared.append(found) or check(*found)
    )
    data, checkpoint = trained
    assert cli.main(f"evaluate {data} --path {checkpoint} --cpu --bootstrap 2".split()) == 0
    assert len(compared) == 1


def test_of_one_unit_there_is_no_interval(monkeypatch, tmp_path):
    nll = np.linspace(1, 3, 40)
    monkeypatch.setattr(perplexity, "score", lambda *_: perplexity.Scores(nll, (1e-6, 0.0), 1.0))
    none = np.zeros(1, dtype=np.int64)
    both = [
        texts.Text(name, tmp_path, True, torch.zeros(40, dtype=torch.long), units, None)
        for name, units in (("one", none[:1]), ("many", np.arange(0, 40, 4)))
    ]
    found = perplexity.evaluate(None, both, 2, 8, 8, 4, 100)
    assert found["sets"]["one"]["interval"] is None and found["mean"]["all"]["interval"] is None
    low, high = found["sets"]["many"]["interval"]
    assert found["sets"]["many"]["perplexity"] == pytest.approx(math.exp(2))
    assert low < math.exp(2) < high
    rows = evaluate_command.table(found)
    assert rows[1][3] == rows[-1][3] == "one unit, none" and " to " in rows[2][3]
    assert rows[1][5] == "< 0.01", "some were dropped"


def test_a_model_that_wants_bos_is_not_scored_without(trained, tmp_path):
    data, checkpoint = trained
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"]["task"]["add_bos_token"] = True
    torch.save(state, tmp_path / "bos.pt")
    with pytest.raises(UserError, match="bos.pt: trained with --add-bos-token"):
        load_model(tmp_path / "bos.pt", language_modeling_task(data, 32))


def test_a_model_without_an_output_projection_is_refused(trained, tmp_path, capsys):
    """By the commands that score tokens by it; fairseq-eval-lm does not."""
    flags = "--arch transformer_lm --criterion adaptive_loss --adaptive-softmax-cutoff 50,100"
    flags += " --task mixture_language_modeling --max-update 1 --disable-validation"
    flags += " --ddp-backend legacy_ddp"
    checkpoint = train_small(trained[0], tmp_path, flags)
    capsys.readouterr()
    inspect = f"inspect {trained[1]} --data {{}} --twin {{}} --page {tmp_path / 'page.html'}"
    for command in ("evaluate {} --path {}", inspect):
        assert cli.main(f"{command.format(trained[0], checkpoint)} --cpu".split()) == 1
        assert capsys.readouterr().err.endswith(
            f"{checkpoint}: a TransformerLanguageModel without an output projection (as with "
            "--adaptive-softmax-cutoff): evaluate it with fairseq-eval-lm\n"
        )
