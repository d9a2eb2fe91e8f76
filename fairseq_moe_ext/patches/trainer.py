"""fairseq/trainer.py and what it builds: optimizers, schedules, FSDP, the gradient norm."""

import contextlib
import logging
import os
from operator import attrgetter
from typing import Any, Dict, List, Optional

import torch
from fairseq.optim.lr_scheduler.reduce_lr_on_plateau import ReduceLROnPlateauLRSchedule
from torch import Tensor

from fairseq_today.errors import UserError

from .. import context, diverging, fully_sharded, ours, trainer_checks, wording
from ..branch import optimizer as branch_optimizer
from ..branch import pad_rule
from ..branch.files import find
from ..checkpoint import resuming, saving, trained
from ..config_checks import validate_processes
from ..cost import twin_difference
from ..diverging import last_good
from ..errors import NotFinite
from ..expert_parallel import process_count, sum_of_experts, sum_over_processes
from ..kernels.dtypes import at_least_float32
from ..models import compiled, precision
from ..models.router_updates import RouterUpdates
from ..shape import shape_of
from . import whole_batch
from .checkpoint_io import patience
from .ema import check_seed
from .tasks import no_sentences

logger = logging.getLogger(__name__)


def __init__(stock, self, cfg, task, model, criterion, *args, **kwargs):
    """fairseq-train would report what it cannot train, validate or save only after the first part
    of the training, which is then lost. This checks it before the first update.

    Stock divides the validation data into batches (fairseq_cli/train.py:458@0.12.2) and asks for
    the metric of the best checkpoint (fairseq_cli/train.py:533@0.12.2) only then.
    """
    if getattr(cfg.model, "moe_experts_on_disk", False):
        raise UserError(
            "--moe-experts-on-disk: experts that stay in a checkpoint's files cannot be "
            "trained; remove it (it is for fairseq-eval-lm's --model-overrides)"
        )
    self.asked_bfloat16 = cfg.common.bf16
    fully_sharded.pass_bfloat16_check(cfg, model)
    precision.take_bfloat16(cfg, model)
    trainer_checks.check_trainer(cfg, model)
    if process_count() > 1 and getattr(model, "has_experts", False):
        validate_processes(cfg.model, process_count())
    if getattr(cfg.model, "compile", False):
        compiled.check(cfg.common.cpu)
    if getattr(cfg.model, "moe_dense_twin", False):
        _describe_twin(cfg.model, task)
    stock(self, cfg, task, model, criterion, *args, **kwargs)
    check_seed(self)
    validates = not cfg.dataset.disable_validation
    for subset in cfg.dataset.valid_subset.split(",") if validates else ():
        if subset in task.datasets:
            self.get_valid_iterator(subset)


def _describe_twin(settings, task) -> None:
    shape = shape_of(settings, len(task.source_dictionary))
    widths = ", ".join(str(shape.dense_widths[layer]) for layer in shape.picked)
    beyond = twin_difference(shape, settings.tokens_per_sample)
    logger.info(
        f"dense twin: hidden width {widths} instead of the MoE layers; training FLOPs per token "
        f"beyond the sparse model's: {beyond:.4g}"
    )


def catalog_shared_params(stock, module, memo=None, prefix=""):
    """Stock takes all parameters that are None, such as biases, for one that modules share."""
    if memo is not None:
        return stock(module, memo, prefix)
    return [names for names in stock(module) if attrgetter(names[0])(module) is not None]


