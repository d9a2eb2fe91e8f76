"""`fairseq-moe completion`: a shell's completion of commands, flags, their choices, and files."""

import argparse
import importlib
from typing import Dict, List

import fairseq_moe_command

Flags = Dict[str, List[str]]  # flag, or "" for the first argument -> what it takes; []: anything

# Without an answer of the function the shell completes files.
_BASH = """_fairseq_moe() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    local flags="" choices=""
    COMPREPLY=()
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "${{COMP_WORDS[1]}} $before" in
{choices}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$flags --help" -- "$word")) ;;
        *) [ -z "$choices" ] || COMPREPLY=($(compgen -W "$choices" -- "$word")) ;;
    esac
}}
complete -o default -F _fairseq_moe fairseq-moe
"""
_ZSH = """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -U +X bashcompinit && bashcompinit
"""
_SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the lines that complete commands, flags and files in a shell."
    parser.add_argument("shell", choices=_SHELLS, help="the shell that reads the lines")


def run(args: argparse.Namespace) -> None:
    print(script(args.shell, flags()), end="")


def flags() -> Dict[str, Flags]:
    """The long flags of each command."""
    commands: Dict[str, Flags] = {}
    _, parsers = fairseq_moe_command.parser(argparse.ArgumentParser)
    for name, parser in parsers.items():
        if name != fairseq_moe_command.LM_EVAL:
            module = fairseq_moe_command.COMMANDS[name].module
            importlib.import_module(f"fairseq_moe_ext.{module}").add_arguments(parser)
        commands[name] = {
            flag: [str(choice) for choice in action.choices or ()]
            for action in parser._actions
            for flag in action.option_strings or [""]
            if flag.startswith("--") or (not flag and action.choices)
        }
    return {**commands, "user-dir": {}, "config-dir": {}}


def script(shell: str, commands: Dict[str, Flags]) -> str:
    """What a shell is to read, given the flags of each command."""
    if shell == "fish":
        return _fish(commands)
    cases, choices = [], []
    for name, of in commands.items():
        cases.append(f'        {name}) flags="{" ".join(sorted(filter(None, of)))}" ;;')
        for flag, values in of.items():
            if values:
                choices.append(f'        "{name} {flag or name}") choices="{" ".join(values)}" ;;')
    text = _BASH.format(
        commands=" ".join(commands),
        cases="\n".join(cases),
        choices="\n".join(choices) or "        *) ;;",
    )
    return (_ZSH if shell == "zsh" else "") + text


def _fish(commands: Dict[str, Flags]) -> str:
    first = "complete -c fairseq-moe -n __fish_use_subcommand"
    lines = [f"{first} -f -a '{' '.join(commands)}'", f"{first} -l help", f"{first} -l version"]
    for name, of in commands.items():
        behind = f"complete -c fairseq-moe -n 'contains -- {name} (commandline -opc)[2]'"
        for flag, values in of.items():
            takes = f" -x -a '{' '.join(values)}'" if values else ""
            lines.append(f"{behind} -l {flag[2:]}{takes}" if flag else f"{behind}{takes[3:]} -f")
    return "\n".join(lines) + "\n"
