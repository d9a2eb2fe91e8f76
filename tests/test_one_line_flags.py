"""A mistyped command line of fairseq-moe ends in one line and status 2, as those of fairseq."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
from fairseq import options
from training import USER_DIR, error_in, status_of

import fairseq_moe_command
from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import OneLineParser, flag_mistake

# lm-eval parses its flags itself
COMMANDS = ["user-dir", *(name for name in fairseq_moe_command.COMMANDS if name != "lm-eval")]


def refused(capsys, line):
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(line))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "no command given; there are user-dir, "),
        ("evalute data", "'evalute'"),
        ("evalute data", "did you mean evaluate?"),
        ("--verson", "no command given"),
        ("--verson evaluate data --path x", "--verson"),
        ("evaluate data --path x --markdwn", "--markdwn; did you mean --markdown?"),
        ("evaluate data --path x --markdwn=3", "did you mean --markdown?"),
        ("evaluate data --path x extra --cpuu", "did you mean --cpu?"),
        ("evaluate data", "required: --path"),
        ("evaluate --path", "expected one argument"),
        ("evaluate data --path x --context many", "--context: invalid int value: 'many'"),
        ("evaluate data --path x --context 'a\nb'", "invalid int value"),
        ("evaluate data --path x --contex 64", "--contex 64; did you mean --context?"),
        ("evaluate data --path x --markd", "did you mean --markdown?"),
        ("prepare data --corpus a=b --train-bpe 400 --overwrit", "did you mean --overwrite?"),
        ("prepare data --corpus a=b --overw", "did you mean --overwrite?"),
        ("evaluate data --pat x", "required: --path; --pat is given; did you mean --path?"),
        ("forecast --params -125M", "--params: '-125M': use a number above 0"),
        (
            "forecast --params -xM",
            "its value -xM begins with a minus, as flags do: write --params=-xM",
        ),
        ("forecast --params --json", "--params: expected one argument"),
        ("prepare --corpsu a=b", "--corpsu"),
        ("convert a b --to brnch", "did you mean branch?"),
        ("user-dir --no-such-flag", "--no-such-flag"),
        ("priming --taks x", "required"),
    ],
)
def test_mistakes_in_one_line(capsys, line, words):
    assert words in refused(capsys, line)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_of_an_unknown_flag_in_one_line(capsys, command):
    refused(capsys, f"{command} --no-such-flag")
    refused(capsys, f"{command} 'two\nlines' --no-such-flag 'two\nlines' --json")


def test_lm_evals_own_parser_is_told_as_well():
    parser = argparse.ArgumentParser(prog="lm-eval")
    parser.add_argument("--tasks")
    told = flag_mistake(parser, "unrecognized arguments: --taskss a\nb")
    assert told == "unrecognized arguments: --taskss a b; did you mean --tasks? (flags: --help)"


def test_other_parsers_use_the_method(capsys):
    with pytest.raises(SystemExit):
        OneLineParser.error(argparse.ArgumentParser(), "unrecognized arguments: --hlp")
    assert "did you mean --help?" in capsys.readouterr().err


def test_programs_take_no_beginning_of_a_flag_for_it():
    """Those of stock fairseq's that take it still do."""
    folder = Path(fairseq_moe_command.__file__).parent
    for path in (*folder.glob("benchmarks/*.py"), *folder.glob("examples/*/*.py")):
        for made in re.findall(r"argparse.ArgumentParser\(\s*[^,)]*", path.read_text()):
            assert "allow_abbrev=False" in made, path
    assert OneLineParser().add_subparsers().add_parser("x").allow_abbrev is False
    assert OneLineParser(allow_abbrev=True).allow_abbrev is True


@pytest.mark.parametrize(
    "line, words",
    [
        ("--criterion cross_entropy --moe-gate-loss-wt 0.01", "--criterion moe_cross_entropy"),
        ("--optimizer sgd --adam-eps 1", "--adam-eps is a flag of --optimizer fused_adam"),
        ("--arch lstm_lm --moe-top-k 1", "--arch moe_transformer_lm or "),
        ("--arch transformer_lm_wiki103 --moe-freq 1", "--arch moe_transformer_lm or "),
        ("--lr-scheduler fixed --t-mult 2", "--t-mult is a flag of --lr-scheduler cosine: "),
        ("--corpus-temperature 2", "--task mixture_language_modeling"),
        ("--arch moe_lm_tiny --moe-top-kk 1", "did you mean --moe-top-k?"),
        ("--moe-freq 1 --moe-layers 1", "--moe-freq 1 with --moe-layers 1, which names all MoE"),
        ("--moe-layers=1 --moe-freq=0", "--moe-freq 0 with --moe-layers 1, which names all MoE"),
        ("--lr -1e-3", "--lr -0.001 is out of range"),
        ("--lr -x", "--lr: its value -x begins with a minus, as flags do: write --lr=-x"),
    ],
)
def test_a_flag_of_something_else_in_training(capsys, line, words):
    parser = options.get_training_parser()
    basis = ["x", "--task", "language_modeling", "--arch", "moe_lm_tiny", "--batch-size", "1"]
    with pytest.raises(SystemExit):
        options.parse_args_and_arch(parser, [*basis, *line.split()])
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


def test_moe_layers_without_moe_freq_on_the_command_line():
    """The architecture has one."""
    basis = "x --task language_modeling --arch moe_lm_tiny --batch-size 1 --moe-layers 0,2"
    args = options.parse_args_and_arch(options.get_training_parser(), basis.split())
    assert (args.moe_freq, args.moe_layers) == (2, "0,2")


@pytest.mark.parametrize(
    "parser, remedy",
    [
        (options.get_eval_lm_parser, "--model-overrides \"{'moe_top_k': ...}\""),
        (options.get_interactive_generation_parser, "--model-overrides"),
    ],
)
def test_a_setting_of_the_model_in_evaluation(capsys, parser, remedy):
    with pytest.raises(SystemExit):
        options.parse_args_and_arch(
            parser(), ["x", "--task", "language_modeling", "--path", "x", "--moe-top-k", "1"]
        )
    assert remedy in capsys.readouterr().err


def test_help_is_whole(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--help"])
    assert stop.value.code == 0 and "--markdown" in capsys.readouterr().out
    assert issubclass(OneLineParser, argparse.ArgumentParser)


@pytest.mark.parametrize(
    "flag, typo, meant",
    [
        ("--arch", "moe_lm_tini", "did you mean moe_lm_tiny?"),
        ("--task", "mixture_language_modelling", "did you mean mixture_language_modeling?"),
        ("--task", "qqq", "; most like it: "),
    ],
)
def test_a_choice_of_hundreds_is_not_listed(capsys, flag, typo, meant):
    """A terminal would show the suggestion two screens below."""
    line = f"fairseq-train data --user-dir {USER_DIR} --arch moe_lm_tiny --task dummy_lm"
    assert status_of(f"{line} {flag} {typo}") == 2
    error = error_in(capsys.readouterr().err)
    assert meant in error and len(error) < 800
