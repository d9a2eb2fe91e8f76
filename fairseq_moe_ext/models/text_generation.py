"""Generates text from prompts: encodes and decodes tokens, finds where a text ends, and streams
it."""

from __future__ import annotations

from random import Random, SystemRandom
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

from ..errors import UserError
from .next_token import LIKELIEST, Choice
from .search import Generator, Prompt, no_text

DEFAULT_TOKENS = 128
_INCOMPLETE = "\ufffd"  # a character whose bytes are not complete yet
_MOST = 1024  # texts of a prompt, hypotheses of a search

Stream = Callable[[str], object]  # takes each further piece of the text


class Settings(NamedTuple):
    """What to generate for each prompt, and how."""

    max_tokens: Optional[int] = None  # None: DEFAULT_TOKENS, or the rest of the context
    stop: Tuple[str, ...] = ()  # a text ends before any of these
    choice: Choice = LIKELIEST
    beams: int = 1  # above 1: beam search for the most likely text
    seed: int = 1  # of sampling
    n: int = 1  # texts of each prompt

    def check(self, spell: Callable[[str], str] = str) -> None:
        """Raise UserError for invalid settings; `spell`: a field as the user writes it."""
        self.choice.check(spell)
        samples = self.choice.temperature > 0
        for name, low, high in (
            ("max_tokens", 1, 2**20), ("beams", 1, _MOST), ("n", 1, _MOST), ("seed", 0, 2**63)
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{spell(name)} {value}: use a whole number from {low} to {high:,}")
        if "" in self.stop:
            raise UserError(f"{spell('stop')}: an empty text matches everywhere; name another")
        if self.beams > 1 and samples:
            raise UserError(
                f"{spell('beams')} {self.beams}: a beam search takes the most likely text and "
                f"does not sample; remove it, or {spell('temperature')}, top-k and top-p"
            )
        if self.n > self.beams and not samples:
            raise UserError(
                f"{spell('n')} {self.n}: without sampling all texts are the same; add "
                f"{spell('temperature')} 1, or as many {spell('beams')}"
            )


def settings_of(
    spell: Callable[[str], str] = str,
    *,
    max_tokens: Optional[int] = None,
    stop: Union[str, Sequence[str]] = (),
    temperature: Optional[float] = None,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    beams: int = 1,
    seed: Optional[int] = None,
    n: int = 1,
) -> Settings:
    """Settings from the names that users know. Raises UserError for invalid ones.

    Args:
        spell: a name as the user writes it.
        temperature: default: 1 if another setting needs sampling (top_k, top_p, n above beams),
            otherwise 0.
        seed: default: a new one each time.
    """
    if temperature is None:
        temperature = float(top_k != 0 or top_p != 1 or n > beams)
    choice = Choice(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if seed is None:
        seed = SystemRandom().randrange(2**32)
    settings = Settings(max_tokens, stop, choice, beams, seed, n)
    settings.check(spell)
    return settings


class Continuation(NamedTuple):
    """A generated text."""

    text: str  # without the prompt and without what it stopped at
    tokens: Tuple[int, ...]  # all generated tokens, including the end


def generate(
    lm: Any,
    prompts: Sequence[str],
    settings: Settings,
    stream: Optional[Stream] = None,
    batch_tokens: int = 16384,
    spell: Callable[[str], str] = str,
    first: int = 1,
) -> List[List[Continuation]]:
    """The n texts of each prompt.

    Args:
        lm: hub.LanguageModelHub.
        stream: called with each new piece of the text; needs one prompt, one text and no beams.
        batch_tokens: tokens per batch, including padding.
        spell: a setting as the user writes it.
        first: number of the first prompt; each number has draws of its own.

    Raises:
        UserError: a prompt without room in the context, or of which the dictionary knows nothing;
            a model that is not one of ours.
    """
    if len(lm.models) > 1 or not hasattr(lm.models[0].decoder, "pad_rule"):
        what = f"{len(lm.models)} models" if len(lm.models) > 1 else type(lm.models[0]).__name__
        raise UserError(
            f"generate: takes one model of this plugin, not {what}: name one, or convert one of "
            "fairseq's own with `fairseq-moe convert`"
        )
    writers = [_Writer(lm, prompt, settings.stop, stream) for prompt in prompts]
    rows: List[Prompt] = []
    samples = settings.n if settings.choice.temperature > 0 else 1
    for number, writer in enumerate(writers, 1):
        max_new = _room(lm, settings, writer.prompt, f"prompt {number} of {len(prompts)}", spell)
        for sample in range(samples):
            random = _draws(settings, sample, first + number - 1)
            rows.append(Prompt(writer.prompt, max_new, writer.ends, random))
    search = Generator(
        lm.models[0],
        settings.beams,
        batch_tokens,
        "generating" if len(rows) > 1 else "",
        choice=settings.choice,
        never=no_text(lm.models[0], lm.bpe is not None),
        starts_with=lm.first_token,
    )
    hypotheses = search.best(rows)
    texts = []
    for i, writer in enumerate(writers):
        best = [
            hypothesis for row in hypotheses[i * samples : (i + 1) * samples] for hypothesis in row
        ]
        texts.append([Continuation(writer.text(new), tuple(new)) for new in best[: settings.n]])
        if stream is not None:
            writer.show(texts[-1][0].text, final=True)
    return texts


def _draws(settings: Settings, sample: int, number: int) -> Optional[Random]:
    """The random numbers of one text of prompt `number`, from 1; None: it is not sampled. They
    depend neither on the batch nor on PyTorch's version."""
    if not settings.choice.temperature:
        return None
    own = f"/{number}" if number > 1 else ""  # the first prompt's are those of version 0.2
    return Random(f"{settings.seed}/{sample}{own}")


def _room(
    lm: Any, settings: Settings, prompt: Sequence[int], which: str, spell: Callable[[str], str]
) -> int:
    """New tokens that a prompt may get."""
    longest = int(lm.models[0].max_positions())
    room = longest - len(prompt)
    if room < 1:
        raise UserError(
            f"{which} has {len(prompt):,} tokens, but the model takes {longest - 1:,}: shorten it"
        )
    if settings.max_tokens is None:
        return min(DEFAULT_TOKENS, room)
    if settings.max_tokens > room:
        raise UserError(
            f"{spell('max_tokens')} {settings.max_tokens}: {which} has {len(prompt):,} tokens, "
            f"which leaves {room:,} of the model's {longest:,}: lower it, or shorten the prompt"
        )
    return settings.max_tokens


class _Writer:
    """The text of a prompt's new tokens, and where it ends."""

    def __init__(
        self, lm: Any, prompt: str, stop: Sequence[str], stream: Optional[Stream] = None
    ) -> None:
        self._lm = lm
        self._eos = lm.tgt_dict.eos()
        self.prompt = tuple(lm.encode(prompt).tolist()[:-1])
        # spaces join words, also the first new word to the prompt's last; lines are independent
        line = self.prompt[::-1]
        length = line.index(self._eos) if self._eos in line else len(line)
        self._line = self.prompt[len(self.prompt) - length :]
        self._before = len(self._decode(()))
        self._stop = stop
        self._stream = stream
        self._shown = ""

    def ends(self, new: Sequence[int]) -> bool:
        """Whether the new tokens contain a stop text. Streams the part of the text that is
        final."""
        if not self._stop and self._stream is None:
            return False
        whole = self._decode(new)[self._before :]
        text = cut_before(whole, self._stop)
        if self._stream is not None:
            self.show(text, final=len(text) < len(whole))
        return len(text) < len(whole)

    def text(self, new: Sequence[int]) -> str:
        return cut_before(self._decode(new)[self._before :], self._stop)

    def show(self, text: str, final: bool) -> None:
        """Stream the new part of a text. Unless it is final, hold back incomplete characters and
        what may become a stop text."""
        if not final:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - max((_overlap(text, s) for s in self._stop), default=0)]
        if self._stream is not None and len(text) > len(self._shown):
            self._stream(text[len(self._shown) :])
            self._shown = text

    def _decode(self, new: Sequence[int]) -> str:
        return self._lm.decode([*self._line, *new, self._eos])


def cut_before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts in it."""
    starts = [text.find(stop) for stop in stops]
    return text[: min([start for start in starts if start >= 0], default=len(text))]


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that `stop` starts with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