def load_checkpoint(
    stock,
    self,
    filename,
    reset_optimizer=False,
    reset_lr_scheduler=False,
    optimizer_overrides=None,
    reset_meters=False,
):
    """In stock one process reads the file for all. With experts each process reads its own, also
    from the branch's files. A resumed run continues to count --patience, and keeps its rule for
    padding.

    Older checkpoints, without the record for --patience, have only the best loss.
    """
    files, shapes = find(filename), None
    if files is not None:
        filename = files.shared
        shapes = None if reset_optimizer else branch_optimizer.shapes(self, files)
    with resuming.reading(self, filename, not reset_optimizer, shapes, files is not None):
        extra_state = stock(
            self, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters
        )
        if extra_state is not None:
            resuming.check(self, filename, optimizer=not reset_optimizer)
            if not reset_optimizer:
                resuming.check_overrides(self, optimizer_overrides or {})
                resuming.warn_of_kept_settings(self, filename, optimizer_overrides or {})
    updates = self.get_num_updates()
    if updates == 0:  # stock goes on counting the hours of --stop-time-hours
        self._previous_training_time = 0
    seen = trained.tokens(extra_state or {}, updates) if updates else 0
    self.tokens_before = None if seen is None else seen - trained.metered()
    if extra_state is not None and not reset_optimizer and not reset_meters:
        best = extra_state.get("best")
        before = {} if best is None else {"best": best, "num_runs": 0}
        patience().update(extra_state.get("should_stop_early") or before)
    if extra_state is not None and not reset_optimizer and not reset_lr_scheduler:
        _count_validation(self, extra_state)
    pad_rule.train_on(self, extra_state)
    if ours.is_run(self.cfg):
        trainer_checks.check_first_rate(self)
    return extra_state


def _count_validation(trainer, extra_state: Dict[str, Any]) -> None:
    """Stock saves the checkpoint of an epoch before its validation may lower the rate
    (fairseq_cli/train.py:195@0.12.2), so a resumed run would keep the higher one."""
    place, loss = extra_state["train_iterator"], extra_state.get("val_loss")
    at_the_end = place.get("iterations_in_epoch") == 0
    if at_the_end and isinstance(trainer.lr_scheduler, ReduceLROnPlateauLRSchedule):
        trainer.lr_step(place["epoch"] - 1, loss)


def save_checkpoint(stock, self, filename, extra_state):
    """A process in which training fails writes crash.pt. It has neither the experts nor the shards
    of other processes, and would wait for them to join. A run that starts from it would begin with
    the data of an epoch 0. This skips that save.

    Checkpoints also keep the record for --patience and, if known, the number of tokens.
    """
    fails = os.path.basename(filename) == "crash.pt" and ours.is_run(self.cfg)
    if saving.takes_part(self) and not fails:
        extra_state = {**extra_state, "should_stop_early": dict(patience())}
        before = getattr(self, "tokens_before", None)
        if before is not None:
            extra_state[trained.KEY] = before + trained.metered()
        stock(self, filename, extra_state)


def consolidate_optimizer(stock, self):
    """A process in which training fails gathers the optimizer's state for crash.pt, and would wait
    for the others to join; see save_checkpoint."""
    if saving.takes_part(self):
        stock(self)


def state_dict(stock, self):
    """All processes must join in gathering a state that FSDP has sharded, so the others wait for
    rank 0 to ask for it. Checkpoints do not mention FSDP, and say --bf16 where it was asked for,
    though our models need no conversion by the trainer."""
    saving.call_to_gather(self)
    state = stock(self)
    state.pop("fsdp_metadata", None)
    for group in ("common", "model"):
        settings = state["cfg"].get(group)
        # Models without a dataclass (lstm_lm) have an argparse.Namespace, which is not changed.
        if isinstance(settings, dict) and "bf16" in settings:
            settings["bf16"] = self.asked_bfloat16
    return state


def never(stock):
    """In stock the other ranks gather at every save, even if rank 0 has nothing to write; then they
    hang."""
    return False


def _prepare_sample(stock, self, sample, is_dummy=False):
    """A process that has run out of batches repeats its first one and discards the result, because
    it must join every collective. Its tokens would take slots of other processes' experts, and with
    --update-freq stock discards the sample sizes and logs of the batches before it, too
    (fairseq/trainer.py:873@0.12.2). So our models run on an empty batch instead, which counts as
    nothing."""
    sample, is_dummy = stock(self, sample, is_dummy)
    if is_dummy and process_count() > 1 and hasattr(self._model, "has_experts"):
        return no_sentences(sample), False
    return sample, is_dummy


def _set_seed(stock, self):
    """torch.manual_seed seeds every kind of device, and formats the Python stack for those that are
    not there: 1 to 2 ms of every update. This seeds only the CPU if there is no GPU."""
    if self.device.type != "cpu" or self.tpu or torch.cuda.is_available():
        return stock(self)
    torch.default_generator.manual_seed(self.cfg.common.seed + self.get_num_updates())


