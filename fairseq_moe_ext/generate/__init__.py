"""`fairseq-moe generate`: continue prompts with a model.

command.py      the flags, and the order of the steps
prompts.py      prompts from arguments, files and stdin
session.py      --interactive
showing.py      texts as they come, as blocks, or of two models in columns

The search is models/search.py, and the text of it models/text_generation.py.
"""
