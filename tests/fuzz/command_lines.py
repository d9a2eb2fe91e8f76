"""Good command lines, and what is wrong with each of their mutations.

A command line is words with places in braces: {data}, {corpus}, {model}, ... are of the workplace
(workplace.py), {out} of the run. Each mutation is (name, argv, harmless): a `harmless` one may do
its work; any other must be refused.
"""

import random
import shlex
from typing import Iterator, List, NamedTuple

SMALL = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
SMALL += " --decoder-attention-heads 2"
RUN = "--optimizer adam --lr 0.01 --max-update 2 --max-epoch 1 --cpu --num-workers 0"
RUN += " --no-progress-bar --save-dir {out}/run --batch-size 4"
MOE = "--arch moe_lm_tiny --criterion moe_cross_entropy --moe-expert-count 4 --moe-freq 2"
EVAL = "--cpu --num-workers 0 --batch-size 4 --path {model}"

GOOD = {
    "train": "fairseq-train {data} --user-dir {package} --task mixture_language_modeling"
    f" --tokens-per-sample 32 {MOE} {SMALL} {RUN} --corpus-temperature 2"
    " --best-checkpoint-metric in_domain_ppl --lr-scheduler polynomial_decay --warmup-updates 1"
    " --total-num-update 2 --clip-norm 0.1 --update-freq 1 --moe-gate-loss-wt 0.01",
    "train-lm": "fairseq-train {corpus} --user-dir {package} --task language_modeling"
    f" --tokens-per-sample 32 --arch dense_lm_tiny --criterion cross_entropy {SMALL} {RUN}"
    " --lr-scheduler inverse_sqrt --warmup-updates 1 --sample-break-mode complete",
    "train-choice": "fairseq-train {data} --user-dir {package} --task multiple_choice"
    f" --choice-data {{choices}} --tokens-per-sample 48 {MOE} {SMALL} {RUN}"
    " --finetune-from-model {model} --maximize-best-checkpoint-metric"
    " --best-checkpoint-metric accuracy".replace("moe_cross_entropy", "multiple_choice"),
    "eval-lm": "fairseq-eval-lm {data} --user-dir {package} --task mixture_language_modeling"
    f" --gen-subset valid/far --tokens-per-sample 32 {EVAL}",
    "eval-lm-window": "fairseq-eval-lm {corpus} --user-dir {package} --gen-subset valid"
    f" --tokens-per-sample 32 --context-window 8 {EVAL}",
    "validate": "fairseq-validate {data} --user-dir {package} --task mixture_language_modeling"
    f" --valid-subset valid/small {EVAL}",
    "generate": "fairseq-generate {corpus} --user-dir {package} --task language_modeling"
    f" --sample-break-mode eos --gen-subset valid --tokens-per-sample 32 --beam 2"
    f" --max-len-a 1 --max-len-b 4 --prefix-size 2 --skip-invalid-size-inputs-valid-test {EVAL}",
    "interactive": "fairseq-interactive {data} --user-dir {package} --task language_modeling"
    " --input {prompts} --beam 2 --max-len-b 16 --tokens-per-sample 32 --bpe gpt2"
    " --gpt2-encoder-json {data}/encoder.json --gpt2-vocab-bpe {data}/vocab.bpe"
    f" {EVAL}".replace("--batch-size 4", "--batch-size 1"),
    "hydra": "fairseq-hydra-train --config-dir {conf} --config-name moe_lm_tiny task.data={corpus}"
    " task.tokens_per_sample=32 model.decoder_layers=2 model.decoder_embed_dim=16"
    " model.decoder_ffn_embed_dim=32 model.decoder_attention_heads=2 model.moe_expert_count=4"
    " dataset.batch_size=4 dataset.num_workers=0 optimization.lr=[0.01]"
    " optimization.max_update=2 optimization.update_freq=[1] common.cpu=true common.fp16=false"
    " common.memory_efficient_fp16=false checkpoint.save_dir={out}/run hydra.run.dir={out}",
    "prepare": "fairseq-moe prepare {out}/data --corpus a={text}/big.train.txt"
    " --heldout b={text}/far.valid.txt --train-bpe 270 --valid-fraction 0.1 --test-fraction 0.1"
    " --workers 1 --split-seed 3 --documents blank-line",
    "evaluate": "fairseq-moe evaluate {data} --path {model} --subset valid --context 32"
    " --stride 16 --batch-size 4 --bootstrap 10 --cpu --json {out}/new.json",
    "priming": "fairseq-moe priming {tasks} --path {model} --data {data} --tasks sst2"
    " --shots 0,1 --draws 2 --seed 3 --limit 2 --cpu --json {out}/new.json",
    "study": "fairseq-moe study {study} --dry-run --jobs 1",
    "report": "fairseq-moe report {result}",
    "convert": "fairseq-moe convert {model} {out}/new.pt --dtype float16 --weights-only",
    "spread": "fairseq-moe convert {model} {out}/new.pt --expert-files 2",
    "upcycle": "fairseq-moe convert {dense} {out}/new.pt --upcycle --moe-freq 2"
    " --moe-expert-count 4 --noise 0.1 --seed 3",
    "cost": "fairseq-moe cost --arch moe_lm_15b --types 1000 --context 64 --tokens 1e6"
    " --batch-size 2 --world-size 4 --precision fp16 --optimizer adam",
}

