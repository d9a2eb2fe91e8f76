"""Checkpoints of experts on several processes, which any number of processes can load.

A single process writes fairseq's single file, with all experts. With several processes, rank 0
writes that file without the experts, and one of the processes that hold a set of experts writes it:

    checkpoint_last.pt             all but the experts, and "experts": the manifest
    experts/<save>-<first>-<count>.pt   count experts from `first` on, and their optimizer state

The name <save> is new for every save, so that files of two saves never mix. The expert files are
written first, so all files that a checkpoint*.pt refers to are complete. Its copies
(checkpoint_best.pt) refer to the same expert files, which are deleted when no *.pt in the folder
refers to them.

    format.py     the keys and names in these files, read and written
    experts.py    the parameters of experts, and their numbers in the optimizer
    writing.py    writes a file completely or not at all
    intact.py     whether a file is as it was written
    saving.py     all processes together: the expert files, then rank 0's
    cleanup.py    expert files that nothing refers to
    settings.py   checks what a file asks to be built
    loading.py    the files -> the experts of this process
    starting.py   the checkpoint that a training starts from
    folder_lock.py  the lock on the folder that it saves to
    resuming.py   checks when a trainer resumes
    model_flags.py  warns where it starts from a checkpoint of other model flags
    trained.py    epochs and tokens of a training
    collective.py messages between processes

patches/checkpoint_io.py and patches/trainer.py wrap the functions of fairseq that call them.
"""
