"""`fairseq-moe convert`: checkpoints from one layout, number of files or precision to another.

command.py     the flags, and the order of the steps
average.py     `fairseq-moe average`: the mean of several checkpoints
show.py        `fairseq-moe show`: what a checkpoint is
verify.py      `fairseq-moe verify`: whether files are as they were written
source.py      a checkpoint as one view, whatever its layout, in which nothing is read yet
readers.py     the layouts that are read: ours, and that of fairseq's moe branch
targets.py     that view as files: ours, or those of fairseq's moe branch
writing.py     writes such files: all or none, and alone
upcycle.py     a dense view as a sparse one
hf.py          Hugging Face's folders, both ways: config.json, and what else goes in
hf_flags.py    their flags
hf_folder.py   the files of such a folder, read and written
hf_tokenizer.py  our tokenizer as tokenizer.json
xglm.py        the settings of dense models as those of XGLM
modeling_fairseq_moe.py, experts_fairseq_moe.py  the code that lies in such a folder; here only
               hf.py imports any of it, the names of its routers
model_card.py  its README.md
training.py    what `show` and the card say of the training
archive.py     torch's file format and safetensors, written tensor by tensor
"""