COUNT = ["-3", "1.5", "nan", "", "x"]  # from 0 on
POSITIVE_COUNT = ["0", "-3", "1.5", "1e3", "inf", "\u00bd"]
WEIGHT = ["-1", "nan", "inf", "x"]  # from 0 on
POSITIVE = ["0", "-1", "nan", "inf", ""]
SHARE = ["-0.1", "1", "nan", "x"]  # from 0 to below 1
HUGE = ["10000000000000"]

TRAINING = {
    "--batch-size": POSITIVE_COUNT,
    "--max-tokens": POSITIVE_COUNT,
    "--batch-size-valid": POSITIVE_COUNT,
    "--max-tokens-valid": POSITIVE_COUNT,
    "--max-valid-steps": ["0", "-1", "x"],
    "--required-batch-size-multiple": POSITIVE_COUNT,
    "--required-seq-len-multiple": ["0", "-2"],
    "--num-workers": [*COUNT, *HUGE],
    "--data-buffer-size": ["-3", "x"],
    "--tokens-per-sample": [*POSITIVE_COUNT, *HUGE],
    "--max-target-positions": ["0", "-3", "8", *HUGE],
    "--lr": [*WEIGHT, "", "[]", "0.1,x"],
    "--clip-norm": WEIGHT,
    "--update-freq": [*POSITIVE_COUNT, "", "[]", "nan"],
    "--max-update": COUNT,
    "--max-epoch": COUNT,
    "--stop-time-hours": WEIGHT,
    "--stop-min-lr": ["nan", "inf"],
    "--warmup-updates": COUNT,
    "--seed": [*COUNT, *HUGE],
    "--log-interval": POSITIVE_COUNT,
    "--save-interval": ["0", "-3"],
    "--save-interval-updates": ["-3", "x"],
    "--validate-interval": ["0", "-3"],
    "--validate-interval-updates": ["-3", "1.5"],
    "--validate-after-updates": ["-3", "1.5"],
    "--fixed-validation-seed": ["-3", "1.5"],
    "--keep-last-epochs": ["0", "-3"],
    "--keep-interval-updates": ["0", "-3"],
    "--keep-best-checkpoints": ["0", "-3"],
    "--patience": ["0", "-3", "1.5"],
    "--curriculum": ["-3"],
    "--adam-betas": ["0.9", "(0.9,1.5)", "(nan,0.9)", "(-1,0.9)", "x", "(0.9,0.98,0.99)", ""],
    "--adam-eps": WEIGHT,
    "--weight-decay": WEIGHT,
    "--dropout": SHARE,
    "--attention-dropout": SHARE,
    "--activation-dropout": SHARE,
    "--decoder-layers": [*POSITIVE_COUNT, *HUGE],
    "--decoder-embed-dim": [*POSITIVE_COUNT, *HUGE],
    "--decoder-ffn-embed-dim": [*POSITIVE_COUNT, *HUGE],
    "--decoder-attention-heads": [*POSITIVE_COUNT, "3", *HUGE],
    "--min-params-to-wrap": ["-3", "1.5"],
    "--distributed-world-size": ["0", "-3", *HUGE],
    "--bucket-cap-mb": ["0", "-3"],
    "--heartbeat-timeout": ["-3", "x"],
    "--ema-decay": ["-1", "2", "nan"],
    "--fp16-init-scale": ["0", "-3"],
    "--min-loss-scale": ["-1", "nan"],
    "--checkpoint-shard-count": ["0", "-3"],
    "--arch": ["moe_lm_tinny", "", "MOE_LM_TINY"],
    "--task": ["mixture_langauge_modeling", ""],
    "--criterion": ["moe_cross_entropi", ""],
    "--optimizer": ["adamm", ""],
    "--lr-scheduler": ["polinomial", ""],
    "--best-checkpoint-metric": ["los", "in_domain_pppl", "", "num_updates"],
    "--train-subset": ["trian", ""],
    "--valid-subset": ["vaild", "valid,vaild", ""],
    "--optimizer-overrides": ["{", "[]", "{'lr': }"],
    "--ddp-backend": ["legacy", ""],
    "--restore-file": ["{missing}", "checkpoint_lst.pt", "{garbage}", "{fifo}", "{truncated}"],
    "--finetune-from-model": ["{missing}", "{garbage}", "{fifo}", "{truncated}", "{folder}"],
    "--log-file": ["{folder}", "{missing}/x"],
    "--tokens-per-sampl": ["32"],
}
MIXTURE = {
    "--corpus-temperature": [*POSITIVE, "x"],
    "--corpus-weights": ["big=nan,mid=1,small=1", "big=1", "big=0,mid=1,small=1", "big", "", "=1"],
    "--train-corpora": ["bgi", "", "big,big", ","],
    "--moe-gate-loss-wt": WEIGHT,
    "--moe-z-loss-wt": WEIGHT,
    "--moe-expert-count": [*POSITIVE_COUNT, "1", *HUGE],
    "--moe-freq": ["-1", "3", "1.5", *HUGE],
    "--moe-expert-ffn-dim": ["0", "-1", *HUGE],
    "--moe-capacity-factor": [*POSITIVE, "0.0001"],
    "--moe-eval-capacity-token-fraction": ["0", "1.5", "nan", "-inf", "x"],
    "--moe-expert-dropout": SHARE,
    "--alternate-decoder-ffn-embed-dim": ["-3", "1.5", *HUGE],
    "--moe-freeze": ["gates", ""],
    "--total-num-update": ["0", "-3", "nan"],
    "--power": ["0", "-1", "nan"],
    "--end-learning-rate": ["-1", "nan"],
    "--force-anneal": ["-3", "1.5"],
}
EVALUATION = {
    "--batch-size": POSITIVE_COUNT,
    "--max-tokens": ["0", "-3", "1"],
    "--num-workers": [*COUNT, *HUGE],
    "--tokens-per-sample": [*POSITIVE_COUNT, *HUGE],
    "--gen-subset": ["vaild", "", "valid/none"],
    "--model-overrides": [
        "{",
        "[]",
        "x",
        "{'moe_eval_capacity_token_fractoin': 1.0}",
        "{'moe_eval_capacity_token_fraction': float('nan')}",
        "{'moe_eval_capacity_token_fraction': 'x'}",
        "{'decoder_layers': 10**9}",
        "{'decoder_layers': 0}",
        "{'dropout': 7}",
        "{'moe_expert_count': 0}",
        "__import__('os').mkdir('made')",
    ],
    "--num-shards": ["0", "-3"],
    "--shard-id": ["-3", "7"],
    "--context-window": ["-3", "32", "99", "1.5"],
    "--softmax-batch": ["0", "-3"],
    "--remove-bpe": ["unknown", "sentencpiece"],
    "--checkpoint-shard-count": ["0", "3"],
    "--log-interval": ["0"],
}
GENERATION = {
    "--beam": ["0", "-3", "1.5", *HUGE],
    "--nbest": ["0", "-3", "3"],
    "--max-len-a": ["-1", "nan", "inf"],
    "--max-len-b": ["-3", "1.5"],
    "--min-len": ["-3", "99"],
    "--lenpen": ["nan", "inf"],
    "--unkpen": ["nan"],
    "--prefix-size": ["-3"],
    "--no-repeat-ngram-size": ["-3"],
    "--sampling-topk": ["-3", "0"],
    "--sampling-topp": ["-3", "7", "nan"],
    "--temperature": ["0", "-1", "nan", "inf"],
    "--diverse-beam-groups": ["0", "-3"],
    "--diversity-rate": ["nan"],
    "--seed": ["-3", *HUGE],
    "--remove-bpe": ["unknown"],
    "--batch-size": POSITIVE_COUNT,
    "--gen-subset": ["vaild"],
    "--model-overrides": ["{", "[]"],
    "--buffer-size": ["-3"],
}
VALUES = {
    "train": {**TRAINING, **MIXTURE},
    "train-lm": {
        "--tokens-per-sample": ["0", "-3"],
        "--batch-size": ["0", "-3"],
        "--max-tokens": ["8"],
        "--warmup-updates": COUNT,
        "--warmup-init-lr": ["-2", "nan"],
        "--lr": ["-1", "nan"],
        "--best-checkpoint-metric": ["in_domain_ppl", "accuracy", "los"],
        "--sample-break-mode": ["sentence", ""],
        "--shorten-method": ["cut"],
        "--label-smoothing": ["-1", "2"],
        "--output-dictionary-size": ["-3", "0"],
        "--valid-subset": ["vaild"],
        "--restore-file": ["{missing}"],
    },
    "train-choice": {
        "--choice-data": ["{missing}", "{file}", "{empty}", "{fifo}", ""],
        "--choice-task": ["copaa", "copa", ""],
        "--choice-valid-share": ["-1", "1", "nan"],
        "--choice-scoring": ["heads", ""],
        "--tokens-per-sample": ["0", "-3", "3"],
        "--best-checkpoint-metric": ["acuracy", "ppl"],
        "--batch-size": ["0", "-1"],
        "--finetune-from-model": ["{missing}", "{garbage}", "{truncated}"],
    },
    "eval-lm": EVALUATION,
    "eval-lm-window": {"--context-window": ["-3", "32", "99"], "--tokens-per-sample": ["0", "8"]},
    "validate": {
        **{key: EVALUATION[key] for key in ("--batch-size", "--max-tokens", "--num-workers")},
        "--valid-subset": ["vaild", "", "valid/none"],
        "--model-overrides": EVALUATION["--model-overrides"],
        "--log-interval": ["0"],
        "--required-batch-size-multiple": ["0"],
    },
    "generate": GENERATION,
    "interactive": {
        "--beam": ["0"],
        "--input": ["{missing}", "{folder}", "{binary}"],
        "--gpt2-encoder-json": ["{missing}", "{garbage}", "{empty}"],
        "--gpt2-vocab-bpe": ["{missing}", "{truncated}"],
        "--bpe": ["gpt3"],
        "--buffer-size": ["-3"],
        "--batch-size": ["0", "8"],
    },
    "prepare": {
        "--corpus": ["", "a", "a=", "=x", "a={missing}", "a={empty}", "a={fifo}", "a={binary}",
            "a={empty_folder}", "a:tset={text}/big.train.txt", "../a={text}/big.train.txt",
            "b={text}/big.train.txt", "a" * 300 + "={text}/big.train.txt"],
        "--heldout": ["", "b={missing}", "a={text}/far.valid.txt", "b:train={text}/far.valid.txt"],
        "--train-bpe": ["0", "-3", "100", "1.5", "nan", *HUGE],
        "--train-bpe-bytes": ["0", "-3", "1.5"],
        "--valid-fraction": ["-1", "1", "nan", "inf", "x"],
        "--test-fraction": ["-1", "1", "nan", "x"],
        "--workers": ["0", "-3", "1.5", *HUGE],
        "--split-seed": ["1.5", "nan", "x"],
        "--documents": ["paragraph", ""],
        "--format": ["json"],
        "--dict": ["{missing}", "{garbage}", "{empty}", "{fifo}"],
        "--dict-size": ["0", "-3", "10", "1.5", *HUGE],
        "--gpt2-encoder-json": ["{data}/encoder.json"],
        "--field": ["x"],
    },
    "evaluate": {
        "--context": ["0", "-3", "1.5", "nan", *HUGE],
        "--stride": ["0", "-3", "99", "1.5"],
        "--batch-size": ["0", "-3", "nan"],
        "--bootstrap": ["-3", "1.5", *HUGE],
        "--capacity": ["0", "-1", "2", "nan", "x"],
        "--sweep-capacity": ["", "0", "nan", "0.5,", "1,2"],
        "--figure": ["{folder}", "{missing}/x.html", "{device}", "{fifo}"],
        "--subset": ["vaild", ""],
        "--model-overrides": EVALUATION["--model-overrides"],
        "--json": ["{folder}", "{missing}/x.json", "{device}", "{fifo}", "{file}", ""],
    },
    "priming": {
        "--tasks": ["", "none", "copa,copa", "copa,", "translation"],
        "--shots": ["", "-1", "1.5", "0,0", "0,", "x", *HUGE],
        "--draws": ["0", "-3", "1.5", *HUGE],
        "--seed": ["1.5", "nan", "x"],
        "--limit": ["0", "-3", "1.5"],
        "--rule": ["max"],
        "--context": ["0", "-3", "1", *HUGE],
        "--max-tokens": ["0", "-3", "1.5"],
        "--beam": ["0", "-3"],
        "--max-new-tokens": ["0", "-3"],
        "--languages": ["", "en", "en-en-fr"],
        "--data": ["{missing}", "{file}", "{empty_folder}", "{corpus}"],
        "--model-overrides": ["{", "[]", "x"],
        "--json": ["{folder}", "{missing}/x.json", "{device}", "{fifo}", ""],
    },
    "study": {"--jobs": ["0", "-3", "1.5", "nan"]},
    "report": {
        "--expert-use": ["{missing}", "{garbage}", "{folder}", "{fifo}", "{empty}"],
        "--fine-tuning": ["{missing}", "{garbage}", "{folder}", "{fifo}", "{empty}"],
    },
    "convert": {
        "--dtype": ["float8", "", "int8"],
        "--to": ["brnach", ""],
        "--from": ["xlgm", "xglm"],
        "--rank-files": ["0", "-3", "2"],
        "--expert-files": ["0", "-3", "3", "1.5", "nan", *HUGE],
        "--moe-freq": ["2"],
        "--noise": ["0.1"],
    },
    "spread": {"--expert-files": ["0", "-3", "3", "8", ""]},
    "upcycle": {
        "--moe-freq": ["0", "-1", "3", "1.5", *HUGE],
        "--moe-expert-count": ["0", "-1", "1", "1.5", *HUGE],
        "--noise": ["-1", "nan", "inf", "x"],
        "--seed": ["1.5", "nan", "x", "-1" + "0" * 30],
        "--expert-files": ["3"],
        "--to": ["xglm"],
    },
    "cost": {
        "--arch": ["moe_lm_15bb", ""],
        "--types": ["0", "-3", "1.5", "nan"],
        "--context": ["0", "-3", "nan"],
        "--tokens": ["0", "-1", "nan", "inf", "x"],
        "--batch-size": ["0", "-3"],
        "--world-size": ["0", "-3", "1.5", "3"],
        "--precision": ["fp8"],
        "--optimizer": ["adamm"],
        "--sharding": ["half"],
        "--decoder-layers": ["0", "-3", "nan"],
        "--moe-freq": ["-1", "99"],
        "--moe-expert-count": ["0", "-3", "1"],
        "--dropout": ["2", "nan"],
        "--path": ["{missing}", "{garbage}"],
    },
}  # fmt: skip
HYDRA = {
    **{
        f"{group}.{flag[2:].replace('-', '_')}": TRAINING[flag]
        for group, flags in {
            "dataset": "--batch-size --max-tokens --num-workers --validate-interval",
            "optimization": "--clip-norm --max-update --max-epoch --stop-time-hours",
            "common": "--seed --log-interval",
            "checkpoint": "--save-interval --keep-last-epochs --patience",
            "task": "--tokens-per-sample",
            "model": "--dropout --decoder-layers --decoder-embed-dim",
        }.items()
        for flag in flags.split()
    },
    "optimization.lr": ["[-1]", "[nan]", "[]", "x"],
    "optimization.update_freq": ["[0]", "[]", "[1.5]"],
    "optimizer.adam_betas": ["x", "'(0.9, 2)'", "[0.9]"],
    "optimizer.weight_decay": ["-1", "nan"],
    "lr_scheduler.warmup_updates": ["-3", "x"],
    "lr_scheduler.power": ["nan"],
    "model.moe_capacity_factor": ["0", "nan"],
    "criterion.moe_gate_loss_wt": ["-1", "nan"],
    "checkpoint.best_checkpoint_metric": ["los"],
    "checkpoint.restore_file": ["{missing}", "{garbage}"],
    "task.data": ["{missing}", "{file}", "{empty_folder}", ""],
    "task._name": ["mixture"],
    "task": ["mixture"],
    "model": ["moe_lm_tinny"],
    "model.decoder_layerz": ["2"],
    "--config-name": ["moe_lm_tinny"],
    "--config-dir": ["{missing}", "{file}"],
}

