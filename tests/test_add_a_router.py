"""examples/add_a_router as a user runs it: trained, evaluated, on two processes, by Hydra."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import error_in, make_data

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "examples" / "add_a_router"
BIN = Path(sys.executable).parent
KEY = "decoder.layers.1.moe_layer.gate.log_temperature"
MODEL = f"--user-dir {PLUGIN} --task language_modeling --arch moe_lm_tiny --moe-router cosine"
MODEL += " --moe-top-k 3 --moe-expert-count 4 --moe-routing-scope world --decoder-layers 2"
MODEL += " --decoder-embed-dim 8 --decoder-ffn-embed-dim 12 --decoder-attention-heads 2"
TRAIN = f"{MODEL} --criterion moe_cross_entropy --optimizer adam --lr 0.01 --dropout 0"
TRAIN += " --attention-dropout 0 --tokens-per-sample 8 --num-workers 0 --no-progress-bar --cpu"
TRAIN += " --required-batch-size-multiple 1 --curriculum 9"
EVALUATE = f"--user-dir {PLUGIN} --task language_modeling --tokens-per-sample 8 --cpu"
EVALUATE += " --model-overrides {'moe_eval_capacity_token_fraction':1.0}"
EVALUATE += " --batch-size 8 --gen-subset valid --num-workers 0 --no-progress-bar"
TORCHRUN = "torchrun --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
SHRUNKEN = [
    *("model.decoder_layers=2", "model.decoder_embed_dim=16", "model.decoder_ffn_embed_dim=32"),
    *("model.decoder_attention_heads=2", "task.tokens_per_sample=8", "dataset.batch_size=2"),
    *("common.cpu=true", "dataset.num_workers=0", "optimization.max_update=2"),
]


def run(folder, line):
    script, *arguments = line.split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(BIN / script), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def perplexity(text):
    return float(re.search(r"Perplexity: ([\d.]+)", text)[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a data-bin and a run of three updates on one process."""
    folder = tmp_path_factory.mktemp("router")
    (folder / "data").mkdir()
    make_data(folder / "data")
    text = run(folder, f"fairseq-train data {TRAIN} --batch-size 8 --max-update 3 --save-dir one")
    assert re.search(r"load_max [\d.]+", text) or '"train_load_max"' in text
    return folder


def test_its_own_parameter_is_trained_and_saved(trained):
    model = torch.load(trained / "one" / "checkpoint_last.pt", weights_only=True)["model"]
    assert float(model[KEY].exp()) != pytest.approx(0.07, abs=1e-6)


def test_two_processes_go_on_and_write_what_one_reads(trained):
    train = f"{BIN / 'fairseq-train'} data {TRAIN} --batch-size 4 --ddp-backend legacy_ddp"
    train += " --distributed-backend gloo --max-update 5"
    path = trained / "one" / "checkpoint_last.pt"
    text = run(trained, f"{TORCHRUN} {train} --restore-file {path} --save-dir two")
    assert "@ 3 updates" in text and len(list((trained / "two" / "experts").iterdir())) == 2
    one = run(trained, f"fairseq-eval-lm data {EVALUATE} --path two/checkpoint_last.pt")
    two = run(
        trained,
        f"{TORCHRUN} {BIN / 'fairseq-eval-lm'} data {EVALUATE} --path two/checkpoint_last.pt "
        "--distributed-backend gloo --distributed-world-size 2",
    )
    assert perplexity(one) == pytest.approx(perplexity(two), abs=0.011)
    assert perplexity(one) < 40  # of 24 entries


def test_a_hydra_override_takes_it(trained):
    overrides = [f"task.data={trained / 'data'}", f"common.user_dir={PLUGIN}", *SHRUNKEN]
    line = f"fairseq-hydra-train --config-dir {ROOT / 'hydra_conf'} --config-name moe_lm_tiny"
    run(trained, f"{line} model.moe_router=cosine model.moe_top_k=3 {' '.join(overrides)}")
    [path] = trained.glob("outputs/**/checkpoint_last.pt")
    assert KEY in torch.load(path, weights_only=True)["model"]


def test_commands_take_the_plugin(trained):
    """And without it the bytes are verified, and nothing is computed."""
    path = "one/checkpoint_last.pt"
    plain = f"verify {path}", f"cost --path {path}"
    given = f"show {path}", f"evaluate data --path {path} --subset valid --cpu", *plain
    code = "from fairseq_moe_command import main\n"
    for line in given:
        code += f"assert main({[*line.split(), '--user-dir', str(PLUGIN)]}) == 0\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "top 3" in done.stdout and f"{path}: ok" in done.stdout
    code = f"from fairseq_moe_command import main\nassert main({plain[0].split()}) == 0\n"
    code += f"assert main({plain[1].split()}) == 1\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{path}: ok" in done.stdout and "--moe-router cosine is unknown" in done.stderr


def test_without_the_plugin_the_router_is_named(trained):
    line = f"fairseq-eval-lm data {EVALUATE} --path one/checkpoint_last.pt"
    line = line.replace(str(PLUGIN), str(ROOT / "fairseq_moe_ext"))
    done = subprocess.run(
        [str(BIN / part) if i == 0 else part for i, part in enumerate(line.split())],
        cwd=trained, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    words = "--moe-router cosine is unknown: use topk, .* or pass the plugin that registers it"
    assert re.search(words, error_in(done.stderr))
