"""Questions of one's own in files, and tasks and models for them."""

import json
import random

import torch
from small_models import make_config

from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel
from fairseq_moe_ext.tasks.multiple_choice import MultipleChoiceTask, MultipleChoiceTaskConfig

CLASSES = ("big", "mid", "small")  # words big0, big1, ... of the corpora in mixture_data.py
SIZES = {"train": 120, "valid": 40, "test": 30}


def write_choices(folder):
    """Which of two to four words goes on with the corpus of the words before it?"""
    for split, size in SIZES.items():
        rng = random.Random(split)
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(size):
                name, *others = rng.sample(CLASSES, rng.randint(2, 3))
                choices = [(name, 1), *((other, 0) for other in others)]
                rng.shuffle(choices)
                context = words(rng, name, rng.randint(2, 7))
                texts = [" " + words(rng, corpus, rng.randint(1, 3)) for corpus, _ in choices]
                label = [right for _, right in choices].index(1)
                file.write(json.dumps({"context": context, "choices": texts, "label": label}))
                file.write("\n")
    return folder


def write_classes(folder):
    """Of which corpus are the words?"""
    (folder / "labels.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    for split, size in SIZES.items():
        rng = random.Random(split)
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(size):
                name = rng.choice(CLASSES)
                text = words(rng, name, rng.randint(2, 9))
                file.write(json.dumps({"text": text, "label": name}) + "\n")
    return folder


def words(rng, corpus, count):
    return " ".join(f"{corpus}{rng.randrange(30)}" for _ in range(count))


def make_choice_task(bins, folder, **settings):
    """The task, without a command line."""
    cfg = MultipleChoiceTaskConfig(
        **{
            "data": str(bins),
            "choice_data": str(folder),
            "tokens_per_sample": 64,
            "train_subset": "train",
            "best_checkpoint_metric": "accuracy",
            "maximize_best_checkpoint_metric": True,
            **settings,
        }
    )
    return MultipleChoiceTask.setup_task(cfg)


def make_choice_model(task, seed=0, **flags):
    torch.manual_seed(seed)
    model = MoETransformerLanguageModel.build_model(make_config(**flags), task)
    if task.scoring == "head":
        model.add_choice_head(task.outputs)
    return model


def load(task, split="valid"):
    task.load_dataset(split)
    return task.dataset(split)


def batch_of(dataset, indices):
    return dataset.collater([dataset[i] for i in indices])
