"""People's own text to data-bins that fairseq trains on (`fairseq-moe prepare`).

    documents.py   files -> documents, one after another
    splits.py      a document -> train, valid or test
    tokenizer.py   GPT-2's byte-level BPE: read, train, encode
    encode.py      documents -> token ids per split, on all cores, in order
    dictionary.py  dict.txt in fairseq's convention, BPE id -> dictionary index
    binarize.py    token ids -> the .bin and .idx of fairseq's mmap format
    command.py     the flags, and the order of the steps

Nothing here imports fairseq or torch, so the command starts at once; the formats are fairseq's
own, and the tests compare every one of them with what fairseq 0.12.2 writes and reads.
"""
