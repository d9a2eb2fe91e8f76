"""A checkpoint without code that asks for some: nothing of it runs, whoever opens the file."""

import ast
import importlib
from argparse import Namespace
from pathlib import Path

import fairseq
import pytest
import torch
from command_runs import EVAL, MOE, TRAIN, USER_DIR

from fairseq_moe_ext.cli import main
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.literals import literal
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel
from fairseq_moe_ext.patches.data import EVALUATING


@pytest.fixture
def marker(tmp_path):
    """What the payloads would write."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def payload(marker):
    return f"[__import__('pathlib').Path({str(marker)!r}).touch(), (1, 1)][1:]"


# Architectures of stock fairseq that evaluate a setting, and the setting.
EVALUATED = [
    ("transformer_lm", "adaptive_input_cutoff", {"adaptive_input": True}),
    ("transformer_lm_gpt", "adaptive_input_cutoff", {"adaptive_input": True}),
    ("transformer_lm", "character_filters", {"character_embeddings": True}),
    ("transformer_lm", "adaptive_softmax_cutoff", {}),
    ("transformer_lm", "decoder_xformers_att_config", {}),
    ("fconv_lm", "decoder_layers", {}),
    ("fconv_lm", "decoder_attention", {}),
    ("fconv_lm", "adaptive_softmax_cutoff", {"criterion": "adaptive_loss"}),
    ("lightconv_lm", "adaptive_input_cutoff", {"adaptive_input": True}),
    ("lightconv_lm", "character_filters", {"character_embeddings": True}),
    ("lstm_lm", "adaptive_softmax_cutoff", {"criterion": "adaptive_loss"}),
    ("fconv", "encoder_layers", {}),
    ("fconv_self_att", "pretrained", {}),
    ("lstm", "decoder_attention", {}),
    ("lightconv", "adaptive_softmax_cutoff", {}),
    ("wav2vec2", "conv_feature_layers", {}),
    ("wav2vec", "conv_feature_layers", {}),
    ("hubert", "conv_feature_layers", {}),
    ("s2t_wav2vec", "conv_feature_layers", {}),
]
OUT_OF_MODEL = [
    ("task", "data", "https://example.com/data"),
    ("task", "_name", "audio_pretraining"),
    ("task", "tokens_per_sample", "PAYLOAD"),
    ("criterion", "_name", "ctc"),
    ("criterion", "_name", "PAYLOAD"),
    ("optimizer", "adam_eps", "PAYLOAD"),
    ("common", "seed", "PAYLOAD"),
    ("common", "user_dir", "${oc.env:HOME}"),
    ("common", "user_dir", "${${model.a}:HOME}"),  # with model.a = "oc.env"
    ("common", "user_dir", "x${"),
    ("model", "decoder_layers", "PAYLOAD"),
    ("model", "decoder_layers", [2]),
    ("model", "dropout", {"a": 1}),
    ("bpe", "gpt2_encoder_json", "https://example.com/encoder.json"),
]


def entries(command, trained, data, capsys):
    """Name -> what opens a file and returns (status, lines beginning with error)."""

    def fairseq_command(name, line):
        def run(path):
            try:
                status, log, out, err = command(name, line.format(data=data, path=path))
            except UserError as error:  # fairseq-generate leaves it to the excepthook of scripts
                return 1, f"error: {error}\n"
            return status, err

        return run

    def own_command(*line):
        def run(path):
            status = main([str(word).format(data=data, path=path) for word in line])
            return status, capsys.readouterr().err

        return run

    def from_pretrained(path):
        try:
            MoETransformerLanguageModel.from_pretrained(
                str(path.parent), path.name, str(data), bpe=None
            )
        except UserError as error:
            return 1, f"error: {error}\n"
        return 0, ""

    train = f"{{data}} {TRAIN} {MOE} --save-dir {trained}/again --no-save --max-update 9"
    return {
        "eval_lm": fairseq_command("eval_lm", f"{{data}} {EVAL} --path {{path}}"),
        "generate": fairseq_command(
            "generate",
            f"{{data}} --user-dir {USER_DIR} --task language_modeling --path {{path}} --cpu "
            "--gen-subset valid --tokens-per-sample 16 --batch-size 4 --sample-break-mode eos",
        ),
        "validate": fairseq_command(
            "validate",
            f"{{data}} --user-dir {USER_DIR} --task language_modeling --path {{path}} --cpu "
            "--batch-size 4",
        ),
        "evaluate": own_command("evaluate", "{data}", "--subset", "valid", "--path", "{path}"),
        "cost": own_command("cost", "--path", "{path}"),
        "convert": own_command("convert", "{path}", "{path}.pt", "--overwrite"),
        "from_pretrained": from_pretrained,
        "restore": fairseq_command("train", f"{train} --restore-file {{path}}"),
        "finetune": fairseq_command("train", f"{train} --finetune-from-model {{path}}"),
    }


def write(trained, path, change):
    state = torch.load(trained / "checkpoint_last.pt", weights_only=False)
    change(state)
    torch.save(state, path)
    return path


@pytest.fixture
def opened(command, trained, data, capsys, tmp_path):
    """Write a checkpoint with a change and open it."""
    runs = entries(command, trained, data, capsys)

    def run(entry, change):
        return runs[entry](write(trained, tmp_path / "x.pt", change))

    return run


def as_args(state):
    flat = {}
    for group in state["cfg"].values():
        flat.update(group if isinstance(group, dict) else {})
    for group in ("task", "criterion", "optimizer", "lr_scheduler"):
        flat[group] = (state["cfg"][group] or {}).get("_name")
    flat["arch"] = state["cfg"]["model"]["_name"]
    del flat["_name"]
    state["args"], state["cfg"] = Namespace(**flat), None


def of_architecture(name, settings, flat):
    def change(state):
        state["cfg"]["model"] = {**state["cfg"]["model"], **settings, "_name": name}
        if "criterion" in settings:
            state["cfg"]["criterion"] = {"_name": settings["criterion"]}
        if flat:
            as_args(state)

    return change


BUILDING = ["eval_lm", "generate", "validate", "from_pretrained", "convert", "evaluate", "cost"]


@pytest.mark.parametrize("flat", [False, True], ids=["cfg", "args"])
def test_the_file_itself_is_opened(opened, flat):
    """Or what follows would show nothing."""
    for entry in [*BUILDING, "restore", "finetune"]:
        status, err = opened(entry, as_args if flat else lambda state: None)
        assert status == 0, (entry, err)


def is_refused(status, err):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    return status == 1 and len(lines) == 1 and err.splitlines()[-1:] == lines


@pytest.mark.parametrize("flat", [False, True], ids=["cfg", "args"])
@pytest.mark.parametrize(("arch", "setting", "others"), EVALUATED)
def test_no_evaluated_setting_runs(arch, setting, others, flat, opened, marker):
    change = of_architecture(arch, {**others, setting: payload(marker)}, flat)
    assert is_refused(*opened("eval_lm", change))


@pytest.mark.parametrize("entry", [*BUILDING, "restore", "finetune"])
def test_no_entry_runs_a_setting(entry, opened, marker):
    settings = {"adaptive_input": True, "adaptive_input_cutoff": payload(marker)}
    assert is_refused(*opened(entry, of_architecture("transformer_lm", settings, False)))
    of_fconv = of_architecture("fconv_lm", {"decoder_layers": payload(marker)}, True)
    status, err = opened(entry, of_fconv)
    assert is_refused(status, err) or (entry in ("restore", "finetune") and status == 0)


@pytest.mark.parametrize("entry", ["eval_lm", "evaluate"])
def test_a_file_without_settings_is_named(entry, opened):
    status, err = opened(entry, lambda state: state.pop("cfg"))
    assert is_refused(status, err) and "name no architecture; use another checkpoint" in err


@pytest.mark.parametrize("entry", ["validate", "from_pretrained"])
@pytest.mark.parametrize(("group", "name", "value"), OUT_OF_MODEL)
def test_settings_of_any_group_are_checked(entry, group, name, value, opened, marker):
    def change(state):
        wanted = payload(marker) if value == "PAYLOAD" else value
        if group == "bpe":
            state["cfg"]["bpe"] = {"_name": "gpt2"}
        state["cfg"][group][name] = wanted

    status, err = opened(entry, change)
    assert is_refused(status, err)
    assert "x.pt: " in err


@pytest.mark.parametrize("value", ["model: {}", ["a"], {"model": "x"}, {"model": None}, {1: {}}])
def test_settings_that_are_none(value, opened):
    assert is_refused(*opened("eval_lm", lambda state: state.update(cfg=value)))


def test_a_folder_with_code_that_a_file_names_is_not_imported(opened, marker, tmp_path):
    code = tmp_path / "plugin_of_the_file"
    code.mkdir()
    (code / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    for entry in BUILDING:
        opened(entry, lambda state: state["cfg"]["common"].update(user_dir=str(code)))


def test_an_architecture_of_the_user_s_own_code_is_built(opened, monkeypatch):
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY

    ours = ARCH_MODEL_REGISTRY["moe_lm_tiny"]
    own = type("Own", (ours,), {"__module__": "somebody.model"})
    for registry, value in (
        (ARCH_MODEL_REGISTRY, own),
        (MODEL_DATACLASS_REGISTRY, getattr(ours, "__dataclass")),
    ):
        monkeypatch.setitem(registry, "own_lm", value)
    assert opened("eval_lm", of_architecture("own_lm", {}, False))[0] == 0


def calls_of_eval(path):
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("eval", "exec")]


def test_every_eval_of_fairseq_reads_values_only():
    """Also in stock's own architectures, which need no plugin."""
    folder = Path(fairseq.__file__).parent
    found = set()
    for path in folder.rglob("*.py"):
        name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        if not name.startswith("fairseq.examples.") and calls_of_eval(path):
            found.add(name)
    assert found == set(EVALUATING)
    assert all(importlib.import_module(name).eval is literal for name in found)


@pytest.mark.parametrize(
    "text",
    ["[(512, 3)] * 4", "[(512, 5)] + [(128, 1, 0), (128, 5, 0)] * 3", "0.5, 1e-3", "{'a': (1,)}",
     "True", "None", "-3", "'text'", "1/3", "2**-10", " (0.9, 0.98) "],
)  # fmt: skip
def test_values_mean_what_python_says(text):
    assert literal(text) == eval(text.strip())


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "(lambda: 1)()", "[x for x in (1,)]", "os", "a.b", "f'{1}'", "[1][0]",
     "1 if 1 else 2", "[0] * 10**9", "'a' * 10**9", "9**9**9", "((9**999)**999)**999", "1/0",
     "'%1000000000d' % 1", "(" * 5000, "[" * 5000 + "]" * 5000, "1 +", "", "{**{}}", "1 " * 10000,
     "\0"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match="nothing in it was run"):
        literal(text)


def test_a_translation_model_is_refused_by_name_with_the_plugin(opened):
    status, err = opened("eval_lm", of_architecture("transformer", {}, False))
    assert is_refused(status, err) and "run without --user-dir" in err
