"""What the files of a quickstart run hold, and result.json, which the report shows."""

import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, TypedDict

import corpora
import recipe

from fairseq_moe_ext import cores, cost, data_bin, files
from fairseq_moe_ext.branch.outline import settings_of
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.shape import shape_of
from fairseq_moe_ext.study import logs
from fairseq_moe_ext.study.plan import FAMILIES, typed


class Stage(NamedTuple):
    """A step of the run, as stages.json has it."""

    title: str
    seconds: float = 0.0
    done: bool = False
    result: str = ""


class Validation(TypedDict):
    """One validation of a training."""

    update: int
    in_domain: float  # mean perplexity of the training domains
    perplexity: Dict[str, float]  # by domain


class Model(TypedDict):
    """A trained and tested model."""

    parameters: int
    active_parameters: int  # that a token meets
    flops_per_token: float  # forward and backward
    training_flops: float
    training_tokens: int
    training_seconds: float
    precision: str  # that it was trained in
    perplexity: Dict[str, float]  # on the test split, by domain
    test_tokens: Dict[str, int]
    validation: List[Validation]


class Domain(TypedDict):
    name: str
    title: str
    source: str
    held_out: bool
    counts: Dict[str, Dict[str, int]]  # split -> "documents", "bytes"
    tokens: Dict[str, Any]  # split -> what prepare counted


class Result(TypedDict):
    """result.json."""

    settings: Dict[str, Any]
    domains: List[Domain]
    models: Dict[str, Model]
    expert_use: List[Dict[str, Any]]  # as evaluation.expert_use writes it
    samples: List[Dict[str, Any]]  # as fairseq-moe generate writes them
    commands: List[str]
    stages: List[Dict[str, Any]]  # Stage, by its names
    environment: Dict[str, str]  # package -> version


def validations(log: Path) -> List[Validation]:
    """The validations in a training's log.

    An update that was repeated after an interruption counts once, with its later values.
    """
    measured: Dict[int, Validation] = {}
    for values in logs.measurements(log, "valid"):
        perplexity = {
            match.group(1): float(value)
            for key, value in values.items()
            for match in [re.fullmatch(r"valid_(\w+)_ppl", key)]
            if match
        }
        update = int(values["valid_num_updates"])
        measured[update] = {
            "update": update,
            "in_domain": perplexity["in_domain"],
            "perplexity": {domain.name: perplexity[domain.name] for domain in corpora.DOMAINS},
        }
    return [measured[update] for update in sorted(measured)]


def eval_result(log: Path) -> Dict[str, float]:
    """What fairseq-eval-lm printed: tokens and loss (base 2, per token)."""
    text = log.read_text(encoding="utf-8", errors="replace")
    tokens = re.findall(r"Evaluated ([\d,]+) tokens", text)
    loss = re.findall(r"Loss \(base 2\): ([\d.]+)", text)
    if not tokens or not loss:
        raise UserError(f"{log} has no result of fairseq-eval-lm: start the quickstart again")
    return {"tokens": int(tokens[-1].replace(",", "")), "loss": float(loss[-1])}


def gathered(
    out: Path, settings: Dict[str, Any], stages: Sequence[Stage], commands: Sequence[Sequence[str]]
) -> Result:
    """Everything the report shows, from the files of a run."""
    counts = files.read_json(out / "data" / data_bin.COUNTS)
    text = files.read_json(out / "text.json")
    domains: List[Domain] = [
        {
            "name": domain.name,
            "title": domain.title,
            "source": domain.source,
            "held_out": domain.held_out,
            "counts": text[domain.name],
            "tokens": counts["corpora"][domain.name],
        }
        for domain in corpora.DOMAINS
    ]
    environment = {"Python": platform.python_version(), "processors": str(cores.usable())}
    for package in ("torch", "numpy", "sympy", "fairseq", "fairseq-moe-ext"):
        with contextlib.suppress(PackageNotFoundError):
            environment[package] = version(package)
    return {
        "settings": {
            **settings,
            "tokens_per_update": recipe.CONTEXT * recipe.BLOCKS,
            "dictionary": counts["types"],
        },
        "domains": domains,
        "models": {name: _model(out, name, settings["updates"]) for name in FAMILIES},
        "expert_use": files.read_json(out / "expert_use.json"),
        "samples": files.read_json(out / "samples.json"),
        "commands": [typed(command) for command in commands],
        "stages": [stage._asdict() for stage in stages],
        "environment": environment,
    }


def _model(out: Path, name: str, updates: int) -> Model:
    shape = shape_of(*settings_of(str(out / name / "checkpoint_best.pt")))
    tokens = updates * recipe.CONTEXT * recipe.BLOCKS
    parameters = cost.parameters(shape)
    flops = cost.training_flops_per_token(shape, recipe.CONTEXT)
    log = out / name / "train.log"
    tested = {
        domain.name: files.read_json(out / "evaluation" / f"{name}.{domain.name}.json")
        for domain in corpora.DOMAINS
    }
    return {
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "flops_per_token": flops,
        "training_flops": flops * tokens,
        "training_tokens": tokens,
        "training_seconds": logs.training_seconds(log),
        "precision": logs.precision(log),
        "perplexity": {domain: 2 ** values["loss"] for domain, values in tested.items()},
        "test_tokens": {domain: values["tokens"] for domain, values in tested.items()},
        "validation": validations(log),
    }
