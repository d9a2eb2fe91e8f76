"""Zero- and few-shot priming: a trained language model answers questions (questions/) without
being tuned.

shots.py       examples before the question: their draws, and how many fit
choice.py      accuracy of a task of choice, over draws
bias.py        StereoSet and CrowS-Pairs
model.py       a checkpoint, on any number of processes, gives log-probabilities
generation.py  greedy and beam search
generative.py  translation and summarisation
protocol.py    what all kinds of tasks are asked for, and given
progress.py    the file of results, from which the same command goes on
command.py     `fairseq-moe priming`
harness.py, lm_eval_command.py   `fairseq-moe lm-eval`: EleutherAI's harness
"""
