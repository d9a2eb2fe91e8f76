"""Loads a checkpoint for evaluation."""

import argparse
import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.models import FairseqLanguageModel
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.utils import split_paths

from .. import data_bin, files, literals
from ..branch.files import find, flat_settings
from ..branch.outline import main_file
from ..errors import UserError
from ..shape import context_length

PRECISIONS = {
    "--fp16": "use half precision for the weights",
    "--bf16": "compute in bfloat16; on a CPU only where it is faster, embeddings in float32",
}


def add_model_flags(parser: argparse._ActionsContainer, *precisions: str) -> None:
    """Add --cpu, these PRECISIONS and --model-overrides."""
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    for flag in precisions:
        parser.add_argument(flag, action="store_true", help=PRECISIONS[flag])
    parser.add_argument(
        "--model-overrides", metavar="DICT", help="model settings, as for fairseq-eval-lm"
    )


def check_path(path: Path, flag: str = "--path") -> None:
    """Raise UserError unless a path is a file, or the name by which the branch's files go; flag:
    that names it, "" for an argument without one."""
    if find(str(path)) is None:
        files.check_checkpoint(path, f"{flag} {path}".strip())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error about the file of --path begin with that flag."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(f"{path}: "):
            raise
        raise UserError(f"--path {error}") from error


def parse_overrides(text: Optional[str]) -> Dict[str, Any]:
    """The dictionary of --model-overrides. Raises UserError for anything else."""
    return literals.overrides(text, "--model-overrides") if text else {}


def language_modeling_task(folder: Path, tokens_per_sample: int) -> LanguageModelingTask:
    """Stock's language-modelling task on one data-bin. Raises UserError for one whose name stock
    would take for several."""
    data_bin.check_is_one(folder)
    # The fields beside the first two are taken from other groups of options on the command line.
    config = LanguageModelingConfig(
        data=str(folder),
        tokens_per_sample=tokens_per_sample,
        seed=1,
        batch_size=None,
        batch_size_valid=None,
        dataset_impl=None,
        data_buffer_size=0,
        tpu=False,
        use_plasma_view=False,
        plasma_path="",
    )
    return LanguageModelingTask.setup_task(config)


def load_model(
    path: Path, task: Any, overrides: Optional[Dict[str, Any]] = None
) -> Tuple[FairseqLanguageModel, Any]:
    """The model of a checkpoint, for evaluation, and its saved settings.

    Args:
        path: as fairseq-eval-lm's --path.
        task: whose state is loaded, too.
        overrides: settings of the model that replace the saved ones.

    Raises:
        UserError: for a model that was trained with --add-bos-token, or does not score tokens by
            an output projection.
    """
    (model,), saved = checkpoint_utils.load_model_ensemble(
        [str(path)], arg_overrides=overrides, task=task
    )
    if saved is not None and saved.task.get("add_bos_token"):
        raise UserError(
            f"--path {path}: trained with --add-bos-token, but this command starts no text with "
            "<s>: evaluate it with fairseq-eval-lm"
        )
    if getattr(model.decoder, "output_projection", None) is None:
        raise UserError(
            f"{path}: a {type(model).__name__} without an output projection (as with "
            "--adaptive-softmax-cutoff): evaluate it with fairseq-eval-lm"
        )
    return model.eval(), saved


def most_tokens(path: Path, overrides: Mapping[str, Any]) -> Optional[int]:
    """How many tokens the model of a checkpoint takes by its settings, while its weights stay on
    disk; None if they do not say. Arguments as of load_model."""
    saved = flat_settings(main_file(str(path)))
    return context_length({"tokens_per_sample": None, **saved, **overrides})


def check_context(context: Optional[int], most: Optional[int]) -> None:
    """Raise UserError for a --context that is above what a model takes."""
    if context is not None and most is not None and context > most:
        raise UserError(f"--context {context}: the model takes {most} at most; lower it")


def on_device(model: FairseqLanguageModel, cpu: bool) -> FairseqLanguageModel:
    """The model on the GPU, if there is one and `cpu` does not forbid it."""
    return model.cuda() if torch.cuda.is_available() and not cpu else model


def corpora_of(saved: Any, task: Any, folders: Sequence[Path]) -> Optional[List[str]]:
    """Names of the corpora that a model was trained on; None if its checkpoint does not say.

    Args:
        saved: settings of the task in the checkpoint.
        task: into which its state was loaded.
        folders: of the sets to evaluate on.
    """
    recorded = task.state_dict().get(data_bin.TRAINED)
    data = saved.get("data")
    names = [data_bin.own_name(data_bin.PLAIN, Path(p)) for p in split_paths(data)] if data else []
    if recorded == [data_bin.PLAIN]:  # a corpus of this name, or, in older files, any data-bin
        return [*recorded, *names]
    if recorded is not None:
        return recorded
    if saved.get("train_corpora") is not None:  # of before it was recorded
        return [name.strip() for name in saved.train_corpora.split(",")]
    if saved.get("_name") == "language_modeling" and names:
        # one data-bin, which has the name of its folder, if that has not been renamed
        there = [data_bin.find_corpora(folder).items() for folder in folders]
        if any(data_bin.own_name(*corpus) in names for corpora in there for corpus in corpora):
            return names
    return None


def moe_layers(model: FairseqLanguageModel) -> Dict[int, Any]:
    """Number of a layer, from 0 -> its MoE layer; a layer of fairseq's own model has none."""
    layers = enumerate(model.decoder.layers)
    return {
        i: layer.moe_layer for i, layer in layers if getattr(layer, "moe_layer", None) is not None
    }


def set_gates(model: FairseqLanguageModel, **settings: Any) -> None:
    """Change settings (moe/router.py: GateSettings) of all gates, from now on."""
    for moe in moe_layers(model).values():
        moe.gate.settings = moe.gate.settings._replace(**settings)