def zero_grad(stock, self):
    """Routers have state that changes once per update. What they observe goes the way of the
    gradients: it begins anew with them, also where these overflow or memory runs out."""
    stock(self)
    updates = _router_updates(self)
    if updates is not None:
        updates.begin()


def set_num_updates(stock, self, num_updates):
    """An update that is counted was not skipped: now the routers' state changes, before the EMA of
    the model and a checkpoint take it."""
    stock(self, num_updates)
    updates = _router_updates(self)
    if updates is not None:
        updates.finish()


def _router_updates(trainer) -> Optional[RouterUpdates]:
    return getattr(getattr(trainer.get_model(), "decoder", None), "router_updates", None)


def step(stock, self, *args, **kwargs):
    """A training that diverges ends in a traceback, or continues with a validation loss of NaN.
    This ends it with one line that names the last good checkpoint."""
    try:
        return stock(self, *args, **kwargs)
    except NotFinite as error:
        what = str(error).replace(", from the last good checkpoint", "")
        reason: BaseException = error
    except FloatingPointError as error:
        what, reason = diverging.what_is_wrong(str(error)), error
    raise UserError(f"{what}; {last_good(self.cfg.checkpoint.save_dir)}") from reason


def train_step(stock, self, samples, raise_oom=False):
    """A training that diverges ends in a traceback, or continues with a validation loss of NaN; see
    step. A balancing loss over all tokens of an update needs their choices before the first
    gradient. Where memory runs out, stock skips a batch. A process whose passes exchange data with
    others must not: they would wait for it.
    """
    # PyTorch's backend reduces gradients in the backward pass of the last batch.
    reduces = self.cfg.distributed_training.ddp_backend in ("pytorch_ddp", "c10d")
    raise_oom = raise_oom or _exchanges(self) or (process_count() > 1 and reduces)
    with whole_batch.counted(self, samples):
        return step(stock, self, samples, raise_oom)


def valid_step(stock, self, sample, raise_oom=False):
    """A loss that is not finite ends in a traceback. Where memory runs out, stock tries again, and
    processes that exchange data with this one would wait."""
    return step(stock, self, sample, raise_oom or _exchanges(self))


def _exchanges(trainer) -> bool:
    """Whether each forward pass exchanges data with other processes."""
    has_experts = getattr(trainer.get_model(), "has_experts", False)
    return process_count() > 1 and (has_experts or trainer.is_fsdp)


def get_valid_iterator(stock, self, subset, *args, **kwargs):
    """A validation silently ends after --max-valid-steps batches, plus one, of each process; of
    several corpora it would see only the first.

    Here the iterator has that many batches of each corpus, or of plain data as many as stock takes
    on one process, however many processes share them.
    """
    iterator = stock(self, subset, *args, **kwargs)
    steps = getattr(self, "max_valid_steps", None) or self.cfg.dataset.max_valid_steps
    if steps is None or not ours.is_run(self.cfg):
        return iterator
    if not hasattr(iterator, "batches_in_all"):  # later validations use the same iterator
        iterator.batches_in_all = iterator.frozen_batches
    batches = iterator.batches_in_all
    if hasattr(iterator.dataset, "first_of_each"):
        taken = iterator.dataset.first_of_each(batches, steps)
    else:
        taken = batches[: steps + 1]
    iterator._frozen_batches = tuple(taken)
    if len(taken) < len(batches):
        logger.warning(
            f"--max-valid-steps {steps}: {sum(map(len, taken)):,} of "
            f"{sum(map(len, batches)):,} samples of {subset} are counted"
        )
    return iterator


def validate(stock, cfg, trainer, task, *args, **kwargs):
    """fairseq-train must not end a validation of several corpora itself; see get_valid_iterator."""
    steps = cfg.dataset.max_valid_steps
    if steps is None or not getattr(task, "has_corpora", False):
        return stock(cfg, trainer, task, *args, **kwargs)
    trainer.max_valid_steps, cfg.dataset.max_valid_steps = steps, None
    try:
        return stock(cfg, trainer, task, *args, **kwargs)
    finally:
        trainer.max_valid_steps, cfg.dataset.max_valid_steps = None, steps


