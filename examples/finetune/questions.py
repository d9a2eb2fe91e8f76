"""Questions like StoryCloze's from the quickstart's text: which of two passages goes on with this
one, its own next lines or those of another document of the same kind?

Made from what the Python installation carries; questions of a split come from documents of that
split, of which the models were trained on `train` alone. Deterministic for a seed.
"""

import json
import random
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

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
    text alike. Raises UserError if there are not enough."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        rng = random.Random(f"{seed} {split}")
        chosen: List[Dict] = []
        for i, name in enumerate(names):
            share = size // len(names) + (i < size % len(names))
            lines = (text / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
            documents = [json.loads(line)["text"] for line in lines]
            rng.shuffle(documents)
            # No more than needed, as choosing among all endings takes the square of their number.
            enough = _first(documents, 3 * share)
            made = questions_of(enough, rng)
            if len(made) < share:
                raise UserError(
                    f"{text / f'{name}.{split}.jsonl'}: has text for {len(made)} questions, "
                    f"{share} are asked for: lower --{split}, or raise --text-bytes"
                )
            chosen += rng.sample(made, share)
        rng.shuffle(chosen)
        partial = folder / f"{split}.jsonl.partial"
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(question) + "\n" for question in chosen)
        partial.rename(folder / f"{split}.jsonl")


def _first(documents: List[str], passages_wanted: int) -> List[str]:
    count, taken = 0, []
    for document in documents:
        if count >= passages_wanted:
            break
        taken.append(document)
        count += sum(1 for _ in passages(document))
    return taken
