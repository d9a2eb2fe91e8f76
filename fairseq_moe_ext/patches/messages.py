"""One-line messages for exceptions of fairseq, torch or Python that a user's mistake causes."""

import os
import re
import sys
import traceback
from pathlib import Path
from typing import List, Optional

from fairseq_today.errors import UserError, first_line

from .. import data_bin, files
from ..errors import less_memory, out_of_memory


def debugging() -> bool:
    """Whether errors are to keep their traceback."""
    return os.environ.get("LOGLEVEL", "").upper() == "DEBUG"


def mistake_to_print(error: BaseException) -> Optional[str]:
    """The user's mistake that causes an exception, in one line; None if there is none, or with
    LOGLEVEL=DEBUG."""
    if debugging():
        return None
    if isinstance(error, OSError):
        missing = _missing_file(error)
        if missing is not None:
            return missing
    # A process that fairseq spawned for a GPU reports its exception as text (`run_process`).
    if type(error).__name__ == "ProcessRaisedException":
        mistakes = re.findall(r"^[\w.]+\.UserError: (.+)$", str(error), re.M)
        return mistakes[-1] if mistakes else None
    # fairseq_cli/score.py:42@0.12.2, though "--sys -" is fine
    absent = re.fullmatch(r"(?:System output|Reference) file (.+) does not exist", str(error))
    if absent and isinstance(error, AssertionError):
        return f"{absent[1]}: no such file (--sys, --ref)"
    chain: List[BaseException] = []
    cause: Optional[BaseException] = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    # "Cannot load model parameters" hides the error that says why (fairseq/trainer.py:581@0.12.2).
    ours = [str(error) for error in chain if isinstance(error, UserError)]
    others = (_lost_process, _out_of_memory, _not_installed, _not_text, _said_by_fairseq)
    said = (tell(error) for error in chain for tell in others)
    return next(filter(None, [*ours, *said]), None)


def in_one_line(text: str) -> str:
    """Hydra's or omegaconf's message without its notes, with commas between listed options."""
    text = re.split(r"\n\s*(?:full_key|object_type|Config search path|See https)\b", text)[0]
    text = re.sub(r"\n\t", ", ", text.strip())
    return re.sub(r"\s*\n\s*", "; ", text).replace(":, ", ": ")


_LOST = re.compile(  # messages of Gloo, NCCL and the rendezvous after a process has ended
    r"third_party/gloo|gloo/transport|Application timeout caused pair closure|"
    r"Connection closed by peer|ncclRemoteError|Watchdog caught collective operation timeout"
)


def _lost_process(error: BaseException) -> Optional[str]:
    """One line for a collective that failed because another process ended or does not answer, else
    None."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    cause = re.sub(r"^\[\S+\]\s*", "", first_line(error)).split(". This is")[0]
    return (
        f"another process has stopped or no longer answers ({cause}): see its own log; the same "
        "command resumes from the last checkpoint"
    )


def _out_of_memory(error: BaseException) -> Optional[str]:
    """One line where a tensor did not fit, else None; in training first what leaves an update as it
    is."""
    command = os.path.basename(sys.argv[0])
    training = "{}, or halve {} (or {}) and double {}; "
    training += "docs/scaling.md#fit-a-model-on-your-gpus has more"
    if "hydra" in command:
        remedy = training.format(
            "set model.checkpoint_activations=true",
            "dataset.batch_size",
            "dataset.max_tokens",
            "optimization.update_freq",
        )
    elif "train" in command:
        remedy = training.format(
            "add --checkpoint-activations", "--batch-size", "--max-tokens", "--update-freq"
        )
    elif "preprocess" in command:
        remedy = "lower --workers"
    else:
        remedy = less_memory(["--batch-size", "--max-tokens", "--tokens-per-sample"], on_disk=True)
    return out_of_memory(error, remedy)


_PLAIN = (AssertionError, Exception, NotImplementedError, RuntimeError, TypeError, ValueError)


def _said_by_fairseq(error: BaseException) -> Optional[str]:
    """What a `raise` or `assert` in fairseq's own files says, in one line, and where; else None.

    These are fairseq's own messages about a user's mistake, used if this plugin has no better one.
    An exception that Python or torch raises within fairseq keeps its traceback.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if type(error) not in _PLAIN or not frames:
        return None
    last = frames[-1]
    source = re.search(r"\bsite-packages/(fairseq(_cli)?/.+)", last.filename)
    deliberate = isinstance(error, AssertionError) or (last.line or "").startswith("raise")
    if source is None or not deliberate:
        return None
    said = in_one_line(str(error)) or str(last.line)
    said = said if len(said) < 400 else f"{said[:200]} ... {said[-200:]}"
    return f"{said} ({source[1]}:{last.lineno}; LOGLEVEL=DEBUG shows more)"


def _not_text(error: BaseException) -> Optional[str]:
    """One line for an --input not in UTF-8 (fairseq_cli/interactive.py:44@0.12.2), else None."""
    if isinstance(error, UnicodeDecodeError):
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.endswith("fileinput.py"):
                name = frame.f_locals["self"].filename()
                return f"{name}: not UTF-8 ({error.reason}); write it in that encoding"
    return None


def _not_installed(error: BaseException) -> Optional[str]:
    """fairseq's message about a missing package that a flag needs, else None."""
    wanted = isinstance(error, ImportError) and re.search(r"\binstall\b", str(error))
    return first_line(error) if wanted else None


def _missing_file(error: OSError) -> Optional[str]:
    """A line about a file that fairseq does not find: the files in its folder, or how to make
    it."""
    text = str(error)
    if text.startswith("Model file not found: "):  # fairseq/checkpoint_utils.py:423@0.12.2
        path = Path(text[len("Model file not found: ") :])
        return f"{path}: no such checkpoint; {_there_are(path.parent, '.pt')}"
    unfound = re.match(r"file (.+) not found$", text)
    if unfound:  # fairseq/file_utils.py:180@0.12.2
        return f"{unfound[1]}: no such file or folder"
    if not isinstance(error, FileNotFoundError):
        if error.filename is None:
            return None
        name = os.fsdecode(error.filename)
        shown = name if len(name) < 200 else f"{name[:100]}...{name[-20:]}"
        return f"{shown}: {error.strerror}"
    dataset = re.match(r"Dataset not found: .+ \((.+)\)$", text)
    if dataset:  # fairseq/tasks/language_modeling.py:219@0.12.2
        data = Path(dataset.group(1))
        return f"{data}.idx: no such data-bin; {_there_are(data.parent, '.idx')}"
    absent = str(text if error.filename is None else error.filename)
    if os.path.basename(absent) == data_bin.DICTIONARY:
        made = "create a data folder with fairseq-preprocess or fairseq-moe prepare"
        return f"{absent}: no such file; {made}"
    # fairseq/utils.py:480@0.12.2 says nothing but the --user-dir
    return text if error.filename is None and " " in text else f"{absent}: no such file or folder"


def _there_are(folder: Path, suffix: str) -> str:
    """The files in a folder with this suffix."""
    return f"{folder} has {files.listed(folder, suffix) or f'no *{suffix}'}"
