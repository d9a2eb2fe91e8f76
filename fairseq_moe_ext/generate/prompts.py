"""Prompts from arguments, files and stdin. They may be several lines long."""

import sys
from pathlib import Path
from typing import List, Optional, Sequence

from .. import files
from ..errors import UserError

_KEYS = ("prompt", "text")  # of an object of JSON Lines
_LINES = (".jsonl", ".ndjson")


def read(words: Sequence[str], paths: Sequence[Path], separator: Optional[str]) -> List[str]:
    """All prompts: the arguments, then those of files; of stdin ("-") where neither is there.

    Args:
        separator: a line that separates prompts in files and stdin; None: each is one prompt.

    Raises:
        UserError: no prompt, a file that cannot be read, or text that is not UTF-8.
    """
    prompts = [checked(word) for word in words]
    if not words and not paths:
        paths = [Path("-")]
    for path in paths:
        prompts += _in_file(path, separator)
    if not prompts:
        raise _no_prompt()
    return prompts


def has_text(words: Sequence[str], paths: Sequence[Path]) -> bool:
    """Whether `read` takes prompts from a text: stdin, or a file that is not of JSON Lines."""
    return any(path.suffix.lower() not in _LINES for path in paths) or not (words or paths)


def _no_prompt(where: str = "") -> UserError:
    return UserError(
        f'no prompt given{where}: pass one ("" for a text from its beginning), or use --file FILE '
        "or --interactive"
    )


def unescaped(text: str) -> str:
    r"""\n, \t and \\ of a flag as the characters that they stand for."""
    for written, meant in (("\\\\", "\0"), ("\\n", "\n"), ("\\t", "\t"), ("\0", "\\")):
        text = text.replace(written, meant)
    return text


def _in_file(path: Path, separator: Optional[str]) -> List[str]:
    if str(path) != "-":
        text = files.read_text(path, f"--file {path}", "utf-8-sig")
    elif sys.stdin is None or sys.stdin.isatty():
        raise _no_prompt()
    else:
        text = _stdin()
    if not text:
        raise _no_prompt(f": {'stdin' if str(path) == '-' else f'--file {path}'} is empty")
    if _is_lines(path, text):
        # not splitlines: JSON may hold U+2028 and the like as they are
        lines = enumerate(text.split("\n"), 1)
        return [_of_line(path, n, line) for n, line in lines if line.strip()]
    if separator is None:
        return [text.removesuffix("\n")]
    prompts: List[List[str]] = [[]]
    for line in text.removesuffix("\n").split("\n"):
        if line == separator:
            prompts.append([])
        else:
            prompts[-1].append(line)
    return ["\n".join(lines) for lines in prompts]


def _is_lines(path: Path, text: str) -> bool:
    """Whether a file is JSON Lines: by its name, or, if that ends in .json, by its first line."""
    suffix = path.suffix.lower()
    if suffix != ".json":
        return suffix in _LINES
    try:
        first = files.parse_json(text.lstrip().partition("\n")[0])
    except ValueError:
        return False
    return isinstance(first, dict) and not first.keys().isdisjoint(_KEYS)


def _stdin() -> str:
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    return files.text_of(data, "stdin", "utf-8-sig")


def _of_line(path: Path, number: int, line: str) -> str:
    """A prompt of JSON Lines: a string, or an object with one."""
    try:
        value = files.parse_json(line)
    except ValueError as error:
        raise UserError(f"--file {path}, line {number}: not JSON ({error})") from None
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), None)
    if not isinstance(value, str):
        raise UserError(
            f'--file {path}, line {number}: no prompt; write "...", {{"prompt": "..."}} or '
            '{"text": "..."}'
        )
    return value


def checked(word: str) -> str:
    """A prompt. Raises UserError for one with bytes that are not UTF-8."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"prompt {word!r}: not UTF-8; convert it to UTF-8") from None
    return word
