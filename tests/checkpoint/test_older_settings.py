"""A checkpoint may have settings that this version lacks: it is opened all the same."""

import json
from pathlib import Path

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from training import USER_DIR, fairseq, prepare_text, train_small

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

TEXT = "the cat sat on the mat\nand saw a dog\n\n" * 20
OLD = json.loads((Path(__file__).parent / "settings_of_0.2.0.json").read_text())
GONE = {"model": {"max_tokens"}, "task": {"best_checkpoint_metric"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/; new.pt, as it is written today; old.pt, the same with the settings of 0.2.0, and in
    two shards of_two.pt; and other.pt, with a setting of no version in each group."""
    folder = tmp_path_factory.mktemp("old")
    flags = "--moe-freq 2 --moe-expert-count 2 --task mixture_language_modeling --max-update 5"
    path = train_small(prepare_text(folder, TEXT), folder / "run", flags)
    state = torch.load(path, weights_only=True)
    torch.save(state, folder / "new.pt")
    state["cfg"].update(json.loads(json.dumps(OLD)))
    state["cfg"]["task"]["data"] = str(folder / "data")
    torch.save(state, folder / "old.pt")
    for number, shard in enumerate(shards(state)):
        torch.save(shard, folder / f"of_two-shard{number}.pt")
    for group in OLD:
        state["cfg"][group][f"of_{group}"] = 3
    torch.save(state, folder / "other.pt")
    return folder


def shards(state):
    """What two processes with FSDP would write, whose flat tensor has the parameters in turn."""
    buffers = {"decoder.version"}
    names = [name for name in state["model"] if name not in buffers]
    tensors = [state["model"][name] for name in names]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    padding = len(flat) % 2
    for number, half in enumerate(torch.cat([flat, flat.new_zeros(padding)]).chunk(2)):
        parameter = {
            "names": names,
            "shapes": [tensor.shape for tensor in tensors],
            "numels": [tensor.numel() for tensor in tensors],
            "padding": padding * number,
        }
        module = {"fsdp_path": "", "params": {"flat": parameter}, "shared_param_info": []}
        module["no_broadcast_optim_state"] = False
        metadata = {"param_metadata": [module], "buffer_names": sorted(buffers)}
        model = {"flat": half.clone(), **{name: state["model"][name] for name in buffers}}
        yield {**state, "model": model, "fsdp_metadata": metadata}


def load(path, **overrides):
    return MoETransformerLanguageModel.from_pretrained(
        str(path.parent), path.name, str(path.parent / "data"), **overrides
    )


def logged(caplog, line):
    """The last line that a command of fairseq logs, which has its numbers."""
    caplog.clear()
    with caplog.at_level("INFO"):
        fairseq(f"{line} --user-dir {USER_DIR} --cpu --batch-size 4 --num-workers 0")
    return caplog.messages[-1]


def test_the_settings_are_some_that_are_gone():
    """Or what follows would show nothing."""
    kinds = {
        "model": getattr(ARCH_MODEL_REGISTRY[OLD["model"]["_name"]], "__dataclass"),
        "task": TASK_DATACLASS_REGISTRY[OLD["task"]["_name"]],
    }
    for group, kind in kinds.items():
        assert OLD[group].keys() - kind.__dataclass_fields__.keys() == GONE[group]


def test_from_python(folder, caplog):
    new, old = (load(folder / name).score("the cat sat") for name in ("new.pt", "old.pt"))
    assert torch.equal(new["positional_scores"], old["positional_scores"])
    assert "it is ignored" not in caplog.text  # other groups have the same


def test_validation(folder, caplog):
    new, old = (
        logged(
            caplog,
            f"fairseq-validate {folder / 'data'} --task mixture_language_modeling "
            f"--path {folder / name}",
        )
        for name in ("new.pt", "old.pt")
    )
    assert "a_ppl" in new and new == old


def test_evaluation(folder, caplog):
    line = f"fairseq-eval-lm {folder / 'data' / 'a'} --tokens-per-sample 32 --path {folder}"
    new, old = (logged(caplog, f"{line}/{name}") for name in ("new.pt", "old.pt"))
    assert "Perplexity" in new and new == old


def test_shards(folder, capsys):
    line = f"fairseq-generate {folder / 'data' / 'a'} --task language_modeling --cpu --beam 1"
    line += f" --user-dir {USER_DIR} --tokens-per-sample 32 --batch-size 4 --max-len-b 4"
    found = []
    for name in ("new.pt", "of_two.pt --checkpoint-shard-count 2"):
        fairseq(f"{line} --num-workers 0 --path {folder}/{name}")
        found.append([row for row in capsys.readouterr().out.splitlines() if row[:2] == "H-"])
    assert found[0] and found[0] == found[1]


def test_generation(folder, capsys):
    words = ["the cat", "--cpu", "--max-tokens", "4"]
    texts = []
    for name in ("new.pt", "old.pt"):
        data = ["--data", str(folder / "data")]
        assert cli.main(["generate", str(folder / name), *words, *data]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the cat")


def test_what_nothing_else_says_is_told(folder, caplog):
    line = f"fairseq-validate {folder / 'data'} --task mixture_language_modeling --path {folder}"
    assert "a_ppl" in logged(caplog, f"{line}/other.pt")
    told = [message for message in caplog.messages if "it is ignored" in message]
    assert len(told) == len(OLD)
    for group, message in zip(sorted(OLD), sorted(told)):
        assert f"other.pt: its setting {group}.of_{group} is 3, which" in message


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("of_model", "; did you mean model?"),  # which the file has
        ("dropuot", "; did you mean dropout?"),
        ("xyz", "; docs/flags.md lists the model's"),
    ],
)
def test_what_a_user_asks_for_is_still_refused(folder, name, remedy):
    """In words that suit Python, too."""
    with pytest.raises(UserError) as error:
        load(folder / "other.pt", **{name: 2})
    said = f"override '{name}': the model and fairseq have no such setting{remedy}"
    assert str(error.value) == said
