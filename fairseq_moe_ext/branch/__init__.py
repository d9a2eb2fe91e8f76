"""Reads checkpoints of fairseq's `moe` branch, in which Meta's models were released, directly.

For a command that is given X.pt, such a checkpoint is X-shared.pt and, for each process r that
trained it, X-rank-r.pt with that process's experts; X.pt itself does not exist. fairseq's FSDP adds
-shardN to the names.

    files.py      which files are one checkpoint
    parts.py      those of this process's experts, checked against the rest
    settings.py   the branch's settings -> our model's
    flat.py       FSDP's flat tensors, of which each process has a piece -> named tensors
    optimizer.py  what its optimizer remembers -> by our parameters
    reading.py    all of that as the one state that fairseq expects of a file
    writing.py    our settings and names -> the branch's
    outline.py    the settings alone, of ours and of stock's, too
    pad_rule.py   how its layers treat padding, by the rule that a model was trained by
"""
