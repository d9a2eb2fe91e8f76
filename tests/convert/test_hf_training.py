"""The loss of training with transformers, against that of our criterion."""

import json

import pytest
import torch
from converting import convert, load
from hf_models import ours, theirs
from training import train_small

from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion

pytest.importorskip("transformers", reason="pip install transformers")


@pytest.fixture(scope="module")
def sparse(hf_data, tmp_path_factory):
    """A checkpoint with two sparse layers."""
    flags = "--task mixture_language_modeling --dropout 0 --max-update 2 --moe-freq 1"
    flags += " --moe-expert-count 4 --moe-gate-loss-wt 0.25"
    return train_small(hf_data, tmp_path_factory.mktemp("training"), flags)


@pytest.fixture
def exported(sparse, tmp_path, capsys):
    """Settings of the criterion and the model -> the checkpoint, the folder, what convert said."""

    def make(criterion, **model):
        state = load(sparse)
        state["cfg"]["criterion"].update(criterion)
        state["cfg"]["model"].update(model)
        torch.save(state, tmp_path / "x.pt")
        capsys.readouterr()
        convert(tmp_path / "x.pt", tmp_path / "hf", "--to", "hf", "--no-tokenizer")
        return tmp_path / "x.pt", tmp_path / "hf", capsys.readouterr().out

    return make


@pytest.mark.parametrize("combine", ["average", "sum"])
def test_the_balancing_loss_weighs_as_in_our_training(exported, combine):
    path, folder, out = exported({"moe_gate_loss_combine_method": combine})
    tokens = torch.randint(4, 200, (2, 8), generator=torch.Generator().manual_seed(1))
    model = theirs(folder)
    plain = model(tokens, labels=tokens).loss
    found = model.train()(tokens, labels=tokens).loss - plain
    lm = ours(path)
    criterion = MoECrossEntropyCriterion(lm.task, 0.25, combine, "none", 0.0, False, False)
    sample = {"net_input": {"src_tokens": tokens}, "target": tokens, "ntokens": 16}
    loss, size, logged = criterion(lm.models[0], sample)
    torch.testing.assert_close(found, (loss - logged["inner_loss"]) / size, rtol=1e-4, atol=1e-5)
    assert found > (0.4 if combine == "sum" else 0.2) and "leaves out" not in out


def test_the_gate_of_random_is_not_trained(exported):
    path, folder, _ = exported({}, moe_router="random")
    model = theirs(folder).train()
    gates = {name: value for name, value in model.state_dict().items() if ".gate." in name}
    before = {name: value.clone() for name, value in gates.items()}
    assert len(before) == 2
    tokens = torch.randint(4, 200, (2, 8), generator=torch.Generator().manual_seed(1))
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], value) for name, value in gates.items())
    saved = load(path)["model"]
    assert all(torch.equal(value, saved[f"decoder.{name[6:]}"]) for name, value in before.items())


@pytest.mark.parametrize(
    "criterion, model, words, weight",
    [
        ({"moe_z_loss_wt": 0.001}, {}, "leaves out the z-loss (--moe-z-loss-wt 0.001)", 0.25),
        (
            {"moe_gate_loss_transform": "neg_log"},
            {},
            "leaves out the balancing loss (--moe-gate-loss-transform neg_log)",
            0.0,
        ),
        ({"moe_gate_loss_transform": "neg_log"}, {"moe_balance": "none"}, "", 0.0),
        ({}, {"moe_router": "random"}, "", 0.0),
        ({"moe_gate_loss_transform": "neg_log"}, {"moe_router": "random"}, "", 0.0),
    ],
)
def test_losses_that_transformers_lack_are_named(exported, criterion, model, words, weight):
    _, folder, out = exported(criterion, **model)
    assert words in out and ("leaves out" in out) == bool(words)
    assert json.loads((folder / "config.json").read_text())["router_aux_loss_coef"] == weight


def test_the_loss_of_relu_is_named(converted, tmp_path, capsys):
    convert(converted("relu")[0], tmp_path / "hf", "--to", "hf", "--no-tokenizer")
    assert "leaves out the L1 loss of --moe-router relu" in capsys.readouterr().out