def clip_grad_norm(stock, self, clip_norm):
    """The gradient norm needs the number of replicas of an expert, which clip_grad_norm_ below does
    not get from stock."""
    replicas = getattr(self.get_model(), "expert_replicas", 1)
    with context.during(context.expert_replicas, replicas):
        return stock(self, clip_norm)


def clip_grad_norm_(stock, params, max_norm, aggregate_norm_fn=None) -> Tensor:
    """Stock leaves parameters with the attribute `expert` out of the norm, although it clips them
    by it. For the pieces of FSDP it needs a GPU and rounds to float32
    (fairseq/trainer.py:1253@0.12.2)."""
    params = [params] if isinstance(params, Tensor) else list(params)
    experts = [p.grad for p in params if hasattr(p, "expert") and p.grad is not None]
    if not experts and aggregate_norm_fn is None:
        return stock(params, max_norm)
    shared = [p.grad for p in params if not hasattr(p, "expert") and p.grad is not None]
    shared_squares = _sum_of_squares(shared)
    if aggregate_norm_fn is not None:  # FSDP's: each process has a piece of each gradient
        shared_squares = sum_over_processes(shared_squares)
    shared_norm = shared_squares.sqrt()
    norm = shared_norm
    if experts:
        expert_norm = sum_of_experts(_sum_of_squares(experts), context.expert_replicas.get()).sqrt()
        norm = torch.hypot(shared_norm, expert_norm.to(shared_norm))
    if max_norm > 0:
        clip = (float(max_norm) / (norm + 1e-6)).clamp(max=1)
        for grad in shared + experts:
            grad.mul_(clip)
    return norm


def _sum_of_squares(grads: List[Tensor]) -> Tensor:
    """In float32 at least, as float16 would overflow; a scalar."""
    norms = [torch.linalg.vector_norm(g, dtype=at_least_float32(g)) for g in grads]
    return torch.stack(norms).square().sum() if norms else torch.zeros(())


def step_amp(stock, self):
    """Stock divides the gradients of torch's optimizer by the loss scale, and passes its own
    optimizer round that one to the scaler, which divides them again."""
    self.scaler.step(self.optimizer)
    self.scaler.update()


def build_optimizer(stock, cfg, *args, **kwargs):
    """The constructors assert, or divide by zero."""
    with _telling("optimizer", cfg):
        return stock(cfg, *args, **kwargs)


def build_lr_scheduler(stock, cfg, *args, **kwargs):
    """The constructors assert, or divide by zero."""
    with _telling("lr_scheduler", cfg):
        return stock(cfg, *args, **kwargs)


def save_plateau(stock, self):
    """Stock saves the best loss, but not the number of validations since: a resumed run would lower
    the learning rate later."""
    return {**stock(self), "bad_epochs": self.lr_scheduler.num_bad_epochs}


def load_plateau(stock, self, state):
    """Stock forgets the number of validations since the best loss."""
    stock(self, state)
    self.lr_scheduler.num_bad_epochs = state.get("bad_epochs", 0)


@contextlib.contextmanager
def _telling(kind: str, cfg: Any):
    try:
        yield
    except (AssertionError, ArithmeticError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0] or "its settings contradict each other"
        name = getattr(cfg, "_name", kind)
        raise UserError(f"{wording.flag(kind)} {name} rejects its settings: {reason}") from error


# ---- FSDP: whole models and optimizer states in the form of any other backend


def load_sharded(stock, self, state_dict, strict=True, model_cfg=None):
    """FSDP sends rank 0's state, with its experts, to all processes. Here each process has read the
    state with its own experts."""
    return fully_sharded.load_state_dict(self, state_dict, strict)


def gather_full_optim_state_dict(stock, self, optimizer) -> Optional[Dict[str, Any]]:
    """FSDP ignores parameters that it has not sharded, such as experts."""
    return fully_sharded.whole_optimizer_state(self, optimizer)


def get_shard_from_optim_state_dict(stock, self, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """FSDP ignores parameters that it has not sharded, such as experts."""
    return fully_sharded.own_optimizer_state(self, state_dict)
