"""The command `fairseq-moe`, as far as it needs neither torch nor fairseq, which take seconds.

`fairseq_moe_ext.cli` has the rest. This module lies outside of that package, because importing
anything of it registers its models with fairseq.
"""

import argparse
import errno
import os
import re
import sys
from typing import Dict, List, NamedTuple, Optional, Tuple, Type

_HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.join(_HERE, "fairseq_moe_ext")


class Command(NamedTuple):
    """A command with its examples, as a user types them."""

    words: str  # what it does
    module: str  # of fairseq_moe_ext, with add_arguments(parser) and run(args)
    examples: Tuple[str, ...]


LM_EVAL = "lm-eval"
# these build models, whose routers and architectures a plugin may have registered
_BUILD = "evaluate inspect expert-use generate priming convert average show verify cost".split()
COMMANDS: Dict[str, Command] = {
    "prepare": Command(
        "turn your own text into data-bins",
        "prepare.command",
        (
            'data --corpus docs="docs/*.md" --train-bpe 8000',
            "data --corpus wiki=wiki.txt --corpus code='src/**/*.py' --heldout mail=mail.jsonl.gz "
            "--train-bpe 8000",
            "data --corpus a=a.jsonl --heldout b=b.txt --gpt2-encoder-json encoder.json "
            "--gpt2-vocab-bpe vocab.bpe",
        ),
    ),
    "evaluate": Command(
        "perplexity of a model on many test sets",
        "evaluation.evaluate_command",
        (
            "data --path runs/moe/checkpoint_best.pt",
            "data --path runs/moe/checkpoint_best.pt --stride 256 --json perplexity.json",
        ),
    ),
    "inspect": Command(
        "a page on what each expert of a model does",
        "inspection.command",
        (
            "runs/moe/checkpoint_best.pt --data data --text my.txt",
            "runs/moe/checkpoint_best.pt --data data --twin runs/dense/checkpoint_best.pt "
            "--log runs/moe/metrics.jsonl --page experts.html",
        ),
    ),
    "expert-use": Command(
        "how much an expert's choice says about a text and its tokens",
        "evaluation.expert_use",
        (
            "runs/moe/checkpoint_best.pt --bin docs=data/docs --bin code=data/code "
            "--json expert_use.json",
            "runs/moe/checkpoint_best.pt --bin mine=my_text --subset valid --tokens-per-sample 256",
        ),
    ),
    "generate": Command(
        "continue prompts with a model",
        "generate.command",
        (
            'runs/moe/checkpoint_best.pt "Once upon a time"',
            "runs/moe/checkpoint_best.pt --file story.txt --temperature 0.8 --top-p 0.95",
            "runs/moe/checkpoint_best.pt --interactive --temperature 0.8",
        ),
    ),
    "priming": Command(
        "zero- and few-shot accuracy on the paper's tasks",
        "priming.command",
        (
            "tasks --path runs/moe/checkpoint_best.pt --data data --tasks sst2,copa",
            "tasks --path runs/moe/checkpoint_best.pt --data data --shots 0,1,4 --draws 5",
        ),
    ),
    "study": Command(
        "train and compare a dense and a sparse family of models",
        "study.command",
        ("study.yaml --dry-run", "study.yaml --jobs 2"),
    ),
    "report": Command(
        "a study's page and figures",
        "study.page",
        ("runs/study", "runs/study --png --expert-use use.json"),
    ),
    "convert": Command(
        "checkpoints to other layouts and precisions",
        "convert.command",
        (
            "runs/moe/checkpoint_best.pt small.pt --dtype float16 --weights-only",
            "moe.pt sharded/moe.pt --expert-files 4",
            "dense.pt sparse.pt --upcycle --moe-freq 2 --moe-expert-count 8",
            "moe.pt branch/moe.pt --to branch --rank-files 2",
            "moe.pt folder --to hf",
            "folder moe.pt --from hf",
        ),
    ),
    "average": Command(
        "the mean of several checkpoints",
        "convert.average",
        (
            "runs/moe --last 5 --output mean.pt",
            "a.pt b.pt c.pt --output mean/mean.pt --expert-files 4",
        ),
    ),
    "show": Command(
        "what a checkpoint is: its model, files and training",
        "convert.show",
        ("runs/moe/checkpoint_best.pt", "en_moe_lm_15b/model.pt --json"),
    ),
    "verify": Command(
        "whether the files of a checkpoint are undamaged",
        "convert.verify",
        ("runs/moe/checkpoint_best.pt", "runs/moe", "en_moe_lm_15b/model.pt"),
    ),
    "cost": Command(
        "parameters, FLOPs and memory of a model",
        "evaluation.cost_table",
        ("--arch moe_lm_15b --world-size 64", "--path runs/moe/checkpoint_best.pt"),
    ),
    "forecast": Command(
        "the compute that sparsity should save, by scaling laws",
        "forecast.command",
        (
            "--params 125M --experts 512 --top-k 2 --tokens 300B",
            "--params 2M --experts 32 --fit my_study/result.json",
        ),
    ),
    "patches": Command(
        "which functions of fairseq are wrapped, and why", "patch_list", ("", "> patches.txt")
    ),
    "completion": Command(
        "complete commands, flags and files in your shell",
        "completion",
        ("bash > ~/.local/share/bash-completion/completions/fairseq-moe", "zsh"),
    ),
    LM_EVAL: Command(
        "run EleutherAI's lm-eval on our models",
        "priming.lm_eval_command",
        ("--tasks piqa --model_args path=runs/moe/checkpoint_best.pt,data=data", "ls tasks"),
    ),
}


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status of a command line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read it, such as `head`, has enough
        sys.stdout = open(os.devnull, "w")
        return 0
    except KeyboardInterrupt:  # while torch is being imported
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        sys.stdout = open(os.devnull, "w")
        print("error: stdout: cannot be written (no space left); make room", file=sys.stderr)
        return 1


