"""What fairseq-score needs for --sentence-bleu, and for --sacrebleu with sacrebleu 2."""

import sys
from typing import Any


def scorer_of_numbers(stock: Any, self: Any, cfg: Any, *others: int) -> None:
    """`fairseq-score --sentence-bleu` gives the scorer three numbers instead of its settings."""
    if others:
        eos, unk = others
        cfg = sys.modules["fairseq.scoring.bleu"].BleuConfig(pad=cfg, eos=eos, unk=unk)
    stock(self, cfg)


def bleu_of_files(stock: Any, system: Any, references: Any, *args: Any, **kwargs: Any) -> Any:
    """`fairseq-score --sacrebleu` gives sacrebleu open files, where version 2 wants lists."""
    lists = [list(reference) for reference in references]
    return stock(list(system), lists, *args, **kwargs)
