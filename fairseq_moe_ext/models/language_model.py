"""The registered model: dense and Mixture-of-Experts language models."""

import functools
import logging
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models import FairseqLanguageModel, register_model
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import context, fully_sharded
from ..config import MoETransformerLMConfig
from ..config_checks import validate, validate_scope
from ..errors import DAMAGED, ModelMisfit, UserError
from ..expert_parallel import mark_experts, process_count, replica_count
from ..kernels.dtypes import at_least_float32
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.matmul import linear
from ..moe.router import TopKRouter
from ..shape import context_length, shape_of
from .decoder import MoETransformerDecoder, too_few_positions
from .hub import LanguageModelHub, data_folder, find_tokenizer, own_data
from .precision import bfloat16_pays, in_bfloat16
from .token_scores import in_chunks, log_probs
from .unfilled import unfilled_where_loaded

logger = logging.getLogger(__name__)

MODEL_NAME = "moe_transformer_lm"


@register_model(MODEL_NAME, dataclass=MoETransformerLMConfig)
class MoETransformerLanguageModel(FairseqLanguageModel):
    """Decoder-only Transformer language model (Artetxe et al. 2021, section 2)."""

    # A criterion may pass `target` to forward, and gets the loss instead of logits.
    computes_loss = True

    def __init__(self, decoder: MoETransformerDecoder) -> None:
        super().__init__(decoder)
        # Scores a candidate by its final position; only where a task has asked for it.
        self.choice_head: Optional[nn.Linear] = None

    @classmethod
    def build_model(
        cls, cfg: MoETransformerLMConfig, task: FairseqTask
    ) -> "MoETransformerLanguageModel":
        """Raises UserError for settings that cannot work, before any work starts."""
        validate(cfg)
        adds_bos = getattr(getattr(task, "args", None), "add_bos_token", False)
        longest = cfg.tokens_per_sample + bool(adds_bos)
        learned = context_length(cfg)
        if cfg.decoder_learned_pos and longest > learned == cfg.tokens_per_sample:
            raise too_few_positions(longest, learned)
        if process_count() > 1 and shape_of(cfg).sparse:
            validate_scope(cfg)
        fully_sharded.prepare(cfg, bfloat16_pays)
        with unfilled_where_loaded():
            model = cls(MoETransformerDecoder(cfg, task.source_dictionary))
        model.has_experts = mark_experts(model)
        model.expert_replicas = replica_count(cfg.moe_expert_count)
        freeze(model, str(cfg.moe_freeze))
        return fully_sharded.to_wrapping_precision(model)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str = ".",
        **kwargs: Any,
    ) -> GeneratorHubInterface:
        """As stock's (fairseq/models/fairseq_model.py:237@0.12.2): a folder, a checkpoint in it, a
        data-bin, and overrides of settings -> an interface with `score`, `generate` and `sample`,
        which takes the tokenizer in the data's folder unless `bpe` is given. Without a data-bin,
        the tokenizer is the one that travels with the checkpoint.

        No token is dropped unless moe_eval_capacity_token_fraction says so: the branch's quarter
        of a batch is meant for long batches, and a sentence's score should not depend on the
        others in its batch.

        Raises:
            UserError: for a folder that does not exist, or a tokenizer of another model.
        """
        if "://" not in model_name_or_path and not os.path.exists(model_name_or_path):
            raise UserError(
                f"{model_name_or_path}: no such folder; name the one with the checkpoint"
            )
        kwargs.setdefault("moe_eval_capacity_token_fraction", 1.0)
        if "://" not in model_name_or_path:
            folder = Path(model_name_or_path)
            data_name_or_path = own_data(folder, checkpoint_file, data_name_or_path, kwargs)
        if "bpe" not in kwargs:
            data = data_folder(Path(model_name_or_path), data_name_or_path)
            kwargs.update(find_tokenizer(data) or {})
        hub = super().from_pretrained(
            model_name_or_path, checkpoint_file, data_name_or_path, **kwargs
        )
        return LanguageModelHub(hub.cfg, hub.task, list(hub.models))

    def prepare_for_inference_(self, cfg: DictConfig) -> None:
        """As stock's (fairseq/models/fairseq_model.py:163@0.12.2), and --bf16, which
        stock ignores; the decoder has no dropout to keep. Raises UserError for
        --retain-dropout."""
        if cfg.common.bf16:
            in_bfloat16(self, cfg.common.cpu)
        if cfg.generation.retain_dropout:
            raise UserError(
                "--retain-dropout: these models have no dropout in inference; remove it"
            )
        super().prepare_for_inference_(cfg)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        target: Optional[Tensor] = None,
        scored: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """
        Args:
            src_tokens: (B, S) int64.
            target: (B, S) int64, the token that follows each of src_tokens.
            scored: (B, S) bool. With target, the positions whose next token counts; without, one
                in each row, at which the choice head looks.

        Returns:
            logits (B, S, V), or, given target, the cross-entropy summed over its tokens but
            padding, in nats, for which the logits are never held whole; and the decoder's dict.
            Given `scored`, in place of the loss, scores (B, 1) of the rows: the sum of the
            log-probabilities of their tokens that count, in nats; or (B, outputs) of the choice
            head.
        """
        if target is None and scored is None:
            return self.decoder(src_tokens, **kwargs)
        x, extra = self.decoder(src_tokens, features_only=True, **kwargs)  # (B, S, D)
        if target is None:
            assert self.choice_head is not None, "add_choice_head comes first"
            last = F.dropout(x[scored], self.decoder.dropout, self.training)  # (B, D)
            return self._head_scores(self.choice_head, last), extra
        if scored is not None:
            return self._log_likelihood(x, target, scored), extra
        loss = linear_cross_entropy(
            x.reshape(-1, x.size(-1)),
            self.decoder.output_projection.weight,
            target.reshape(-1),
            ignore_index=self.decoder.padding_idx,
        )
        return loss, extra

    def _log_likelihood(self, x: Tensor, target: Tensor, scored: Tensor) -> Tensor:
        """x (B, S, D), target (B, S), scored (B, S) bool -> (B, 1) in float32 at least. In
        evaluation candidates are compared by them, and rounded ones may be equal."""
        rows = scored.nonzero()[:, 0]  # (N,)
        # The backward pass recomputes the logits; otherwise those of all chunks would coexist.
        score = functools.partial(
            checkpoint, log_probs, exact=not self.training, use_reentrant=False
        )
        scores = torch.cat(in_chunks(score, self.decoder, x[scored], target[scored]))
        return scores.new_zeros(len(x)).index_add(0, rows, scores).unsqueeze(1)

    def _head_scores(self, head: nn.Linear, x: Tensor) -> Tensor:
        """x (B, D) -> (B, outputs); in evaluation in float32 at least, as _log_likelihood."""
        if self.training:
            return head(x.to(head.weight.dtype))
        return linear(x.to(at_least_float32(head.weight)), head.weight, head.bias)

    def add_choice_head(self, outputs: int) -> None:
        """Add the linear layer that scores a candidate by the features of its final position
        (Radford et al. 2018, section 3.2), from N(0, 0.02).

        Args:
            outputs: 1 where each candidate is a sequence; the number of classes where one sequence
                has a score for each.

        Raises:
            UserError: under --ddp-backend fully_sharded.
        """
        if fully_sharded.is_wrapping():
            raise UserError(
                "--choice-scoring head with --ddp-backend fully_sharded: FSDP cannot save the "
                "head; use sum or mean, or pytorch_ddp"
            )
        # A bias shared by all candidates would change nothing.
        head = nn.Linear(self.decoder.embed_tokens.embedding_dim, outputs, bias=outputs > 1)
        nn.init.normal_(head.weight, std=0.02)
        if outputs > 1:
            nn.init.zeros_(head.bias)
        self.choice_head = head
        projection = "decoder.output_projection.weight"
        if process_count() > 1 and projection in dict(self.named_parameters()):
            # Untied, it gets no gradient, and PyTorch's wrapper would wait for one.
            self._ddp_params_and_buffers_to_ignore.append(projection)

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """As stock's; a choice head that the checkpoint lacks, or has for another number of
        classes, keeps its initial values in training, and is a ModelMisfit in evaluation; one that
        this model lacks is ignored."""
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}.choice_head." if name else "choice_head."
        own = {} if self.choice_head is None else self.choice_head.state_dict(prefix=prefix)
        saved = {key for key in state_dict if key.startswith(prefix)}
        if any(key not in saved or state_dict[key].shape != own[key].shape for key in own):
            built = context.building.get()
            if built is not None and built.whole:
                raise ModelMisfit(
                    "has no head that scores these candidates",
                    "use questions with the classes that it was trained on, or --choice-scoring "
                    "sum or mean",
                )
            logger.info(
                "starting with a new head to score candidates: the checkpoint has none that fits"
            )
            state_dict.update(own)
        for key in saved - set(own):
            del state_dict[key]

    def load_state_dict(
        self,
        state_dict: Dict[str, Tensor],
        strict: bool = True,
        model_cfg: Optional[DictConfig] = None,
        args: None = None,
    ):
        """As stock's, but raise a one-line UserError for a state that does not fit."""
        self.upgrade_state_dict(state_dict)
        if strict:
            self.check_state(state_dict, {key: v.shape for key, v in self.state_dict().items()})
        return super().load_state_dict(state_dict, strict, model_cfg, args)

    def check_state(self, state_dict: Dict[str, Tensor], own: Dict[str, torch.Size]) -> None:
        """Raise UserError for a state that does not fit.

        Args:
            own: shapes in the state of this model; tied weights may be named once.
        """
        embedding, projection = "decoder.embed_tokens.weight", "decoder.output_projection.weight"
        saved = state_dict.get(embedding)
        if saved is not None and saved.size(0) != own[embedding][0]:
            raise ModelMisfit(
                f"has a vocabulary of {saved.size(0)}, but the dictionary one of "
                f"{own[embedding][0]}",
                "use the dict.txt that it was trained with",
            )
        if self.decoder.share_input_output_embed:
            own = {**own, projection: own[embedding]}
        shapes = {key: value.shape for key, value in state_dict.items()}
        sizes = [
            f"{key} is {_sizes(shapes[key])} in the checkpoint, {_sizes(own[key])} in the model"
            for key in own
            if key in shapes and shapes[key] != own[key]
        ]
        missing = [f"{key} is not in the checkpoint" for key in own if key not in state_dict]
        unknown = [f"{key} is not in the model" for key in state_dict if key not in own]
        shown = sizes[:2] + missing[:2] + unknown[:2]
        if shown:
            more = len(sizes) + len(missing) + len(unknown) - len(shown)
            raise ModelMisfit(
                f"does not fit the model: {'; '.join(shown)}"
                + (f"; and {more} more" if more > 0 else ""),
                "use the --arch and model flags that it was trained with"
                + (_UPCYCLE if _is_dense(state_dict) and not _is_dense(own) else ""),
            )
        tied = self.decoder.share_input_output_embed
        if tied and not torch.equal(state_dict[embedding], state_dict[projection]):
            if not state_dict[embedding].isfinite().all():  # NaN is equal to nothing
                raise ModelMisfit(f"holds NaN or infinity in {embedding}", DAMAGED)
            raise ModelMisfit(
                "has a separate output projection, but the model ties it to the embedding "
                "(--share-decoder-input-output-embed, as our sizes do)",
                f"use --arch {MODEL_NAME}, which does not, and the flags that it was trained with",
            )


def freeze(model: nn.Module, part: str) -> None:
    """Exclude a part of the MoE layers from training (--moe-freeze): its parameters get no
    gradient, so the trainer passes them to no optimizer (fairseq/trainer.py:293@0.12.2). All of
    such a layer but its gate is its experts: shared ones and latent projections, too."""
    for name, parameter in model.named_parameters():
        gate = ".moe_layer.gate." in name
        expert = ".moe_layer." in name and not gate
        frozen = {
            "none": False,
            "gate": gate,
            "experts": expert,
            "gate_and_experts": gate or expert,
        }[part]
        parameter.requires_grad_(not frozen)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.frozen = part in ("gate", "gate_and_experts")


_UPCYCLE = ", or make a sparse model of it with `fairseq-moe convert --upcycle`"


def _is_dense(names: Iterable[str]) -> bool:
    return not any(".moe_layer." in name for name in names)


def _sizes(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
