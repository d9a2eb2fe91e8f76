"""`fairseq-moe generate`: the flags, and the order of the steps."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

from .. import files, outputs, tokenizer_files
from ..errors import UserError, require_positive
from ..evaluation.loading import (
    add_model_flags,
    check_path,
    most_tokens,
    on_device,
    parse_overrides,
)
from ..models.language_model import MoETransformerLanguageModel
from ..models.text_generation import Settings, generate, settings_of
from ..prepare import gpt2_files
from ..wording import count, flag
from . import prompts, session, showing
from .showing import Written

DESCRIPTION = """\
Continue prompts with a model, token by token.

Prompts are arguments, files (--file) or stdin, and may be several lines long. A newline is </s> to
these models, so generation goes on through it until --max-tokens or --stop. By default each token
is the likeliest one; --temperature, --top-k, --top-p or --n sample. The text goes to stdout, the
rest to stderr. The tokenizer is found beside the checkpoint, or in the data folder that it was
trained on; --data names another folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "words", nargs="*", metavar="CHECKPOINT [PROMPT]",
        help="the checkpoint, as for fairseq-eval-lm's --path, then prompts",
    )  # fmt: skip
    parser.add_argument("--path", type=Path, help="the checkpoint; all arguments are then prompts")
    text = parser.add_argument_group("prompts")
    text.add_argument(
        "--file", "-f", type=Path, action="append", default=[],
        help="a file with a prompt (- for stdin); in JSON Lines (.jsonl) each line is a prompt, "
            "\"...\" or {\"prompt\": \"...\"}; may be repeated",
    )  # fmt: skip
    text.add_argument(
        "--separator", metavar="LINE", help="a line that separates prompts in --file or stdin"
    )
    text.add_argument(
        "--interactive", "-i", action="store_true",
        help="write a text in turns: each line that you type is appended to all text so far",
    )  # fmt: skip
    _add_search(parser.add_argument_group("search"))
    _add_output(parser.add_argument_group("output"))
    model = parser.add_argument_group("model")
    model.add_argument("--data", type=Path, help="folder with dict.txt and the tokenizer's files")
    model.add_argument(
        "--bpe", choices=["gpt2"],
        help="GPT-2's tokenizer, with the files of the next two flags, or of an installed package",
    )  # fmt: skip
    model.add_argument("--gpt2-encoder-json", type=Path, metavar="FILE", help="its encoder.json")
    model.add_argument("--gpt2-vocab-bpe", type=Path, metavar="FILE", help="its vocab.bpe")
    add_model_flags(model, "--fp16")
    model.add_argument(
        "--experts-on-disk", action="store_true",
        help="leave the experts in the checkpoint's files, and read one when a token needs it",
    )  # fmt: skip


def _add_search(group: Any) -> None:
    group.add_argument(
        "--max-tokens", type=int, metavar="N",
        help="new tokens per text (default: 128, or the rest of the context)",
    )  # fmt: skip
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help=r"end before this text; \n and \t stand for newline and tab; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=float, metavar="T",
        help="divide the logits by this and sample; 0: take the most likely token (default: 1 "
            "with --top-k, --top-p or --n, else 0)",
    )  # fmt: skip
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="sample from the most likely tokens that together have this probability",
    )  # fmt: skip
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="F",
        help="divide positive logits of tokens already in the prompt or the text by this, and "
        "multiply negative ones (default: 1, off)",
    )  # fmt: skip
    group.add_argument(
        "--no-repeat-ngram-size", type=int, default=0, metavar="N",
        help="repeat no sequence of N tokens from the prompt or the text (default: 0, off)",
    )  # fmt: skip
    group.add_argument(
        "--beams", type=int, default=1, metavar="N",
        help="beam search for the most likely text, with this many hypotheses",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, help="seed of sampling (default: a new one, printed at the end)"
    )
    group.add_argument(
        "--n", type=int, default=1, help="texts of each prompt: samples, or the best of --beams"
    )
    group.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N",
        help="tokens in a batch of prompts (default: 16384)",
    )  # fmt: skip


def _add_output(group: Any) -> None:
    group.add_argument(
        "--side-by-side", type=Path, metavar="CHECKPOINT",
        help="show the text of another model side by side",
    )  # fmt: skip
    group.add_argument(
        "--no-prompt", action="store_true", help="print only the new text, without the prompt"
    )
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all texts to this file"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the file of --json")


def run(args: argparse.Namespace) -> None:
    """Raises UserError for invalid flags, files and prompts, if possible before a model is
    loaded."""
    checkpoints, words = _checkpoints(args)
    settings = _settings(args)
    _check(args, checkpoints, words)
    if args.interactive:
        _interact(args, checkpoints[0], settings)
    else:
        texts = prompts.read(words, args.file, args.separator)
        _write(args, checkpoints, texts, settings)
    if settings.choice.temperature > 0 and args.seed is None:
        _say(f"repeat with --seed {settings.seed}")


def _checkpoints(args: argparse.Namespace) -> Any:
    """The checkpoints, and the arguments that are prompts."""
    words = list(args.words)
    if args.path is None and not words:
        raise UserError(
            "no model given: name its checkpoint first: fairseq-moe generate CHECKPOINT"
        )
    first = args.path if args.path is not None else Path(words.pop(0))
    return [first] + ([args.side_by_side] if args.side_by_side is not None else []), words


def _settings(args: argparse.Namespace) -> Settings:
    names = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "beams", "seed")
    wanted = {name: getattr(args, name) for name in (*names, "no_repeat_ngram_size", "n")}
    return settings_of(flag, stop=[prompts.unescaped(stop) for stop in args.stop], **wanted)


