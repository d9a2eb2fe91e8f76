"""Shows texts on the terminal: streamed, as blocks, or of two models in columns."""

import shutil
import sys
import textwrap
from typing import Callable, List, NamedTuple, Sequence

_GAP = " │ "


class Written(NamedTuple):
    """What one model wrote for one prompt."""

    model: str
    prompt: str
    texts: List[str]
    tokens: List[int]  # how many each text took


def piece(text: str) -> None:
    """Show a piece of a text that continues."""
    sys.stdout.write(text)
    sys.stdout.flush()


def after(prompt: str) -> Callable[[str], None]:
    """Like `piece`, with the prompt before the first one: a mistake in it shows no prompt."""
    waiting = [prompt]

    def show(text: str) -> None:
        piece((waiting.pop() if waiting else "") + text)

    return show


def blocks(prompt: str, texts: Sequence[str], number: int, prompts: int) -> str:
    """The texts of a prompt, each below a heading if there are several."""
    parts = []
    for sample, text in enumerate(texts, 1):
        words = [f"prompt {number} of {prompts}"] if prompts > 1 else []
        words += [f"text {sample} of {len(texts)}"] if len(texts) > 1 else []
        head = f"── {', '.join(words)} ──\n" if words else ""
        parts.append(f"{head}{prompt}{text}\n")
    return "\n".join(parts)


def columns(left: str, right: str, heads: Sequence[str], width: int = 0) -> str:
    """Two texts beside each other, below their headings.

    Args:
        width: of both together (default: of the terminal).
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    column = max(20, (width - len(_GAP)) // 2)
    sides = [
        [*_wrapped(head, column), "─" * column, *_wrapped(text, column)]
        for head, text in zip(heads, (left, right))
    ]
    height = max(map(len, sides))
    rows = zip(*([*side, *[""] * (height - len(side))] for side in sides))
    return "".join(f"{a:<{column}}{_GAP}{b}".rstrip() + "\n" for a, b in rows)


def _wrapped(text: str, width: int) -> List[str]:
    """Wrap to lines of at most `width` characters; the text's own line breaks are kept."""
    return [
        part
        for line in text.expandtabs(4).split("\n")
        for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]
    ]
