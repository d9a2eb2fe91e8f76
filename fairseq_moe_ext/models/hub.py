"""What `from_pretrained` returns: an interface that scores texts and continues prompts, with the
tokenizer found beside the dictionary."""

import logging
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Union

import torch
from fairseq.data.data_utils import collate_tokens
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor

from .. import command_checks, context, tokenizer_files
from ..data_bin import TOKENIZER, check_is_one
from ..errors import UserError
from . import text_generation

logger = logging.getLogger(__name__)


def find_tokenizer(data: Path) -> Optional[Dict[str, str]]:
    """Settings of the byte-level BPE of a data folder; None: there is none."""
    files = tokenizer_files.files_of(data)
    if not set(TOKENIZER) <= files.keys():
        return None
    settings = dict(zip(tokenizer_files.GIVEN, (str(files[n]) for n in TOKENIZER)))
    return {"bpe": "gpt2", **settings}


def own_data(folder: Path, checkpoint_file: str, data: str, given: Mapping[str, Any]) -> str:
    """The data folder to take dictionary and tokenizer from. Raises UserError for a tokenizer of
    another model, and a folder whose name fairseq would take for several.

    Args:
        folder, checkpoint_file: as from_pretrained's.
        data: as its data_name_or_path; "." means the tokenizer that travels with the
            checkpoint, beside it or in the folder that it was trained on.
        given: as its overrides of settings, perhaps a bpe.
    """
    path = folder / checkpoint_file.split(os.pathsep)[0]
    if "bpe" in given:
        tokenizer_files.check_bpe(path, given)
    if data == ".":
        data = str(tokenizer_files.folder_for(path, None, "data_name_or_path=").resolve())
        check_is_one(data)
        return data
    where = data_folder(folder, data)
    if where.is_dir():
        check_is_one(where)
        if "bpe" not in given:
            tokenizer_files.check(path, where)
    return data


def data_folder(folder: Path, data: str) -> Path:
    """A data_name_or_path as fairseq takes it: relative to the model where it begins with a dot."""
    return folder / data if data.startswith(".") else Path(data)


class LanguageModelHub(GeneratorHubInterface):
    """fairseq's interface (fairseq/hub_utils.py:85@0.12.2) for language models, to which a
    newline is an </s>, within a text and at its end."""

    @property
    def first_token(self) -> int:
        """The token that texts begin with: </s>, or <s> if training had --add-bos-token."""
        adds_bos = getattr(self.cfg.task, "add_bos_token", False)
        return self.src_dict.bos() if adds_bos else self.src_dict.eos()

    def encode(self, sentence: str) -> Tensor:
        """Tokens of all lines, </s> between them and at the end. Raises UserError for text of which
        nothing is in the dictionary; warns, once, of one of which a tenth is not."""
        lines = [super(LanguageModelHub, self).encode(line) for line in sentence.split("\n")]
        tokens = torch.cat(lines)
        words = tokens[tokens.ne(self.src_dict.eos())]
        unknown = int(words.eq(self.src_dict.unk()).sum())
        if unknown and unknown == len(words):
            raise UserError(f"{sentence[:40]!r}: contains only <unk>; {self._other_tokenizer()}")
        if unknown >= 0.1 * max(1, len(words)) and not self._warned_of_unknown:
            self._warned_of_unknown = True
            logger.warning(
                f"{sentence[:40]!r}: {unknown} of its {len(words)} words are not in the "
                f"dictionary; {self._other_tokenizer()}"
            )
        return tokens

    _warned_of_unknown = False

    def _other_tokenizer(self) -> str:
        where = self.cfg.task.data
        if self.bpe is not None:
            return f"the tokenizer and {where}/dict.txt belong to different models"
        return (
            f"there is no {' and '.join(TOKENIZER)} in {where}: put the model's there, or give its "
            "tokenizer to from_pretrained (bpe='gpt2', gpt2_encoder_json=FILE, "
            "gpt2_vocab_bpe=FILE; or bpe='sentencepiece', sentencepiece_model=FILE) or to "
            "fairseq-interactive (--bpe)"
        )

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

    def generate(
        self, prompts: Union[str, List[str], List[Tensor]], *args: Any, **settings: Any
    ) -> Any:
        """Continue a text, or several, across newlines. (Given tokens, works like stock's, which
        `sample` calls.)

        Args:
            settings: max_tokens, stop (a text or several), temperature, top_k, top_p,
                repetition_penalty, no_repeat_ngram_size, beams, seed, n, as text_generation's
                settings_of; stream: a function that takes each further piece of the text, for one
                prompt and one text.

        Returns:
            What follows the prompt, without what it stopped at; a list of n such texts for n above
            1; a list of these for a list of prompts.

        Raises:
            UserError: for an invalid setting, or a prompt that leaves no room in the context.
        """
        several = isinstance(prompts, (list, tuple))
        if not isinstance(prompts, str) and not (
            several and all(isinstance(prompt, str) for prompt in prompts) and len(prompts)
        ):
            return self._generate_from_tokens(prompts, *args, **settings)
        stream = settings.pop("stream", None)
        try:
            wanted = text_generation.settings_of(*args, **settings)
        except TypeError as error:
            raise UserError(f"generate: {str(error).replace('settings_of() ', '')}") from None
        texts = [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
        if stream is not None and (several or wanted.n > 1 or wanted.beams > 1):
            raise UserError("stream: one prompt, n=1 and beams=1 only; remove stream")
        continuations = text_generation.generate(self, texts, wanted, stream)
        all_texts = [[text.text for text in some] for some in continuations]
        results = [some[0] if wanted.n == 1 else some for some in all_texts]
        return results if several else results[0]

    def _generate_from_tokens(
        self, tokenized_sentences, beam: int = 5, verbose: bool = False, **kwargs
    ):
        """As stock's. Raises UserError for settings that no search can have."""
        if isinstance(tokenized_sentences, list) and not tokenized_sentences:
            return []
        settings = {**self.cfg.generation, "beam": beam, **kwargs}
        known = {key: value for key, value in settings.items() if key in self.cfg.generation}
        command_checks.check({**known, "task": "language_modeling"}, str, False)
        return super().generate(tokenized_sentences, beam=beam, verbose=verbose, **kwargs)

    def _build_batches(
        self, tokens: List[Tensor], skip_invalid_size_inputs: bool
    ) -> Iterator[Dict[str, Any]]:
        """As task.build_dataset_for_inference (fairseq/tasks/language_modeling.py:269@0.12.2),
        which strips all </s> at the end; here only the last one, which ends the text."""
        dictionary, longest = self.src_dict, int(self.max_positions)
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
            first, pad = torch.tensor([self.first_token]), torch.tensor([dictionary.pad()])
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