# Values that look wrong and are not, or mean what they say; (command, flag, value).
HARMLESS = {
    ("train", "--batch-size-valid", "1e3"),  # 1000
    ("priming", "--shots", "0,0"),  # one of them
    ("prepare", "--field", "x"),  # of JSON Lines, of which there are none
    ("upcycle", "--seed", "-1" + "0" * 30),
    ("train-choice", "--tokens-per-sample", "3"),  # the end of each question
    ("train", "--max-tokens-valid", "1e3"),
    ("train", "--update-freq", "1e3"),
}

CONFLICTS = {
    "train": [
        "--moe-dropless --moe-capacity-factor 2",
        "--moe-top1-expert --moe-batch-prioritized-routing",
        "--corpus-weights big=1,mid=1,small=1",
        "--arch transformer",
        "--criterion ctc",
        "--stop-min-lr 1",
        "--arch transformer_lm --moe-expert-count 4",
        "--dataset-impl lazy",
        "--shorten-data-split-list train",
        "--disable-validation --patience 3",
        "--disable-validation --keep-best-checkpoints 3",
        "--fp16 --bf16",
        "--use-bmuf --block-lr -1",
        "--self-target",
        "--max-tokens 8 --batch-size 1",
        "--reset-optimizer --finetune-from-model {missing}",
        "--no-such-flag 3",
        "--continue-once {missing}",
        "--store-ema --ema-decay 3",
        "--model-parallel-size 2",
        "--max-target-positions 16",
        "extra",
    ],
    "train-lm": ["--max-target-positions 16", "--moe-expert-count 4", "--add-bos-token x"],
    "train-choice": ["--criterion cross_entropy", "--arch transformer_lm_gpt2_tiny"],
    "eval-lm": ["--path {model}:{missing}", "--self-target", "--max-tokens 8", "extra"],
    "validate": ["--max-tokens 8", "extra"],
    "generate": ["--sampling --nbest 1 --beam 3", "--constraints ordered", "--nbest 4", "extra"],
    "prepare": ["--dict-size 4", "--gpt2-encoder-json {data}/encoder.json", "extra"],
    "evaluate": ["--capacity 0.5 --sweep-capacity 0.5,1", "{missing}", "{data}"],
    "priming": ["--rule mean --tasks summarization", "extra"],
    "convert": ["--upcycle", "--expert-files 2 --to branch", "--from xglm", "--moe-top1-expert",
        "extra"],
    "spread": ["--to xglm", "--rank-files 2"],
    "cost": ["--path {model}", "--json --markdown", "--paper x"],
    "report": ["{result}"],
    "study": ["{study}", "--only-result --dry-run"],
}  # fmt: skip

