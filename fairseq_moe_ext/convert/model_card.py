"""The model card (README.md) of a folder for Hugging Face: what the model is, how it was trained,
how well it does."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import yaml

from ..cost import parameters
from ..errors import UserError
from ..evaluation import capacity, evaluated
from ..shape import context_length, shape_of
from ..text_table import markdown
from ..wording import short, small
from . import training
from .source import Source

_SETTINGS = {
    "optimization": ("lr", "max_update", "clip_norm", "update_freq"),
    "optimizer": ("_name", "adam_betas", "weight_decay"),
    "lr_scheduler": ("_name", "warmup_updates"),
    "dataset": ("batch_size", "max_tokens"),
    "common": ("seed", "fp16", "bf16"),
}


def write(
    source: Source, model_type: str, license: str, evaluation: Optional[Mapping[str, Any]]
) -> str:
    """The text of README.md.

    Args:
        evaluation: what `fairseq-moe evaluate --json` wrote; None: there is none.
    """
    custom = model_type != "xglm"
    load = ", trust_remote_code=True" if custom else ""
    code = "The code of the model is `modeling_fairseq_moe.py` in this folder. " if custom else ""
    return f"""---
license: {_scalar(license)}
library_name: transformers
pipeline_tag: text-generation
tags:
- {"moe" if source.experts else "dense"}
- fairseq
---

# {"Mixture-of-Experts" if source.experts else "Dense"} language model

A decoder-only Transformer, trained with fairseq and fairseq_moe_ext, converted with `fairseq-moe
convert --to hf`. {code}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER{load})
model = AutoModelForCausalLM.from_pretrained(FOLDER{load})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

A newline is the token `</s>` (2) to this model, and so is what stands before the first token of a
text; the tokenizer adds that one by itself. Generation goes on through newlines. No token is
dropped for an expert's capacity.

## Model

{markdown([["", ""], *_model(source)])}

## Training

{markdown([["", ""], *_training(source)])}

## Evaluation

{_evaluation(source, evaluation)}

## Licence and use

