"""What `from_pretrained` returns: an interface that scores texts and continues prompts, with the
tokenizer found beside the dictionary."""

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import torch
from fairseq.data.data_utils import collate_tokens
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor

from .. import context, starting
from ..errors import UserError

TOKENIZER = ("encoder.json", "vocab.bpe")


def find_tokenizer(data: Path) -> Optional[Dict[str, str]]:
    """Settings of the tokenizer that `fairseq-moe prepare` wrote with this data, in the folder or,
    for one of several corpora, in the one above with the same dictionary; None: there is none."""
    dictionary = data / "dict.txt"
    for folder in (data, data.resolve().parent):
        files = [folder / name for name in TOKENIZER]
        if not all(file.is_file() for file in files) or not dictionary.is_file():
            continue
        above = folder / "dict.txt"
        if above.is_file() and above.read_bytes() == dictionary.read_bytes():
            encoder, merges = map(str, files)
            return {"bpe": "gpt2", "gpt2_encoder_json": encoder, "gpt2_vocab_bpe": merges}
    return None


class LanguageModelHub(GeneratorHubInterface):
    """fairseq's interface (fairseq/hub_utils.py:88@0.12.2) for language models, to which a
    newline is an </s>, within a text and at its end."""

    def encode(self, sentence: str) -> Tensor:
        """Tokens of all lines, </s> between them and at the end. Raises UserError for text of which
        nothing is in the dictionary."""
        lines = [super(LanguageModelHub, self).encode(line) for line in sentence.split("\n")]
        tokens = torch.cat(lines)
        words = tokens[tokens.ne(self.src_dict.eos())]
        if len(words) and words.eq(self.src_dict.unk()).all():
            where = self.cfg.task.data
            raise UserError(
                f"{sentence[:40]!r}: nothing but <unk>; "
                + (
                    f"there is no {' and '.join(TOKENIZER)} in {where}: put the model's there, or "
                    "give bpe='gpt2', gpt2_encoder_json=FILE and gpt2_vocab_bpe=FILE"
                    if self.bpe is None
                    else f"the tokenizer and {where}/dict.txt are not of one model"
                )
            )
        return tokens

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens, without the </s> at their end."""
        eos = self.tgt_dict.eos()
        lines: List[List[int]] = [[]]
        for token in torch.as_tensor(tokens).tolist():
            if token == eos:
                lines.append([])
            else:
                lines[-1].append(token)
        lines = lines[:-1] if len(lines) > 1 and not lines[-1] else lines
        return "\n".join(super(LanguageModelHub, self).decode(torch.tensor(line)) for line in lines)

    def sample(self, sentences, beam: int = 1, verbose: bool = False, **kwargs):
        """As stock's; a prompt that ends in newlines is continued after them."""
        with context.during(context.prompts_go_on, True):
            return super().sample(sentences, beam, verbose, **kwargs)

    def score(self, sentences, replace_newline_with_eos: bool = True, **kwargs):
        """As stock's; newlines are always </s>. Raises UserError for text without a token."""
        for i, text in enumerate([sentences] if isinstance(sentences, str) else sentences):
            if not text.strip(" \t"):
                which = "" if isinstance(sentences, str) else f" {i + 1} of {len(sentences)}"
                raise UserError(f"score: text{which} is empty: remove it")
        return super().score(sentences, replace_newline_with_eos=False, **kwargs)

    def generate(self, tokenized_sentences, beam: int = 5, verbose: bool = False, **kwargs):
        """As stock's. Raises UserError for settings that no search can have."""
        if isinstance(tokenized_sentences, list) and not tokenized_sentences:
            return []
        settings = {**self.cfg.generation, "beam": beam, **kwargs}
        known = {key: value for key, value in settings.items() if key in self.cfg.generation}
        starting.check({**known, "task": "language_modeling"}, str, False)
        return super().generate(tokenized_sentences, beam=beam, verbose=verbose, **kwargs)

    def _build_batches(
        self, tokens: List[Tensor], skip_invalid_size_inputs: bool
    ) -> Iterator[Dict[str, Any]]:
        """As task.build_dataset_for_inference (fairseq/tasks/language_modeling.py:270@0.12.2),
        which strips all </s> at the end; here only the last one, which ends the text."""
        dictionary, longest = self.src_dict, int(self.max_positions)
        start = dictionary.bos() if getattr(self.cfg.task, "add_bos_token", 0) else dictionary.eos()
        rows: Dict[int, Tensor] = {}
        for i, row in enumerate(tokens):
            row = row.cpu().long()
            row = row[:-1] if len(row) and row[-1] == dictionary.eos() else row
            if len(row) < longest:
                rows[i] = row
            elif not skip_invalid_size_inputs:
                raise UserError(
                    f"text {i + 1} of {len(tokens)} has {len(row)} tokens; the model takes "
                    f"{longest - 1}: shorten it"
                )
        order = sorted(rows, key=lambda i: len(rows[i]))
        size = self.cfg.dataset.batch_size or 1
        for ids in (order[i : i + size] for i in range(0, len(order), size)):
            first, pad = torch.tensor([start]), torch.tensor([dictionary.pad()])
            inputs = [torch.cat([first, rows[i]]) for i in ids]
            targets = [torch.cat([rows[i], pad]) for i in ids]
            yield {
                "id": torch.tensor(ids),
                "net_input": {
                    "src_tokens": collate_tokens(inputs, dictionary.pad()),
                    "src_lengths": torch.tensor([len(row) for row in inputs]),
                },
                "target": collate_tokens(targets, dictionary.pad()),
            }
