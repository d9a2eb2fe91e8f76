"""Examples with candidates, one of them right, as batches of token sequences.

A sequence begins with </s>, because every text in training follows one. With a head it also ends
with one, which the head looks at; with the language model's scores it ends where its last token is
predicted.
"""

from typing import Any, Dict, List, NamedTuple

import numpy as np
import torch
from fairseq.data import FairseqDataset
from torch import Tensor


class Item(NamedTuple):
    """One example."""

    inputs: List[Tensor]  # (T,) int64 each: the sequences
    scored: List[int]  # how many positions at each one's end count
    targets: List[Tensor]  # (T,) int64 each, the tokens that follow; [] for the head
    label: int  # the right choice
    cut: bool = False  # longer than the context: it lost its beginning


class ChoiceDataset(FairseqDataset):
    """Batches in the form that the criterion multiple_choice needs."""

    def __init__(self, items: List[Item], pad: int, outputs: int, shuffle: bool) -> None:
        """
        Args:
            outputs: scores that the model gives to a sequence: 1, or the number of classes.
            shuffle: break ties of length at random.
        """
        self.items = items
        self.pad = pad
        self.outputs = outputs
        self.shuffle = shuffle
        # Longest sequence of each example. With --max-tokens all count padded, and as many to an
        # example as the one with most candidates has.
        self.sizes = np.array([max(map(len, item.inputs)) for item in items], dtype=np.int64)
        self._padded = self.sizes * max(len(item.inputs) for item in items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        return {"id": int(index), "item": self.items[index]}

    def num_tokens(self, index: int) -> int:
        return self._padded[index]

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self._padded[indices]

    def size(self, index: int) -> int:
        return self.sizes[index]

    def ordered_indices(self) -> np.ndarray:
        """By length, so that batches contain little padding; batches are shuffled anyway."""
        order = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))
        return order[np.argsort(self.sizes[order], kind="stable")]

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        """B examples with R sequences in all, C candidates at most:

        net_input   src_tokens (R, T), padded on the right; src_lengths (R,); scored (R, T) bool;
                    in the language model's way also target (R, T)
        score_index (B, C) int64: where each candidate's score is among all scores of the
                    sequences, -1 where an example has fewer candidates
        target      (B,) int64: the right candidate
        cut         (B,) bool: the example lost its beginning
        """
        if not samples:  # a process without a batch
            return {}
        items = [sample["item"] for sample in samples]
        inputs = [row for item in items for row in item.inputs]
        lengths = torch.tensor([len(row) for row in inputs])
        scored = torch.zeros(len(inputs), int(lengths.max()), dtype=torch.bool)
        for row, length, count in zip(scored, lengths, (n for item in items for n in item.scored)):
            row[length - count : length] = True
        net_input = {
            "src_tokens": self._padded_right(inputs),
            "src_lengths": lengths,
            "scored": scored,
        }
        targets = [row for item in items for row in item.targets]
        if targets:
            net_input["target"] = self._padded_right(targets)
        counts = [len(item.inputs) * self.outputs for item in items]
        score_index = torch.full((len(items), max(counts)), -1)
        start = 0
        for row, count in zip(score_index, counts):
            row[:count] = torch.arange(start, start + count)
            start += count
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": net_input,
            "score_index": score_index,
            "target": torch.tensor([item.label for item in items]),
            "cut": torch.tensor([item.cut for item in items]),
            "ntokens": int(lengths.sum()),
            "nsentences": len(items),
        }

    def _padded_right(self, rows: List[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