PLACES = "missing folder fifo empty truncated garbage link long".split()


class Mutation(NamedTuple):
    command: str
    change: str
    argv: List[str]
    harmless: bool = False

    @property
    def name(self) -> str:
        return f"{self.command}: {self.change}"


def mutations() -> Iterator[Mutation]:
    """All of them, each another command line, in an order that is always the same."""
    seen = set()
    for mutation in _mutations():
        if tuple(mutation.argv) not in seen:
            seen.add(tuple(mutation.argv))
            yield mutation


def words_of(command: str) -> List[str]:
    return shlex.split(GOOD[command])


def sample(number: int, seed: int) -> List[Mutation]:
    return random.Random(seed).sample(list(mutations()), number)


def filled(argv: List[str], places: dict) -> List[str]:
    """The command line with {name} as the path of that name."""
    for name, path in places.items():
        argv = [word.replace("{" + name + "}", str(path)) for word in argv]
    return argv


def _mutations() -> Iterator[Mutation]:
    for command, line in GOOD.items():
        words = shlex.split(line)
        if command == "hydra":
            yield from _hydra(command, words)
            continue
        for index, word in enumerate(words[1:], start=1):
            if word.startswith("--"):
                swapped = word[:-2] + word[-1] + word[-2] + "q"
                yield Mutation(command, f"{word} -> {swapped}", _put(words, index, swapped))
            if word.startswith("{") and words[index - 1] != "--user-dir":
                yield from _places(command, words, index)
            if word.startswith("{out}/") and words[index - 1] != "--json":
                for path in ("{file}", "{device}", "{file}/x", "{fifo}", "{empty}"):
                    yield Mutation(command, f"{word} -> {path}", _put(words, index, path))
        yield from _dropped(command, words)
        for flag, values in VALUES.get(command, {}).items():
            for value in values:
                harmless = (command, flag, value) in HARMLESS
                argv = _set(words, flag, value)
                yield Mutation(command, f"{flag} {value!r}", argv, harmless)
        for extra in CONFLICTS.get(command, []):
            argv = words
            extra_words = shlex.split(extra)
            yield Mutation(command, f"and {extra}", [*argv, *extra_words])
        yield Mutation(command, "unicode", [*words, "--\u00e4\u2028\U0001f600", "\udcff"])


