"""`fairseq-moe convert`: checkpoints from one layout, number of files or precision to another.

command.py     the flags, and the order of the steps
verify.py      `fairseq-moe verify`: whether files are as they were written
source.py      reading any of the layouts into one view, in which nothing is read yet
targets.py     that view as files: ours, or those of fairseq's moe branch
upcycle.py     a dense view as a sparse one
xglm.py        Hugging Face's XGLM, both ways
archive.py     torch's file format and safetensors, written tensor by tensor
"""
