"""What the experts of a trained model do (`fairseq-moe inspect`): numbers first, then a page.

inspecting.py  from a checkpoint and text to all numbers; what a notebook calls
result.py      the numbers, as plain dataclasses
reading.py     the text that is looked at, and its tokens as text
observing.py   one pass over the text: choices of the gates, losses
cards.py       what each expert takes
knowing.py     what routing knows: mutual information beside its controls
relations.py   between layers, between experts, between checkpoints
training.py    routing over training, from the log
page.py        the numbers as one HTML page
command.py     `fairseq-moe inspect`
"""
