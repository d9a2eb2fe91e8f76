"""Dense and MoE models through fairseq's own commands, as a user types them."""

import re

import pytest
import torch
from command_runs import EVAL, MODEL, MOE, TRAIN, USER_DIR
from training import error_in

from fairseq_moe_ext.models import compiled
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel


def losses(log):
    return [float(x) for x in re.findall(r'"inner_loss": "([\d.]+)"', log)]


PRECISIONS = ["--fp16", "--memory-efficient-fp16", "--bf16", "--memory-efficient-bf16"]


@pytest.mark.parametrize("options", ["", "--checkpoint-activations", *PRECISIONS])
@pytest.mark.parametrize("arch", ["--arch dense_lm_tiny", MOE])
def test_training_learns(command, data, tmp_path, arch, options):
    line = f"{data} {TRAIN} {arch} {options} --dropout 0 --attention-dropout 0"
    status, log, _, _ = command("train", f"{line} --save-dir {tmp_path}")
    assert status == 0
    trained = losses(log)
    assert trained[4] < trained[0] - 0.1  # six updates, then validation
    assert (tmp_path / "checkpoint_best.pt").exists()


@pytest.mark.parametrize("options", ["--moe-top1-expert", "--moe-dropless --moe-freq 1"])
def test_branch_flags_train(command, data, tmp_path, options):
    flags = "--moe-gating-use-fp32 --moe-second-expert-policy random --use-moe-pad-mask"
    flags += " --moe-normalize-gate-prob-before-dropping --moe-eval-capacity-token-fraction -1"
    flags += " --moe-normalize-expert-grad sqrt_world_size --moe-expert-ffn-dim 24"
    status, log, _, _ = command(
        "train", f"{data} {TRAIN} {MOE} {flags} {options} --save-dir {tmp_path}"
    )
    assert status == 0
    assert len(losses(log)) >= 6


def test_sentences_that_begin_with_bos(command, data, tmp_path):
    line = f"{data} {TRAIN} {MOE} --add-bos-token --save-dir {tmp_path}"
    assert command("train", line)[0] == 0
    line = f"{data} {EVAL} --add-bos-token --path {tmp_path / 'checkpoint_last.pt'}"
    status, log, _, _ = command("eval_lm", line)
    assert status == 0 and "Evaluated 107 tokens" in log  # 100, and <s> in 7 blocks
    line = f"{data} {TRAIN} --arch dense_lm_tiny --add-bos-token --save-dir {tmp_path / 'no'}"
    status, _, _, err = command("train", f"{line} --decoder-learned-pos")
    assert status == 1 and "--max-target-positions 16" in err and "Traceback" not in err
    assert not list(tmp_path.glob("no/*"))
    flags = "--decoder-learned-pos --max-target-positions 17"
    assert command("train", f"{line} {flags}")[0] == 0


def test_a_resumed_run_equals_an_uninterrupted_one(command, data, tmp_path):
    line = f"{data} {TRAIN} {MOE} --save-interval-updates 3"
    _, whole, _, _ = command("train", f"{line} --save-dir {tmp_path / 'whole'}")
    command("train", f"{line} --save-dir {tmp_path / 'parts'} --max-update 3")
    _, rest, _, _ = command("train", f"{line} --save-dir {tmp_path / 'parts'}")
    states = [
        torch.load(tmp_path / run / "checkpoint_last.pt", weights_only=True)["model"]
        for run in ("whole", "parts")
    ]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_run_equals_a_plain_one(command, data, tmp_path):
    found = {}
    for name, flag in (("plain", ""), ("compiled", "--compile")):
        line = f"{data} {TRAIN} {MOE} {flag} --max-update 3 --save-dir {tmp_path / name}"
        status, log, _, err = command("train", line)
        assert status == 0, err
        path = tmp_path / name / "checkpoint_last.pt"
        status, evaluated, _, err = command("eval_lm", f"{data} {EVAL} --path {path}")
        assert status == 0, err
        found[name] = [*losses(log), float(re.search(r"Perplexity: ([\d.]+)", evaluated).group(1))]
    assert len(found["plain"]) == 4
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-3)
    go_on = f"{data} {TRAIN} {MOE} --save-dir {tmp_path / 'compiled'} --max-update 5"
    status, log, _, _ = command("train", go_on)
    assert status == 0 and '"num_updates": "5"' in log


