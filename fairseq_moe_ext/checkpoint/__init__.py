"""Checkpoints of experts that are spread over processes, for any number of processes.

One process writes fairseq's single file, with all experts. Of W processes, rank 0 writes that file
without the experts, and each set of experts is written by one of the processes that hold it:

    checkpoint_last.pt             all but the experts, and "experts": the manifest
    experts/<save>-<first>-<count>.pt   count experts from `first` on, and their optimizer state

The name <save> is new for every save, so that files of two saves never mix, and the expert files
come first: a file checkpoint*.pt refers to nothing that is not whole on disk. Its copies
(checkpoint_best.pt) refer to the same expert files, which go when no *.pt of the folder refers to
them any more.

    format.py     the keys and names in these files, read and written
    experts.py    which parameters are experts', and what numbers the optimizer gives them
    writing.py    one file, there whole or not at all
    intact.py     whether a file is as it was written
    saving.py     all processes together: the expert files, then rank 0's
    cleanup.py    expert files to which nothing refers
    settings.py   what a file may ask to be built, checked before
    loading.py    the files -> the experts of this process, whoever wrote them
    starting.py   the files that a training names, and its folder, held for it alone
    resuming.py   trainers that load, and what they are refused
    collective.py what processes tell each other

fairseq's functions that ask for them are wrapped in patches/checkpoint_io.py and
patches/trainer.py.
"""
