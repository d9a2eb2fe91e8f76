"""Command lines of small models."""

from pathlib import Path

import fairseq_moe_ext

USER_DIR = str(Path(fairseq_moe_ext.__file__).parent)
MODEL = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
MODEL += " --decoder-attention-heads 2 --tokens-per-sample 16"
TRAIN = f"--user-dir {USER_DIR} --task language_modeling --criterion moe_cross_entropy {MODEL}"
TRAIN += " --optimizer adam --lr 0.01 --batch-size 4 --max-update 6 --num-workers 0 --cpu"
TRAIN += " --no-progress-bar --log-format json --log-interval 1 --seed 1"
TRAIN += " --best-checkpoint-metric inner_loss"
MOE = "--arch moe_lm_tiny --moe-gate-loss-wt 0.01"
EVAL = f"--user-dir {USER_DIR} --gen-subset valid --tokens-per-sample 16 --batch-size 4 --cpu"
EVAL += " --num-workers 0"
