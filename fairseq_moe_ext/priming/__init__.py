"""Zero- and few-shot priming: a trained language model answers questions without being tuned.

records.py     the lines of a data set's published files
formats.py     how a line of each data set becomes a prompt with candidates
scoring.py     which of a question's candidates the model holds most likely
shots.py       examples before the question: their draws, and how many fit
choice.py      accuracy of a task of choice, over draws
bias.py        StereoSet and CrowS-Pairs
vocabulary.py  text to the model's tokens and back
model.py       a checkpoint, on any number of processes, gives log-probabilities
generation.py  greedy and beam search
generative.py  translation and summarisation
protocol.py    what all kinds of tasks are asked for, and given
progress.py    the file of results, from which the same command goes on
command.py     `fairseq-moe priming`
"""
