"""The file of --json: the settings, and the results so far.

It is rewritten after every result, so that an interrupted command resumes from there. Results of
another command, or of other files, are not reused.
"""

import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

from .. import files, outputs, tokenizer_files
from ..branch.files import find
from ..errors import UserError
from .protocol import Result, Settings

# Flags that are not in protocol.Settings and change what is found.
_FLAGS = ("context", "fp16", "bf16", "model_overrides")
_BEFORE = {"bf16": False}  # values of flags that older files lack


def asked(args: Any, settings: Settings, tasks: List[str]) -> Dict[str, Any]:
    """Everything that the results depend on, as saved in the file: settings, and size and time of
    every file that is read."""
    flags = {name: getattr(args, name) for name in _FLAGS}
    branch = find(str(args.path))
    checkpoint = [args.path] if branch is None else map(Path, branch.all)
    data = [args.data / name for name in tokenizer_files.NAMES]
    own = None if args.json is None else os.path.realpath(args.json)
    request = {
        "tasks": tasks,
        **settings._asdict(),
        **flags,
        "checkpoint": _stamps(args.path.parent, checkpoint),
        "data": _stamps(args.data, data),
        "files": {
            name: _stamps(args.folder / name, (args.folder / name).rglob("[!.]*"), own)
            for name in tasks
        },
    }
    return json.loads(json.dumps(request))


def _stamps(folder: Path, paths: Iterable[Path], but: Optional[str] = None) -> Dict[str, List[int]]:
    stamps = {}
    for path in sorted(paths):
        if path.is_file() and os.path.realpath(path) not in (but, f"{but}.lock"):
            status = path.stat()
            stamps[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns]
    return stamps


def begun(path: Optional[Path], now: Dict[str, Any], overwrite: bool) -> List[Result]:
    """The results that the same command has left. Raises UserError for those of another one."""
    if path is None or overwrite or not os.path.lexists(path):
        return []
    outputs.check([("--json", path)], overwrite=True)  # no device, FIFO or the like
    try:
        content = files.read_json(path)
    except UserError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        return []  # which outputs.check refuses to replace
    settings = {**_BEFORE, **content["settings"]}
    for name, value in now.items():
        before = settings.get(name)
        if before != value:
            plain = not isinstance(value, dict)
            difference = f"{before}, now {value}" if plain else "other or changed files"
            raise UserError(
                f"--json {path}: holds results of another command ({name}: {difference}); "
                "name another file or add --overwrite"
            )
    return content["results"]
