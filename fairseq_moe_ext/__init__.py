"""Mixture-of-Experts language models as a plugin of stock fairseq.

`--user-dir` imports this package; importing it registers the model and its architectures
(models/), the criterion (criterions/) and the task (tasks/) with fairseq. The map:

    config.py      every flag of the model, and the checks across flags
    models/        the decoder, the registered model, the paper's sizes
    moe/           the mathematics of a Mixture-of-Experts layer, torch only
    kernels/       fast ways to compute it, each with its plain twin
    expert_parallel.py       experts spread over processes
    distributed_training.py  what fairseq's trainer and eval-lm must know of that
    ranges.py      what numbers a flag takes
    starting.py    what is checked before a run starts
    fully_sharded.py         shared parameters sharded over processes
    fingerprint.py which dictionary a checkpoint is of
    diverging.py   NaN in training: one line, and no weights saved
    counted.py     how much of the data a figure is over
    branch/        checkpoints of fairseq's `moe` branch, Meta's released models
    checkpoint/    saving and loading experts on any number of processes
    criterions/    cross-entropy, of tokens or of candidates, with the gates' losses
    tasks/         language modelling over a mixture of corpora; multiple choice
    optim.py       fairseq's Adam, fused
    prepare/       text to data-bins
    convert/       checkpoints to other layouts and precisions
    questions/     questions with candidates, and the vocabulary that spells them
    priming/       zero- and few-shot tasks, bias sets, generated answers
    study/         a YAML file to trained, evaluated and compared models
    cost.py        parameters and FLOPs
    evaluation/    what trained models are asked: expert use, reports
    accuracy.py    chance level and interval of an accuracy
    data_bin.py    folders of data-bins: what lies where
    locks.py       one worker for one output
    cli.py         the command fairseq-moe
    finding.py     the plugin for command lines and checkpoints that name it
    generation.py  faults of stock fairseq in generating text
    literals.py    settings that are Python expressions, read as values
    compat.py      what stock fairseq 0.12.2 needs to run on today's Python and PyTorch
    errors.py      the exception for a user's mistake
    files.py       what a user names to read: regular files
    outputs.py     what a user names to write
    text_table.py  tables for a terminal and in Markdown
    wording.py     counts and remedies in messages
"""

from . import compat

compat.apply()  # before anything imports fairseq

from . import (  # noqa: E402, F401
    checkpoint,
    counted,
    criterions,
    distributed_training,
    diverging,
    fingerprint,
    fully_sharded,
    optim,
    starting,
)
from .branch import hooks as branch_hooks  # noqa: E402
from .models import architectures, hub, language_model, unfilled  # noqa: E402, F401
from .tasks import mixture_language_modeling, multiple_choice  # noqa: E402, F401

distributed_training.apply()
starting.apply()
counted.apply()
fully_sharded.apply()
unfilled.apply()
hub.apply()
checkpoint.apply()
branch_hooks.apply()  # behind checkpoint's: it answers first, for files that it knows
fingerprint.apply()
diverging.apply()
