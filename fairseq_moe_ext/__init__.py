"""Mixture-of-Experts language models as a plugin of stock fairseq.

What stock fairseq needs to run on today's Python and PyTorch is beside it, in fairseq_today/.

`--user-dir` imports this package; importing it registers the model and its architectures
(models/), the criterion (criterions/) and the task (tasks/) with fairseq. The map:

    config.py          the flags of the model
    config_checks.py   the checks across them
    router_flags.py          flags of routers, and which router uses which
    balance_flags.py   the flags of balancing
    models/        the decoder, the registered model, the paper's sizes
    moe/           the mathematics of a Mixture-of-Experts layer, torch only
    kernels/       fast ways to compute it, each with its plain twin
    expert_parallel.py       experts sharded over processes
    ranges.py      what numbers a flag takes
    starting.py    what is checked before a run starts
    fully_sharded.py         shared parameters sharded over processes
    fingerprint.py the dictionary that a checkpoint was trained with
    diverging.py   NaN in training: one line, and no weights saved
    counted.py     how much of the data a metric covers
    branch/        checkpoints of fairseq's `moe` branch, Meta's released models
    checkpoint/    saving and loading experts on any number of processes
    criterions/    cross-entropy, of tokens or of candidates, with the gates' losses
    tasks/         language modelling over a mixture of corpora; multiple choice
    optim.py       fairseq's Adam, fused
    prepare/       text to data-bins
    generate/      the command that continues prompts
    convert/       checkpoints to other layouts and precisions
    questions/     questions with candidates, and the vocabulary that spells them
    priming/       zero- and few-shot tasks, bias sets, generated answers
    study/         a YAML file to trained, evaluated and compared models
    forecast/      scaling laws: what sparsity should save
    cost.py        parameters and FLOPs
    shape.py       which layers are sparse, how wide each network is
    evaluation/    perplexity, cost and expert use of trained models; reports
    inspection/    a page on what each expert of a model does
    accuracy.py    chance level and interval of an accuracy
    data_bin.py    folders of data-bins: what lies where
    tokenizer_files.py       the tokenizer that travels with a model
    data_bin_files.py  whether the files of a data-bin are whole
    metrics_file.py          metrics.jsonl beside the checkpoints
    training_line.py         the line that training prints
    locks.py       one worker for one output
    cli.py         the command fairseq-moe, behind fairseq_moe_command.py beside the package
    completion.py  what completes it in a shell
    literals.py    settings that are Python expressions, read as values
    patches/       every function of fairseq that is wrapped, and why
    patch_list.py  the command that prints them
    context.py     what our wrappers round a function of fairseq tell those within it
    errors.py      the exception for a user's mistake
    files.py       what a user names to read: regular files
    outputs.py     what a user names to write
    text_table.py  tables for a terminal and in Markdown
    progress_bar.py          how far long work is
    wording.py     counts and remedies in messages
"""

import fairseq_today

fairseq_today.apply()  # before anything imports fairseq

from fairseq_today import registry  # noqa: E402

from . import criterions, optim, patches  # noqa: E402, F401
from .models import architectures, language_model  # noqa: E402, F401
from .tasks import mixture_language_modeling, multiple_choice  # noqa: E402, F401

registry.apply(patches.PATCHES)