def test_compiling_without_a_compiler_ends_in_one_line(command, data, tmp_path):
    from torch._inductor import config

    torch._dynamo.reset()
    compiled.check.cache_clear()
    line = f"{data} {TRAIN} {MOE} --compile --save-dir {tmp_path / 'new'}"
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        status, _, _, err = command("train", line)
    assert status == 1 and "error: --compile: torch.compile does not work" in error_in(err)
    assert not list(tmp_path.glob("new/*.pt"))


def test_perplexity_of_eval_lm_is_that_of_validation(command, data, tmp_path):
    _, log, _, _ = command("train", f"{data} {TRAIN} {MOE} --moe-dropless --save-dir {tmp_path}")
    validated = float(re.findall(r'"valid_ppl": "([\d.]+)"', log)[-1])
    _, log, _, _ = command("eval_lm", f"{data} {EVAL} --path {tmp_path / 'checkpoint_last.pt'}")
    evaluated = float(re.search(r"Perplexity: ([\d.]+)", log).group(1))
    assert evaluated == pytest.approx(validated, rel=2e-3)


def test_capacity_at_evaluation_can_be_overridden(command, data, trained, tmp_path):
    def perplexity(path, fraction):
        overrides = f"{{'moe_eval_capacity_token_fraction':{fraction},'world_size':1}}"
        line = f"{data} {EVAL} --path {path} --model-overrides {overrides}"
        status, log, _, _ = command("eval_lm", line)
        assert status == 0
        return float(re.search(r"Perplexity: ([\d.]+)", log).group(1))

    best = trained / "checkpoint_best.pt"
    least = perplexity(best, 0.02)
    assert least != perplexity(best, 1.0)
    older = torch.load(best, weights_only=False)
    del older["cfg"]["model"]["moe_eval_capacity_token_fraction"]
    torch.save(older, tmp_path / "older.pt")
    assert perplexity(tmp_path / "older.pt", 0.02) == least


def test_generate_and_interactive(command, data, trained, monkeypatch, tmp_path):
    line = f"{data} --user-dir {USER_DIR} --task language_modeling --cpu --beam 2 --max-len-b 12"
    line += f" --path {trained / 'checkpoint_best.pt'} --tokens-per-sample 16"
    line += " --sample-break-mode eos"  # stock's search fails on a prompt with </s> inside
    status, _, out, _ = command("generate", f"{line} --gen-subset valid --batch-size 4")
    assert status == 0
    assert len(re.findall(r"^H-\d+\t-?[\d.]+\t", out, flags=re.M)) == 10
    (tmp_path / "input").write_text("w1 w2 w3\nw4\n")
    status, _, out, _ = command("interactive", f"{line} --input {tmp_path / 'input'}")
    assert status == 0
    assert re.search(r"^H-0\t-?[\d.]+\tw1 w2 w3", out, flags=re.M)
    assert re.search(r"^H-1\t-?[\d.]+\tw4", out, flags=re.M)


def test_from_pretrained_scores_and_samples(data, trained):
    lm = MoETransformerLanguageModel.from_pretrained(
        str(trained), "checkpoint_best.pt", str(data)
    ).eval()
    alone = lm.score("w1 w2 w3")["positional_scores"]
    together = lm.score(["w7", "w1 w2 w3", "w5 w6 w7 w8 w9"])[1]["positional_scores"]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    model = lm.models[0]
    tokens = lm.encode("w1 w2 w3")[None]
    inputs = torch.cat([tokens[:, -1:], tokens[:, :-1]], dim=1)  # </s> first
    lprobs = model.get_normalized_probs(model(inputs), log_probs=True)[0]
    expected = lprobs.gather(1, tokens[0, :, None])[:, 0]
    torch.testing.assert_close(alone, expected[: len(alone)], rtol=1e-4, atol=1e-5)
    assert lm.sample("w1 w2", beam=1, max_len_b=6).startswith("w1 w2")