_NEEDED = {  # flags without which there is nothing to do
    "train": "{data} --arch --batch-size",
    "train-lm": "{corpus} --arch --batch-size",
    "train-choice": "{data} --choice-data --arch --batch-size",
    "eval-lm": "{data} --path",
    "validate": "{data} --path --batch-size",
    "generate": "{corpus} --path",
    "interactive": "{data} --path",
    "prepare": "{out}/data --corpus --train-bpe",
    "evaluate": "{data} --path",
    "priming": "{tasks} --path --data",
    "study": "{study}",
    "report": "{result}",
    "convert": "{model} {out}/new.pt",
    "upcycle": "--moe-expert-count {dense}",
}


def _dropped(command: str, words: List[str]) -> Iterator[Mutation]:
    for word in _NEEDED.get(command, "").split():
        index = words.index(word)
        rest = words[:index] + words[index + (2 if word.startswith("--") else 1) :]
        yield Mutation(command, f"without {word}", rest)
    flags = [i for i, word in enumerate(words[:-1]) if word.startswith("--")]
    for index in flags:
        if not words[index + 1].startswith("--"):
            yield Mutation(
                command, f"{words[index]} without a value", words[: index + 1] + words[index + 2 :]
            )


def _places(command: str, words: List[str], index: int) -> Iterator[Mutation]:
    """An input that is something else."""
    word = words[index]
    rest = word.partition("}")[2]
    for place in PLACES:
        if word.startswith("{out}") or (word == "{prompts}" and place in ("fifo", "empty")):
            continue  # prompts may come from a pipe, and there may be none
        if place == "folder" and word in ("{data}", "{tasks}", "{choices}", "{conf}", "{result}"):
            place = "empty_folder"
        yield Mutation(command, f"{word} -> {place}", _put(words, index, "{" + place + "}" + rest))


def _hydra(command: str, words: List[str]) -> Iterator[Mutation]:
    for index, word in enumerate(words):
        key, _, value = word.partition("=")
        if value and not key.startswith("hydra"):
            wrong = key[:-1] + "q" + key[-1]
            yield Mutation(command, f"{key} -> {wrong}", _put(words, index, f"{wrong}={value}"))
    for key, values in HYDRA.items():
        for value in values:
            if key.startswith("--"):
                argv = _set(words, key, value)
            else:
                argv = [word for word in words if word.partition("=")[0] != key]
                argv.append(f"{key}={value}")
            yield Mutation(command, f"{key}={value}", argv)
    for extra in ("dataset.batch_size", "=3", "x=[", "+model.dropout", "--conf", "a=b=c", "~task"):
        yield Mutation(command, f"and {extra}", [*words, extra])


def _put(words: List[str], index: int, word: str) -> List[str]:
    return [*words[:index], word, *words[index + 1 :]]


def _set(words: List[str], flag: str, value: str) -> List[str]:
    if flag in words:
        return _put(words, words.index(flag) + 1, value)
    return [*words, flag, value]
