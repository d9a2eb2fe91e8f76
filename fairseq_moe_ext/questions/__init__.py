"""Questions with candidates, as data sets publish them, and how a language model answers them: what
tuning on them (tasks/) and asking them (priming/) share.

records.py     the lines of a data set's published files
formats.py     how a line of each data set becomes a prompt with candidates
vocabulary.py  text to the model's tokens and back
scoring.py     which of a question's candidates the model holds most likely
"""