def _check(args: argparse.Namespace, checkpoints: List[Path], words: List[str]) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "generate runs on one process: start it without torchrun; --experts-on-disk is for "
            "models that do not fit into memory"
        )
    if args.interactive:
        for other, given in (
            ("a prompt", words), ("--file", args.file), ("--side-by-side", args.side_by_side),
            ("--json", args.json), ("--n", args.n > 1), ("--beams", args.beams > 1),
            ("--separator", args.separator is not None), ("--no-prompt", args.no_prompt),
        ):  # fmt: skip
            if given:
                raise UserError(
                    f"--interactive: cannot be combined with {other}; remove one of them"
                )
        if sys.stdin is None:
            raise UserError("--interactive: stdin is closed; start it from a terminal or a pipe")
    if args.separator is not None and not prompts.has_text(words, args.file):
        raise UserError(
            "--separator: separates prompts in stdin or in a --file of text; add one, or remove it"
        )
    if args.overwrite and args.json is None:
        raise UserError("--overwrite: without --json there is nothing to replace; remove it")
    require_positive(args, "batch_tokens")
    if (args.gpt2_encoder_json is None) != (args.gpt2_vocab_bpe is None):
        raise UserError("--gpt2-encoder-json and --gpt2-vocab-bpe go together: give both")
    if args.bpe is not None and args.gpt2_encoder_json is None:
        args.gpt2_encoder_json, args.gpt2_vocab_bpe = gpt2_files.find("--bpe gpt2")
    for name in ("gpt2_encoder_json", "gpt2_vocab_bpe"):
        if getattr(args, name) is not None:
            files.check(getattr(args, name), f"{flag(name)} {getattr(args, name)}")
    for path, named in zip(checkpoints, ("--path" if args.path else "", "--side-by-side")):
        check_path(path, named)
        _check_room(args, path)
    outputs.check([("--json", args.json)], args.overwrite, [*checkpoints, *args.file])


def _check_room(args: argparse.Namespace, path: Path) -> None:
    """Raise UserError if not even an empty prompt leaves room for --max-tokens. It looks at the
    settings alone."""
    if args.max_tokens is None:
        return
    most = most_tokens(path, parse_overrides(args.model_overrides))
    if most is not None and args.max_tokens > most:
        raise UserError(
            f"--max-tokens {args.max_tokens}: {path} takes {most:,} tokens, those of the prompt "
            "included; lower it"
        )


def load(args: argparse.Namespace, path: Path) -> Any:
    """The model of a checkpoint with its tokenizer, as from_pretrained gives it."""
    own_bpe = args.gpt2_encoder_json is not None
    data = tokenizer_files.folder_for(path, args.data, check_bpe=not own_bpe).resolve()
    settings: Dict[str, Any] = dict(parse_overrides(args.model_overrides))
    if own_bpe:
        settings.update(
            bpe="gpt2",
            gpt2_encoder_json=str(args.gpt2_encoder_json),
            gpt2_vocab_bpe=str(args.gpt2_vocab_bpe),
        )
    if args.experts_on_disk:
        settings["moe_experts_on_disk"] = True
    lm = MoETransformerLanguageModel.from_pretrained(
        str(path.parent), path.name, str(data), **settings
    )
    lm.eval()
    return on_device(lm.half() if args.fp16 else lm, args.cpu)


def _interact(args: argparse.Namespace, path: Path, settings: Settings) -> None:
    talk = session.Session(load(args, path), settings)
    started = time.monotonic()
    session.run(talk)
    _say(
        f"{count(talk.tokens, 'token')} in {time.monotonic() - started:.1f} s, including your "
        "typing"
    )


def _write(
    args: argparse.Namespace, checkpoints: List[Path], texts: List[str], settings: Settings
) -> None:
    several = len(texts) > 1 or settings.n > 1 or settings.beams > 1 or len(checkpoints) > 1
    all_written, reports = [], []
    for path in checkpoints:
        lm = load(args, path)
        started = time.monotonic()
        stream = None if several else showing.after("" if args.no_prompt else texts[0])
        answers = generate(lm, texts, settings, stream, args.batch_tokens, flag)
        if stream is not None:
            stream("\n")
        seconds = time.monotonic() - started
        tokens = sum(len(one.tokens) for some in answers for one in some)
        reports.append(_speed(tokens, seconds, path if len(checkpoints) > 1 else None))
        all_written.append(
            [
                Written(str(path), prompt, [t.text for t in some], [len(t.tokens) for t in some])
                for prompt, some in zip(texts, answers)
            ]
        )
        del lm  # before the next is loaded
    if several:  # before the file, which may fail
        showing.piece(_shown(all_written, args.no_prompt))
    if args.json is not None:
        outputs.write_json(args.json, [one._asdict() for some in all_written for one in some])
    for report in reports:
        _say(report)


def _shown(all_written: Sequence[Sequence[Written]], no_prompt: bool) -> str:
    parts = []
    for number, written in enumerate(zip(*all_written), 1):
        prompt = "" if no_prompt else written[0].prompt
        if len(written) == 1:
            parts.append(showing.blocks(prompt, written[0].texts, number, len(all_written[0])))
            continue
        heads = [one.model for one in written]
        for left, right in zip(written[0].texts, written[1].texts):
            parts.append(showing.columns(prompt + left, prompt + right, heads))
    return "\n".join(parts)


def _speed(tokens: int, seconds: float, path: Any) -> str:
    head = f"{path}: " if path is not None else ""
    rate = tokens / max(seconds, 1e-9)
    return f"{head}{count(tokens, 'token')} in {seconds:.1f} s, {rate:,.1f} tokens/s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
