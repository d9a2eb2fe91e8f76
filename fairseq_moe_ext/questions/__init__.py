"""Questions with candidates from published data sets, and how a language model answers them. Shared
by fine-tuning (tasks/) and few-shot evaluation (priming/).

records.py     the lines of a data set's published files
formats.py     how a line of each data set becomes a prompt with candidates
vocabulary.py  text to the model's tokens and back
scoring.py     which of a question's candidates the model finds most likely
"""