def damaged(data, folder, **changes):
    """A copy of the data-bin with some files replaced; None removes a file."""
    for file in data.iterdir():
        content = changes.get(file.name.replace(".", "_"), file.read_bytes())
        if content is not None:
            (folder / file.name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "options, words",
    [
        (f"{MOE} --moe-expert-count 0", "--moe-expert-count 0"),
        (f"{MOE} --moe-gate-loss-wt -1", "--moe-gate-loss-wt -1"),
        ("--arch dense_lm_tiny --moe-expert-count 4", "with --moe-freq 0"),
    ],
)
def test_bad_flags_end_in_one_line(command, data, tmp_path, options, words):
    status, _, _, err = command("train", f"{data} {TRAIN} {options} --save-dir {tmp_path / 'new'}")
    assert status == 1 and words in error_in(err)
    assert not list(tmp_path.glob("new/*.pt"))


def test_a_misspelt_policy_names_the_choices(command, data, tmp_path):
    line = f"{data} {TRAIN} {MOE} --moe-second-expert-policy smapling --save-dir {tmp_path}"
    status, _, _, err = command("train", line)
    errors = [line for line in err.splitlines() if line]
    assert status == 2
    assert len(errors) == 1 and errors[0].startswith("error: argument --moe-second-expert-policy")
    assert "invalid choice: 'smapling'" in errors[0] and "random" in errors[0]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("{'moe_eval_capacity_fraction':1.0}", "did you mean moe_eval_capacity_token_fraction?"),
        ("{'moe_second_expert_policy':'smapling'}", "--moe-second-expert-policy smapling"),
        ("{'use_moe_pad_maks':True}", "did you mean use_moe_pad_mask?"),
        ("{'world_size':1,'pad_to_fixed_lenght':1}", "did you mean pad_to_fixed_length?"),
        ("{'max_target_position':8}", "did you mean max_target_positions?"),
    ],
)
def test_misspelt_overrides_end_in_one_line(command, data, trained, overrides, words):
    line = f"{data} {EVAL} --path {trained / 'checkpoint_best.pt'} --model-overrides {overrides}"
    status, _, _, err = command("eval_lm", line)
    assert status == 1 and words in error_in(err)


