"""Good command lines, and what is wrong with each of their mutations.

A command line is words with places in braces: {data}, {corpus}, {model}, ... are of the workplace
(workplace.py), {out} of the run. Each mutation is (name, argv, harmless): a `harmless` one may do
its work; any other must be refused.
"""

import random
import shlex
from typing import Iterator, List, NamedTuple

from wrong_values import CONFLICTS, HARMLESS, HYDRA, VALUES

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
    "priming": "{tasks} --path",
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
