"""A small sparse model and its dense twin, trained for a few updates on text of two kinds."""

import logging

import pytest
from training import fairseq, prepare_near_and_far

import fairseq_moe_ext
from fairseq_moe_ext.inspection.inspecting import inspect

SMALL = "--decoder-layers 4 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --batch-size 4"
SMALL += " --decoder-attention-heads 2 --tokens-per-sample 32 --optimizer adam --lr 0.01 --cpu"
SMALL += " --num-workers 0 --no-progress-bar --log-interval 2 --max-update 6 --max-epoch 1"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with data/, moe/, dense/, moe.log and my.txt."""
    folder = tmp_path_factory.mktemp("inspection")
    prepare_near_and_far(folder)
    (folder / "my.txt").write_text("near1 far2 near3\nÄ <b>&amp;</b> 中\n\nfar19 </script> near\n")
    user_dir = fairseq_moe_ext.__path__[0]
    line = f"{folder / 'data'} --user-dir {user_dir} --task mixture_language_modeling {SMALL}"
    train(
        f"{line} --arch dense_lm_tiny --criterion cross_entropy --save-dir {folder / 'dense'}"
        " --disable-validation"
    )
    train(
        f"{line} --arch moe_lm_tiny --criterion moe_cross_entropy --moe-expert-count 4"
        f" --moe-freq 2 --moe-log-per-layer --save-interval-updates 3 --save-dir {folder / 'moe'}"
        f" --log-format json --log-file {folder / 'moe.log'}"
    )
    return folder


@pytest.fixture(scope="module")
def found(trained):
    """Two test sets, a text, a twin, an earlier checkpoint."""
    return inspect(
        trained / "moe" / "checkpoint_last.pt",
        trained / "data",
        [trained / "my.txt"],
        twin=trained / "dense" / "checkpoint_last.pt",
        compare=sorted((trained / "moe").glob("checkpoint_*_3.pt")),
        log=trained / "moe.log",
    )


def train(line):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("fairseq"), "level", logging.INFO)
        fairseq(f"fairseq-train {line}")