def _run(argv: List[str]) -> int:
    if argv in (["user-dir"], ["config-dir"]) or argv[:1] in (["-h"], ["--help"], ["--version"]):
        parser(argparse.ArgumentParser)[0].parse_args(argv).run(None)
        return 0
    from fairseq_moe_ext import cli

    return cli.main(argv)


def parser(
    kind: Type[argparse.ArgumentParser],
) -> Tuple[argparse.ArgumentParser, Dict[str, argparse.ArgumentParser]]:
    """The parser of the command, and of each subcommand one without its flags."""
    whole = kind(
        prog="fairseq-moe",
        description="Mixture-of-experts language models for fairseq 0.12.2.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20),
        epilog="fairseq-moe COMMAND --help has the flags of a command, and examples.",
    )
    whole.add_argument("--version", action="version", version=f"fairseq-moe {version()}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    subs = {}
    for name, words, folder in (
        ("user-dir", "print the folder for fairseq's --user-dir", lambda: PACKAGE),
        ("config-dir", "print the folder for fairseq-hydra-train's --config-dir", config_dir),
    ):
        sub = commands.add_parser(name, help=words)
        sub.set_defaults(run=lambda args, folder=folder: print(folder()))
    for name, command in COMMANDS.items():
        subs[name] = commands.add_parser(
            name,
            help=command.words,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples(name)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in _BUILD:
            subs[name].add_argument(
                "--user-dir",
                metavar="FOLDER",
                help="a plugin, as for fairseq-train, with a router or architecture of your own",
            )
    return whole, subs


def examples(name: str) -> List[str]:
    """The examples of a command, whole."""
    return [f"fairseq-moe {name} {rest}".strip() for rest in COMMANDS[name].examples]


def version() -> str:
    """Of the installed package; of a checkout that is not installed, of its pyproject.toml."""
    settings = os.path.join(_HERE, "pyproject.toml")
    installed = os.path.isdir(os.path.join(PACKAGE, "hydra_conf"))  # beside it are others' files
    if not installed and os.path.isfile(settings):
        with open(settings, encoding="utf-8") as file:
            found = re.search(r'^version = "([^"]+)"', file.read(), flags=re.M)
        return found[1] if found else "unknown"
    from importlib.metadata import version

    return version("fairseq-moe-ext")


def config_dir() -> str:
    """hydra_conf/: inside the installed package, beside it in a checkout."""
    for folder in (PACKAGE, _HERE):
        path = os.path.join(folder, "hydra_conf")
        if os.path.isdir(path):
            return path
    sys.exit(
        f"error: {PACKAGE}: has no hydra_conf, inside or beside it: install the package again, or "
        "copy hydra_conf from its source"
    )


if __name__ == "__main__":
    sys.exit(main())
