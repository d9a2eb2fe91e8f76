"""--interactive: a text that user and model write in turns."""

import contextlib
import sys
from typing import Any, Callable, List, Optional

from ..errors import UserError
from ..models.text_generation import DEFAULT_TOKENS, Continuation, Settings, generate
from .prompts import checked
from .showing import piece

HELP = """\
Type a line; the model continues it, after all text so far. After an empty line it continues its
own text. A line that ends in \\ continues on the next line. /new starts a new text, /text shows the
text, /quit or Ctrl-D ends. Ctrl-C stops the model.
"""


class Session:
    """The text so far."""

    def __init__(self, lm: Any, settings: Settings) -> None:
        self.lm = lm
        self.settings = settings
        self.text = ""
        self.tokens = 0  # that the model wrote
        self.turns = 0

    def turn(self, line: str) -> None:
        """Add a line, and the model's continuation, which is streamed."""
        separate = self.text and line and not self.text.endswith("\n")
        self.text = self._fitted(self.text + ("\n" if separate else "") + line)
        shown: List[str] = []

        def show(text: str) -> None:
            shown.append(text)
            piece(text)

        self.turns += 1
        with contextlib.suppress(KeyboardInterrupt):
            continuations: List[List[Continuation]] = generate(
                self.lm, [self.text], self.settings, show, first=self.turns
            )
            self.tokens += len(continuations[0][0].tokens)
        self.text += "".join(shown)
        piece("\n")

    def _fitted(self, text: str) -> str:
        """The text without as many first lines or words as do not fit."""
        longest = int(self.lm.models[0].max_positions())
        new = self.settings.max_tokens or min(DEFAULT_TOKENS, longest // 2)
        whole = text
        while len(self.lm.encode(text)) - 1 > max(1, longest - new):
            text = text.partition("\n")[2] or text.partition(" ")[2] or text[1:]
        if text != whole:
            left_out = f"the first {len(whole) - len(text):,} characters no longer fit"
            print(f"({left_out} into the model's context)", file=sys.stderr)
        return text


def run(session: Session, read: Optional[Callable[[], Optional[str]]] = None) -> None:
    """Take turns until the lines end."""
    read = read or _reader()
    while True:
        line = read()
        while line is not None and line.endswith("\\"):
            more = read()
            line = line[:-1] + "\n" + (more or "")
        if line is None or line.strip() == "/quit":
            return
        if line.strip() == "/new":
            session.text = ""
        elif line.strip() == "/text":
            piece(session.text + "\n")
        elif line.strip() == "/help":
            print(HELP, end="", file=sys.stderr)
        elif line or session.text:
            session.turn(line)


def _reader() -> Callable[[], Optional[str]]:
    """A function that gives the next line, or None at the end."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys, and the lines before
        print(HELP, end="", file=sys.stderr)

    def read() -> Optional[str]:
        try:
            line = input("> " if on_terminal else "")
            return checked(line.removeprefix("\ufeff"))  # the byte order mark of a file
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise UserError("stdin: not UTF-8; convert it to UTF-8") from None

    return read