License: {license}. The text that the model was trained on may have conditions of its own, and the
model repeats what stands in it.
"""


def _model(source: Source) -> List[List[str]]:
    s = source.settings
    shape = shape_of(s, source.vocabulary)
    counted = parameters(shape)
    rows = [
        ["parameters", f"{counted.total:,}"],
        ["parameters that a token uses", f"{counted.active:,}"],
        ["layers, width", f"{shape.layers}, {shape.dim}"],
        ["attention heads", str(s["decoder_attention_heads"])],
        ["context", f"{context_length(s):,} tokens"],
        ["vocabulary", f"{source.vocabulary:,}"],
        ["activation", str(s["activation_fn"])],
    ]
    if source.experts:
        rows += [
            ["sparse layers (from 0)", ", ".join(map(str, shape.sparse))],
            ["experts in each", f"{shape.experts}"],
            ["experts of a token", f"{shape.top_k}, router {s['moe_router']}"],
        ]
    return rows


def _training(source: Source) -> List[List[str]]:
    """What the checkpoint knows of its training; the first lines are results."""
    rest = source.rest
    found = training.results(rest)
    on = ("corpora", ", ".join(map(str, found.get("corpora", []))))
    if not found["updates"]:
        return _rows([on]) or [["", "not recorded in the checkpoint"]]
    facts: List[Tuple[str, Any]] = [
        ("updates", found["updates"]),
        ("epoch", found.get("epoch")),
        ("hours", _hours(found.get("seconds"))),
        (f"best validation {found['best_checkpoint_metric']}", _rounded(found.get("best"))),
        on,
        ("criterion", found.get("criterion")),
    ]
    for group, names in _SETTINGS.items():
        for name in names:
            label = group if name == "_name" else name
            facts.append((label.replace("_", " "), training.setting(rest, group, name)))
    return _rows(facts)


def _rows(facts: Sequence[Tuple[str, Any]]) -> List[List[str]]:
    return [[name, _cell(value)] for name, value in facts if value not in (None, "", [], {})]


def check(evaluation: Any, path: str, where: str) -> None:
    """Raise UserError, beginning with `where`, for what `evaluate` did not write, or wrote of
    another checkpoint than `path` or of an earlier state of it."""
    try:
        _perplexities(evaluation, True)
        if evaluated.KEY in evaluation:
            _check_state(path, evaluation["path"], evaluation[evaluated.KEY])
            return
        _check_path(path, evaluation["path"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    print(
        f"{where}: of an older version, so it does not say which state of {evaluation['path']} it "
        f"is of: if that is not {path} as it is now, evaluate again",
        file=sys.stderr,
    )


def _evaluation(source: Source, evaluation: Optional[Mapping[str, Any]]) -> str:
    """A table of perplexities."""
    if evaluation is None:
        return (
            "Not given. `fairseq-moe evaluate DATA --path CKPT --json FILE`, and "
            "`fairseq-moe convert ... --evaluation FILE`, would put perplexities here."
        )
    return _perplexities(evaluation, bool(source.experts))


def _perplexities(evaluation: Any, sparse: bool) -> str:
    try:
        if not isinstance(evaluation["path"], str):
            raise TypeError
        if evaluated.KEY in evaluation and not _is_state(evaluation[evaluated.KEY]):
            raise TypeError
        if "sweep" in evaluation:
            raise UserError(
                "has the results of several capacities; name a file of `fairseq-moe "
                "evaluate` without --sweep-capacity"
            )
        rows = [["set", "tokens", "perplexity", "bits per byte"]]
        for name, result in evaluation["sets"].items():
            domain = "" if result["in_domain"] else " (held out)"
            bits = "" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.3f}"
            row = [
                _cell(name) + domain,
                f"{result['tokens']:,}",
                f"{result['perplexity']:.2f}",
                bits,
            ]
            rows.append(row)
        how = _conditions(evaluation, sparse)
    except UserError:  # a ValueError
        raise
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            "not a file that `fairseq-moe evaluate --json` wrote; name another file"
        ) from None
    return f"{markdown(rows)}\n\n{how}"


def _is_state(found: Any) -> bool:
    return isinstance(found["updates"], int) and isinstance(found["digest"], str)


def _check_state(path: str, name: str, was: evaluated.State) -> None:
    """Raise UserError if a checkpoint is not in the state that was evaluated under a name."""
    now = evaluated.state_of(path)
    if was["digest"] == now["digest"]:
        return
    differ = f"{was['updates']:,} updates, but {path} has {now['updates']:,}"
    if was["updates"] == now["updates"]:
        differ = f"other bytes than {path} has now"
    raise UserError(f"has the results of {name} with {differ}: evaluate {path} again")


def _check_path(path: str, evaluated: str) -> None:
    """Raise UserError for a path in the results that is another checkpoint's. One that is not there
    may have been named from another folder."""
    if os.path.exists(evaluated) and os.path.realpath(evaluated) != os.path.realpath(path):
        raise UserError(
            f"has the results of {evaluated}, not of {path}; evaluate {path}, or "
            f"convert {evaluated}"
        )


def _conditions(evaluation: Mapping[str, Any], sparse: bool) -> str:
    """How the perplexities were measured."""
    context, stride, share = (evaluation[name] for name in ("context", "stride", "capacity"))
    rows = "blocks" if stride == context else f"sliding windows (stride {stride:,})"
    text = f"Split {evaluation['subset']}, {rows} of {context:,} tokens"
    if evaluation.get("model_overrides"):
        text += f", with the settings {_cell(evaluation['model_overrides'])}"
    if not sparse:
        return f"{text}."
    if share == 1:
        return f"{text}, nothing dropped."
    dropped = small(100 * (capacity.dropped(evaluation["sets"].values()) or 0))
    return (
        f"{text}. An expert took at most {100 * share:g} % of a batch's tokens; {dropped} % of the "
        "choices of experts were dropped."
    )


def _scalar(text: str) -> str:
    """A text as YAML has it, in quotation marks where it would be something else without."""
    try:
        plain = yaml.safe_load(f"x: {text}") == {"x": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text)


def _hours(seconds: Any) -> Optional[str]:
    return f"{seconds / 3600:.2f}" if isinstance(seconds, (int, float)) and seconds > 0 else None


def _rounded(value: Any) -> Optional[str]:
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else None


def _cell(value: Any) -> str:
    """A value as a table has room for it; of a list its items."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    return short(" ".join(str(value).split()).replace("|", "\\|"))
