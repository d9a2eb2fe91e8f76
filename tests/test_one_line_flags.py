"""A mistyped command line of fairseq-moe ends in one line and status 2, as those of fairseq."""

import argparse
import shlex

import pytest

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
        ("evaluate data --path x --ca 1 --c 2", "ambiguous"),
        ("prepare --corpsu a=b", "--corpsu"),
        ("convert a b --to brnch", "did you mean branch?"),
        ("user-dir --x", "--x"),
        ("priming --taks x", "required"),
    ],
)
def test_mistakes_in_one_line(capsys, line, words):
    assert words in refused(capsys, line)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_of_an_unknown_flag_in_one_line(capsys, command):
    assert "--no-such-flag" in refused(capsys, f"{command} --no-such-flag") or command != "user-dir"
    assert "error: " in refused(
        capsys, f"{command} 'two\nlines' --no-such-flag 'two\nlines' --json"
    )


def test_lm_evals_own_parser_is_told_as_well():
    parser = argparse.ArgumentParser(prog="lm-eval")
    parser.add_argument("--tasks")
    told = flag_mistake(parser, "unrecognized arguments: --taskss a\nb")
    assert told == "unrecognized arguments: --taskss a b; did you mean --tasks? (flags: --help)"


def test_help_is_whole(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--help"])
    assert stop.value.code == 0 and "--markdown" in capsys.readouterr().out
    assert issubclass(OneLineParser, argparse.ArgumentParser)
