"""Zero- and few-shot evaluation (the paper's priming): a trained language model answers questions
(questions/) without fine-tuning.

shots.py       examples before the question: their draws, and how many fit
choice.py      accuracy of a multiple-choice task, over draws
bias.py        StereoSet and CrowS-Pairs
model.py       log-probabilities from a checkpoint, on any number of processes
generative.py  translation and summarisation
protocol.py    what all kinds of tasks receive
resuming.py    the file of results, from which the same command resumes
command.py     `fairseq-moe priming`
harness.py, lm_eval_command.py, lm_eval_device.py   `fairseq-moe lm-eval`: EleutherAI's harness
"""