@pytest.mark.parametrize("name", ["eval_lm", "interactive"])
def test_nan_in_a_gate_ends_evaluation(command, data, trained, tmp_path, monkeypatch, name):
    state = torch.load(trained / "checkpoint_best.pt", weights_only=False)
    state["model"]["decoder.layers.1.moe_layer.gate.wg.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    (tmp_path / "in.txt").write_text("w1 w2\n")
    line = f"{data} {EVAL} --path {tmp_path / 'nan.pt'}"
    if name == "interactive":
        line = f"{data} --user-dir {USER_DIR} --task language_modeling --cpu --path "
        line += f"{tmp_path / 'nan.pt'} --input {tmp_path / 'in.txt'} --max-len-b 9"
    status, _, _, err = command(name, line)
    which = "the router of layer 1 (from 0)" if name == "eval_lm" else "the model"
    assert status == 1 and f"{which} yields NaN" in error_in(err)


def test_damaged_data_ends_in_one_line(command, data, tmp_path):
    short = b"".join((data / "dict.txt").read_bytes().splitlines(keepends=True)[:3])
    cases = {
        "short": (dict(dict_txt=short), "use the dict.txt that the data-bin was built with"),
        "missing": (dict(train_bin=None, train_idx=None), "train.idx: no such data-bin"),
        "half": (dict(train_bin=None), "train.bin: missing"),
        "cut": (dict(train_bin=(data / "train.bin").read_bytes()[:-6]), "truncated"),
        "no_dict": (dict(dict_txt=None), "dict.txt"),
    }
    for name, (changes, words) in cases.items():
        (tmp_path / name).mkdir()
        folder = damaged(data, tmp_path / name, **changes)
        status, _, _, err = command(
            "train", f"{folder} {TRAIN} {MOE} --save-dir {tmp_path / 'new'}"
        )
        assert status == 1 and words in error_in(err)
        assert not list(tmp_path.glob("new/*.pt"))


def test_checkpoints_that_do_not_fit_end_in_one_line(command, data, trained, tmp_path):
    longer = (data / "dict.txt").read_bytes() + b"more 1\n"
    folder = tmp_path / "data"
    folder.mkdir()
    damaged(data, folder, dict_txt=longer)
    saved = (trained / "checkpoint_last.pt").read_bytes()
    run = tmp_path / "run"
    last = run / "checkpoint_last.pt"
    resume = f"{TRAIN} {MOE} --save-dir {run}"
    other = f"{data} {TRAIN} {MOE} --save-dir {tmp_path}/new --decoder-layers 4"
    cases = [
        ("train", f"{folder} {resume}", f"{last}: has a vocabulary of 24, but {folder}/dict.txt o"),
        ("train", f"{data} {resume} --moe-expert-count 4", "8 x 16 in the checkpoint"),
        ("train", f"{data} {resume} --decoder-layers 4", f"{last} (--save-dir): does not fit"),
        ("train", f"{other} --restore-file {last}", f"{last} (--restore-file): does not fit"),
        ("train", f"{other} --finetune-from-model {last}", f"{last} (--finetune-from-model): doe"),
        ("train", f"{other} --continue-once {last}", f"{last} (--continue-once): does not fit"),
        (
            *("eval_lm", f"{data} {EVAL} --path {last} --model-overrides {{'moe_expert_count':4}}"),
            f"{last}: does not fit the model: ",
        ),
        (
            "eval_lm",
            f"{folder} {EVAL} --path {tmp_path}/run/checkpoint_last.pt",
            "vocabulary of 24",
        ),
    ]
    for name, line, words in cases:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "checkpoint_last.pt").write_bytes(saved)
        status, _, _, err = command(name, line)
        assert status == 1 and words in error_in(err)
        assert (tmp_path / "run" / "checkpoint_last.pt").read_bytes() == saved  # nothing lost


def test_a_dense_checkpoint_is_no_start_of_a_sparse_model(command, data, tmp_path):
    dense = f"{data} {TRAIN} --arch dense_lm_tiny --save-dir {tmp_path}/dense --max-update 1"
    assert command("train", dense)[0] == 0
    last = tmp_path / "dense" / "checkpoint_last.pt"
    line = f"{data} {TRAIN} {MOE} --save-dir {tmp_path}/new --finetune-from-model {last}"
    status, _, _, err = command("train", line)
    assert status == 1 and "(--finetune-from-model): does not fit" in error_in(err)
    assert "or make a sparse model of it with `fairseq-moe convert --upcycle`" in error_in(err)


def test_dense_checkpoint_of_stock_finetunes_as_ours(command, data, tmp_path):
    shape = MODEL.replace("--decoder-ffn", "--share-decoder-input-output-embed --decoder-ffn")
    stock = TRAIN.replace("moe_cross_entropy", "cross_entropy").replace("inner_loss", "loss")
    stock = stock.replace(MODEL, shape) + " --arch transformer_lm_gpt2_tiny --dropout 0"
    status, _, _, _ = command("train", f"{data} {stock} --save-dir {tmp_path / 'stock'}")
    assert status == 0
    line = f"{data} {TRAIN} --arch dense_lm_tiny --finetune-from-model"
    line += f" {tmp_path / 'stock' / 'checkpoint_best.pt'} --lr 0 --max-update 1"
    _, log, _, _ = command("train", f"{line} --save-dir {tmp_path / 'ours'}")
    ours = float(re.findall(r'"valid_ppl": "([\d.]+)"', log)[-1])
    _, log, _, _ = command(
        "eval_lm", f"{data} {EVAL} --path {tmp_path / 'stock' / 'checkpoint_best.pt'}"
    )
    assert ours == pytest.approx(float(re.search(r"Perplexity: ([\d.]+)", log).group(1)), rel=2e-3)
