"""The registered model: dense and Mixture-of-Experts language models."""

from typing import Any, Dict, Optional, Tuple

from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models import FairseqLanguageModel, register_model
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from torch import Tensor

from .. import fully_sharded
from ..config import MoETransformerLMConfig, validate
from ..errors import UserError
from ..expert_parallel import mark_experts
from .decoder import MoETransformerDecoder
from .linear_cross_entropy import linear_cross_entropy

MODEL_NAME = "moe_transformer_lm"


@register_model(MODEL_NAME, dataclass=MoETransformerLMConfig)
class MoETransformerLanguageModel(FairseqLanguageModel):
    """Decoder-only Transformer language model (Artetxe et al. 2021, section 2)."""

    # A criterion may pass `target` to forward and get the loss instead of logits.
    computes_loss = True

    @classmethod
    def build_model(
        cls, cfg: MoETransformerLMConfig, task: FairseqTask
    ) -> "MoETransformerLanguageModel":
        """Raises UserError for settings that cannot work, before any work starts."""
        validate(cfg)
        fully_sharded.validate(cfg)
        model = cls(MoETransformerDecoder(cfg, task.source_dictionary))
        model.has_experts = mark_experts(model)
        return fully_sharded.to_wrapping_precision(model)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str = ".",
        **kwargs: Any,
    ) -> GeneratorHubInterface:
        """As stock's (fairseq/models/fairseq_model.py@0.12.2): a folder, a checkpoint in it, a
        data-bin, and overrides of settings -> an interface with `score` and `sample`.

        No token is dropped unless moe_eval_capacity_token_fraction says so: the branch's quarter
        of a batch is meant for long ones, and a sentence's score should not hang on its company.
        """
        kwargs.setdefault("moe_eval_capacity_token_fraction", 1.0)
        return super().from_pretrained(
            model_name_or_path, checkpoint_file, data_name_or_path, **kwargs
        )

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        target: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """
        Args:
            src_tokens: (B, T) int64.
            target: (B, T) int64, the token that follows each of src_tokens.

        Returns:
            logits (B, T, V), or, given target, the cross-entropy summed over its tokens but
            padding, in nats, for which the logits are never held whole; and the decoder's dict.
        """
        if target is None:
            return self.decoder(src_tokens, **kwargs)
        x, extra = self.decoder(src_tokens, features_only=True, **kwargs)  # (B, T, D)
        loss = linear_cross_entropy(
            x.reshape(-1, x.size(-1)),
            self.decoder.output_projection.weight,
            target.reshape(-1),
            ignore_index=self.decoder.padding_idx,
        )
        return loss, extra

    def load_state_dict(
        self,
        state_dict: Dict[str, Tensor],
        strict: bool = True,
        model_cfg: Optional[DictConfig] = None,
        args: None = None,
    ):
        """As stock's, but a state that does not fit is told in one line (UserError)."""
        self.upgrade_state_dict(state_dict)
        if strict:
            self._check_state(state_dict)
        return super().load_state_dict(state_dict, strict, model_cfg, args)

    def _check_state(self, state_dict: Dict[str, Tensor]) -> None:
        own = self.state_dict()
        embedding = "decoder.embed_tokens.weight"
        saved = state_dict.get(embedding)
        if saved is not None and saved.size(0) != own[embedding].size(0):
            missing = saved.size(0) - own[embedding].size(0)
            raise UserError(
                f"the checkpoint has {saved.size(0)} types in its embedding, the dictionary "
                f"{own[embedding].size(0)}: use the dict.txt that the checkpoint was trained with"
                + (
                    f"; if that is this one, padded, append {missing} lines: madeupword1000 0, "
                    "madeupword1001 0, ... (docs/released_models.md)"
                    if missing > 0
                    else ""
                )
            )
        sizes = [
            f"{key} is {_shape(state_dict[key])} in the checkpoint, {_shape(own[key])} in the model"
            for key in own
            if key in state_dict and state_dict[key].shape != own[key].shape
        ]
        missing = [f"{key} is not in the checkpoint" for key in own if key not in state_dict]
        unknown = [f"{key} is not in the model" for key in state_dict if key not in own]
        shown = sizes[:2] + missing[:2] + unknown[:2]
        if shown:
            more = len(sizes) + len(missing) + len(unknown) - len(shown)
            raise UserError(
                f"the checkpoint does not fit the model: {'; '.join(shown)}"
                + (f"; and {more} more" if more > 0 else "")
                + ". Use the --arch and model flags that it was trained with"
            )


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"
