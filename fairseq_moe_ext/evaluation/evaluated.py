"""Which state of a checkpoint was evaluated: `evaluate --json` writes it, model cards compare it. A
resumed run overwrites checkpoint_last.pt and checkpoint_best.pt, so their names do not say it."""

import hashlib
from typing import TypedDict

from ..branch.files import find
from ..branch.outline import main_file
from ..checkpoint.format import last_history
from ..checkpoint.intact import digest_of_records

KEY = "checkpoint"  # of what `evaluate --json` writes; older files lack it


class State(TypedDict):
    updates: int
    digest: str


def state_of(path: str) -> State:
    """The state of a checkpoint, whose weights are not read. The file beside separate expert files
    lists their digests. Raises UserError for a file that is not a checkpoint."""
    updates = last_history(main_file(path)).get("num_updates") or 0
    branch = find(path)
    parts = [digest_of_records(file) for file in ([path] if branch is None else branch.all)]
    return {"updates": updates, "digest": hashlib.sha256("".join(parts).encode()).hexdigest()}
