"""`fairseq-moe completion`: a shell's completion of commands, flags and files."""

import argparse
import importlib
from typing import Dict, List

import fairseq_moe_command

_BASH = """_fairseq_moe() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" flags=""
    COMPREPLY=()
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$flags --help" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _fairseq_moe fairseq-moe
"""
_SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the lines that complete commands, flags and files in a shell."
    parser.add_argument("shell", choices=_SHELLS, help="the shell that reads the lines")


def run(args: argparse.Namespace) -> None:
    print(script(args.shell, flags()), end="")


def flags() -> Dict[str, List[str]]:
    """The long flags of each command."""
    found = {}
    _, parsers = fairseq_moe_command.parser(argparse.ArgumentParser)
    for name, parser in parsers.items():
        if name != fairseq_moe_command.LM_EVAL:
            module = fairseq_moe_command.COMMANDS[name].module
            importlib.import_module(f"fairseq_moe_ext.{module}").add_arguments(parser)
        options = parser._option_string_actions
        found[name] = sorted(flag for flag in options if flag.startswith("--"))
    return {**found, "user-dir": [], "config-dir": []}


def script(shell: str, found: Dict[str, List[str]]) -> str:
    """What a shell is to read, given the flags of each command."""
    if shell == "fish":
        lines = [f"complete -c fairseq-moe -n __fish_use_subcommand -f -a '{' '.join(found)}'"]
        for name, options in found.items():
            behind = f"complete -c fairseq-moe -n '__fish_seen_subcommand_from {name}'"
            lines += [f"{behind} -l {flag[2:]}" for flag in options]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'        {name}) flags="{" ".join(of)}" ;;' for name, of in found.items())
    bash = _BASH.format(commands=" ".join(found), cases=cases)
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + bash
