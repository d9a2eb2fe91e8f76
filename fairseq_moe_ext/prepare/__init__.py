"""People's own text to data-bins that fairseq trains on (`fairseq-moe prepare`).

    kinds.py        what a file holds: text, JSON Lines, a table, or something else
    tables.py       the text column of CSV, TSV, Parquet and Arrow
    documents.py    files -> documents, one after another
    splits.py       a document -> train, valid or test
    tokenizer.py    GPT-2's byte-level BPE: read, train, encode
    gpt2_files.py   GPT-2's own files, from an installed package
    encode.py       documents -> token ids per split, on all cores, in order
    dictionary.py   dict.txt in fairseq's convention, BPE id -> dictionary index
    binarize.py     token ids -> the .bin and .idx of fairseq's mmap format
    data_folder.py  DATA, there whole or not at all
    corpora.py      --corpus, --heldout, --format -> which files each corpus has
    options.py      the rest of the flags, and what can be wrong with them
    pipeline.py     the order of the steps
    command.py      the flags, and the table of counts

The formats are fairseq's own, and the tests compare every one of them with what fairseq 0.12.2
writes and reads.
"""
