"""Questions like StoryCloze's from the quickstart's text: which of two passages goes on with this
one, its own next lines or those of another document of the same kind?

Made from what the Python installation carries. Test questions are from test documents, which the
models never saw; train and valid questions from train documents. Deterministic for a seed.
"""

import json
import random
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from fairseq_moe_ext import outputs
from fairseq_moe_ext.errors import UserError

CONTEXT = 160  # characters of context, rounded up to whole lines
ENDING = (40, 100)  # fewest and most characters of an ending


def passages(document: str) -> Iterator[Tuple[str, str]]:
    """Stretches of a document, one behind the other, as (context, ending)."""
    lines = [line.rstrip() for line in document.split("\n") if line.strip()]
    while lines:
        context = _take(lines, CONTEXT)
        ending = _take(lines, ENDING[0])
        if len(context) >= CONTEXT and ENDING[0] <= len(ending) <= ENDING[1]:
            yield context[-2 * CONTEXT :], ending


def _take(lines: List[str], least: int) -> str:
    """Whole lines off the front until there are `least` characters."""
    taken: List[str] = []
    while lines and sum(map(len, taken)) < least:
        taken.append(lines.pop(0))
    return "\n".join(taken)


def questions_of(documents: List[str], rng: random.Random) -> List[Dict]:
    """One question a passage; the wrong ending is that of another document."""
    found = [
        (number, context, ending)
        for number, document in enumerate(documents)
        for context, ending in passages(document)
    ]
    questions = []
    for number, context, ending in found:
        others = {e for n, _, e in found if n != number and e != ending}
        if not others:
            continue
        wrong = rng.choice(sorted(others))
        label = rng.randrange(2)
        choices = [f"\n{ending}", f"\n{wrong}"]
        if label:
            choices.reverse()
        questions.append({"context": context, "choices": choices, "label": label})
    return questions


def write(text: Path, names: List[str], sizes: Dict[str, int], folder: Path, seed: int) -> None:
    """Write FOLDER/{train,valid,test}.jsonl with as many questions as `sizes` says, all kinds of
    text alike; valid's are from documents of the quickstart's train that train's are not from, as
    its valid is one document or two. Raises UserError if there are not enough."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen: Dict[str, List[Dict]] = {split: [] for split in sizes}
    for i, name in enumerate(names):
        left: Dict[Path, List[str]] = {}  # documents that no split has taken yet
        for split, size in sizes.items():
            rng = random.Random(f"{seed} {name} {split}")
            share = size // len(names) + (i < size % len(names))
            path = text / f"{name}.{'test' if split == 'test' else 'train'}.jsonl"
            if path not in left:
                with open(path, encoding="utf-8") as lines:  # U+2028 in a string ends none
                    left[path] = [json.loads(line)["text"] for line in lines]
                rng.shuffle(left[path])
            # No more than needed, as choosing among all endings takes the square of their number.
            made = questions_of(_first(left[path], 3 * share), rng)
            if len(made) < share:
                raise UserError(
                    f"{path}: has text for {len(made)} questions, but {share} are requested: "
                    f"lower --{split}"
                )
            chosen[split] += rng.sample(made, share)
    for split, found in chosen.items():
        random.Random(seed).shuffle(found)
        lines = "".join(json.dumps(question) + "\n" for question in found)
        outputs.write_text(folder / f"{split}.jsonl", lines)


def _first(documents: List[str], wanted: int) -> List[str]:
    """Take as many documents off the front as have that many passages, and some of each of four."""
    counts: List[int] = []
    taken: List[str] = []
    while documents and (sum(counts) < wanted or sum(map(bool, counts)) < 4):
        taken.append(documents.pop(0))
        counts.append(sum(1 for _ in passages(taken[-1])))
    return taken
