"""What the main file of a checkpoint says of its model, while the weights stay on disk: of ours, of
stock fairseq's, or of the branch's."""

from typing import Any, Dict, Mapping, Optional, Tuple

from .. import files as own_files
from ..errors import UserError
from ..models.architectures import is_ours
from .files import BranchFiles, State, find, flat_settings, load
from .reading import read
from .settings import translated_settings

EMBEDDING = "decoder.embed_tokens.weight"


def main_file(path: str) -> State:
    """The file with the settings, of which no byte is checked; `path` as fairseq-eval-lm's --path.
    Raises UserError for a file that is not a checkpoint."""
    return _main(path)[1]


def outline(path: str) -> State:
    """As main_file, with all tensors that are not in files of experts."""
    branch, state = _main(path)
    if branch is not None and EMBEDDING not in state["model"]:  # FSDP makes one tensor of many
        return read(branch, None, None)
    return state


def settings_of(path: str) -> Tuple[Dict[str, Any], int]:
    """The model's settings, by our names, and the size of its vocabulary."""
    state = outline(path)
    vocabulary, settings = vocabulary_of(path, state["model"]), flat_settings(state)
    if "decoder_embed_dim" not in settings:
        raise _other_model(path)
    return settings if is_ours(settings) else translated_settings(path, settings), vocabulary


def vocabulary_of(path: str, model: Mapping[str, Any]) -> int:
    """Size of the vocabulary of a language model in a file. Raises UserError for another model."""
    if EMBEDDING not in model:
        raise _other_model(path)
    return model[EMBEDDING].shape[0]


def _main(path: str) -> Tuple[Optional[BranchFiles], State]:
    branch = find(path)
    file = path if branch is None else branch.shared
    own_files.check_checkpoint(file)
    return branch, load(file)


def _other_model(path: str) -> UserError:
    return UserError(
        f"{path}: not a language model of this package, of stock fairseq or of its moe branch; "
        "name another checkpoint"
    )
