"""Every function of fairseq that the plugin wraps: the table, and why (`fairseq-moe patches`).

Put in force by `import fairseq_moe_ext`, beside what stock fairseq needs to run (fairseq_today/). A
target stands here once, so no two of our wrappers meet on it; where one of fairseq_today is on it,
ours is round that. Each function takes what it wraps as its first argument, and says why in its
docstring.

    commands.py       a command: its flags, its processes, its one line on a mistake
    flag_owners.py    which --criterion, --arch, ... an unknown flag is of
    messages.py       what that line says
    hydra.py          fairseq-hydra-train
    data.py           data-bins, dictionaries, batches, the place in the data
    tasks.py          fairseq's tasks
    trainer.py        the trainer, and what it builds
    ema.py            the moving average of the weights
    whole_batch.py    the balancing loss over all micro-batches of an update
    checkpoint_io.py  checkpoints in and out
    progress.py       what training logs
    eval_lm.py        fairseq-eval-lm
    generation.py     searching for text

Order matters in two places: fairseq.checkpoint_utils:torch is a view on fairseq_today's, and a row
of fairseq_cli.* waits for the command to be imported.
"""

import importlib.util

from fairseq_today import finding
from fairseq_today.registry import NEVER, Condition, replace, wrap

from . import (
    checkpoint_io,
    commands,
    data,
    ema,
    eval_lm,
    generation,
    hydra,
    progress,
    tasks,
    trainer,
)

FAIRSCALE = Condition("fairscale", lambda: importlib.util.find_spec("fairscale") is not None)
_FSDP = "fairseq.distributed.fully_sharded_data_parallel:FullyShardedDataParallel."
_PLATEAU = "fairseq.optim.lr_scheduler.reduce_lr_on_plateau:ReduceLROnPlateauLRSchedule."
_TRAINER = "fairseq.trainer:Trainer."
_EMA = "fairseq.models.ema.ema:EMA."
_TASK = "fairseq.tasks:FairseqTask."
_IO = "fairseq.checkpoint_utils:"

PATCHES = (
    # ---- commands
    finding.USER_DIR,
    wrap(
        "fairseq.options:parse_args_and_arch",
        commands.parse_args_and_arch,
        "fairseq/options.py:88@0.12.2",
    ),
    replace(
        "fairseq.options:argparse", commands.with_one_line_parsers, "fairseq/options.py:236@0.12.2"
    ),
    wrap(
        "fairseq.dataclass.utils:eval_str_list",
        commands.eval_str_list,
        "fairseq/dataclass/utils.py:25@0.12.2",
        "a fairseq that refuses fractions",
    ),
    wrap(
        "fairseq.utils:import_user_module",
        commands.import_user_module,
        "fairseq/utils.py:464@0.12.2",
    ),
    wrap(
        "fairseq.distributed.utils:call_main",
        commands.call_main,
        "fairseq/distributed/utils.py:334@0.12.2",
    ),
    wrap(
        "fairseq.distributed.utils:distributed_init",
        commands.distributed_init,
        "fairseq/distributed/utils.py:239@0.12.2",
        "a fairseq that hands a timeout on",
    ),
    wrap("fairseq_cli.train:main", commands.train_main, "fairseq_cli/train.py:44@0.12.2"),
    replace(
        "fairseq_cli.validate:distributed_utils",
        commands.gathering_any_size,
        "fairseq_cli/validate.py:125@0.12.2",
    ),
    wrap("sys:excepthook", commands.excepthook, "fairseq_cli/generate.py:413@0.12.2"),
    wrap(
        "fairseq.dataclass.initialize:hydra_init",
        hydra.hydra_init,
        "fairseq/dataclass/initialize.py:16@0.12.2",
        NEVER,
        finding.NEW_RESOLVERS,
    ),
    wrap(
        "fairseq.dataclass.utils:merge_with_parent",
        hydra.merge_with_parent,
        "fairseq/dataclass/utils.py:487@0.12.2",
        NEVER,
        finding.NEW_RESOLVERS,
    ),
    wrap(
        "hydra._internal.utils:get_args_parser",
        hydra.get_args_parser,
        "fairseq_cli/hydra_train.py:81@0.12.2",
        NEVER,
        finding.NEW_RESOLVERS,
    ),
    # ---- data
    replace(
        tuple(f"{module}:eval" for module in data.EVALUATING),
        data.values_only,
        "fairseq/models/fconv_lm.py:78@0.12.2, and each `eval(` in these modules",
        "a fairseq that says ast.literal_eval",
    ),
    wrap(
        "fairseq.data:Dictionary.add_from_file",
        data.add_from_file,
        "fairseq/data/dictionary.py:229@0.12.2",
    ),
    wrap(
        "fairseq.data.encoders.gpt2_bpe:get_encoder",
        data.get_encoder,
        "fairseq/data/encoders/gpt2_bpe.py:34@0.12.2",
    ),
    wrap(
        "fairseq.data.indexed_dataset:make_dataset",
        data.make_dataset,
        "fairseq/data/indexed_dataset.py:77@0.12.2",
        "a fairseq that checks",
    ),
    wrap(
        "fairseq.data.indexed_dataset:MMapIndexedDataset.__new__",
        data.new_dataset,
        "fairseq/data/indexed_dataset.py:391@0.12.2",
        "a fairseq that checks",
    ),
    wrap(
        "fairseq.data.data_utils:batch_by_size",
        data.batch_by_size,
        "fairseq/data/data_utils.py:282@0.12.2 (data_utils_fast.pyx)",
    ),
    wrap(
        "fairseq.data.data_utils:raise_if_valid_subsets_unintentionally_ignored",
        data.raise_if_valid_subsets_unintentionally_ignored,
        "fairseq/data/data_utils.py:589@0.12.2",
    ),
    wrap(
        "fairseq.data.lm_context_window_dataset:LMContextWindowDataset.__getitem__",
        data.item_with_index,
        "fairseq/data/lm_context_window_dataset.py:44@0.12.2",
    ),
    wrap(
        "fairseq.data.lm_context_window_dataset:LMContextWindowDataset.collater",
        data.collate_with_context,
        "fairseq/data/lm_context_window_dataset.py:50@0.12.2",
        "a fairseq that looks up what stands before",
    ),
    wrap(
        "fairseq.data.iterators:EpochBatchIterator.state_dict",
        data.save_position,
        "fairseq/data/iterators.py:437@0.12.2",
    ),
    wrap(
        "fairseq.data.iterators:EpochBatchIterator.load_state_dict",
        data.load_position,
        "fairseq/data/iterators.py:452@0.12.2",
    ),
    wrap(
        "fairseq.data.iterators:EpochBatchIterator._get_iterator_for_epoch",
        data.iterate_rest,
        "fairseq/data/iterators.py:477,522@0.12.2",
        "a fairseq that counts from the same batch",
    ),
    wrap(
        "fairseq.data.iterators:GroupedIterator.__init__",
        data.group,
        "fairseq/data/iterators.py:581,588,594@0.12.2",
        "a fairseq that counts from the same batch",
    ),
    # ---- tasks
    wrap("fairseq.tasks:setup_task", tasks.setup_task, "fairseq_cli/train.py:87,130@0.12.2"),
    wrap(_TASK + "state_dict", tasks.state_dict, "fairseq/tasks/fairseq_task.py:598@0.12.2"),
    wrap(
        _TASK + "load_state_dict", tasks.load_state_dict, "fairseq/checkpoint_utils.py:439@0.12.2"
    ),
    wrap(_TASK + "dataset", tasks.dataset, "fairseq/tasks/fairseq_task.py:149@0.12.2"),
    wrap(_TASK + "build_bpe", tasks.build_bpe, "fairseq/tasks/fairseq_task.py:627@0.12.2"),
    wrap(
        _TASK + "build_generator",
        tasks.build_generator,
        "fairseq/tasks/fairseq_task.py:357@0.12.2, fairseq/search.py:696@0.12.2",
    ),
    wrap(
        _TASK + "get_interactive_tokens_and_lengths",
        tasks.get_interactive_tokens_and_lengths,
        "fairseq/tasks/fairseq_task.py:631@0.12.2, fairseq_cli/interactive.py:83@0.12.2",
        "a fairseq that asks for another line",
    ),
    wrap(
        _TASK + "filter_indices_by_size",
        tasks.filter_indices_by_size,
        "fairseq/tasks/fairseq_task.py:167@0.12.2",
    ),
    wrap(_TASK + "train_step", tasks.train_step, "fairseq/tasks/fairseq_task.py:488@0.12.2"),
    wrap(
        _TASK + "valid_step",
        tasks.valid_step,
        "fairseq/tasks/fairseq_task.py:522@0.12.2, fairseq_cli/validate.py:120@0.12.2",
    ),
    # ---- the trainer
    wrap(_TRAINER + "__init__", trainer.__init__, "fairseq/trainer.py:47@0.12.2"),
    wrap(
        "fairseq.trainer:_catalog_shared_params",
        trainer.catalog_shared_params,
        "fairseq/trainer.py:59,1560@0.12.2",
    ),
    wrap(_TRAINER + "load_checkpoint", trainer.load_checkpoint, "fairseq/trainer.py:448@0.12.2"),
    wrap(_TRAINER + "save_checkpoint", trainer.save_checkpoint, "fairseq/trainer.py:860@0.12.2"),
    wrap(
        _TRAINER + "consolidate_optimizer",
        trainer.consolidate_optimizer,
        "fairseq/trainer.py:859@0.12.2",
    ),
    wrap(_TRAINER + "state_dict", trainer.state_dict, "fairseq/checkpoint_utils.py:54@0.12.2"),
    replace(
        _TRAINER + "always_call_state_dict_during_save_checkpoint",
        trainer.never,
        "fairseq/checkpoint_utils.py:53@0.12.2",
    ),
    wrap(_TRAINER + "_prepare_sample", trainer._prepare_sample, "fairseq/trainer.py:1310@0.12.2"),
    wrap(
        _TRAINER + "train_step",
        trainer.train_step,
        "fairseq/trainer.py:780,798,843,947@0.12.2, fairseq/optim/dynamic_loss_scaler.py:61@0.12.2",
    ),
    wrap(_TRAINER + "valid_step", trainer.valid_step, "fairseq/trainer.py:1100,1127@0.12.2"),
    wrap(_TRAINER + "_set_seed", trainer._set_seed, "fairseq/trainer.py:1340@0.12.2"),
    wrap(_TRAINER + "zero_grad", trainer.zero_grad, "fairseq/trainer.py:1161@0.12.2"),
    wrap(_TRAINER + "set_num_updates", trainer.set_num_updates, "fairseq/trainer.py:1009@0.12.2"),
    wrap(
        _TRAINER + "get_valid_iterator",
        trainer.get_valid_iterator,
        "fairseq/trainer.py:722@0.12.2, fairseq_cli/train.py:501@0.12.2",
    ),
    wrap(_EMA + "step", ema.step, "fairseq/models/ema/ema.py:176@0.12.2"),
    wrap(_EMA + "_step_internal", ema.step_internal, "fairseq/models/ema/ema.py:140@0.12.2"),
    wrap("fairseq_cli.train:train", progress.train, "fairseq_cli/train.py:245@0.12.2"),
    wrap(
        "fairseq.logging.progress_bar:progress_bar",
        progress.progress_bar,
        "fairseq_cli/train.py:267,463@0.12.2",
    ),
    wrap(
        "fairseq.logging.progress_bar:TensorboardProgressBarWrapper._log_to_tensorboard",
        progress.log_to_tensorboard,
        "fairseq/logging/progress_bar.py:462@0.12.2",
    ),
    wrap(
        "fairseq.logging.progress_bar:WandBProgressBarWrapper._log_to_wandb",
        progress.log_to_wandb,
        "fairseq/logging/progress_bar.py:516@0.12.2",
    ),
    wrap("fairseq_cli.train:validate", trainer.validate, "fairseq_cli/train.py:439@0.12.2"),
    wrap(_TRAINER + "clip_grad_norm", trainer.clip_grad_norm, "fairseq/trainer.py:1252@0.12.2"),
    wrap("fairseq.utils:clip_grad_norm_", trainer.clip_grad_norm_, "fairseq/utils.py:347@0.12.2"),
    wrap(
        "fairseq.optim.amp_optimizer:AMPOptimizer.step",
        trainer.step_amp,
        "fairseq/optim/amp_optimizer.py:48,54@0.12.2",
        "a fairseq that steps the optimizer it unscales",
    ),
    wrap("fairseq.optim:build_optimizer", trainer.build_optimizer, "fairseq/trainer.py:330@0.12.2"),
    wrap(
        "fairseq.optim.lr_scheduler:build_lr_scheduler",
        trainer.build_lr_scheduler,
        "fairseq/trainer.py:364@0.12.2",
    ),
    wrap(
        _PLATEAU + "state_dict",
        trainer.save_plateau,
        "fairseq/optim/lr_scheduler/reduce_lr_on_plateau.py:107@0.12.2",
        "a fairseq that keeps it",
    ),
    wrap(
        _PLATEAU + "load_state_dict",
        trainer.load_plateau,
        "fairseq/optim/lr_scheduler/reduce_lr_on_plateau.py:114@0.12.2",
        "a fairseq that keeps it",
    ),
    wrap(
        _FSDP + "load_state_dict",
        trainer.load_sharded,
        "fairseq/distributed/fully_sharded_data_parallel.py:69@0.12.2",
        NEVER,
        FAIRSCALE,
    ),
    wrap(
        _FSDP + "gather_full_optim_state_dict",
        trainer.gather_full_optim_state_dict,
        "fairseq/trainer.py:382@0.12.2",
        NEVER,
        FAIRSCALE,
    ),
    wrap(
        _FSDP + "get_shard_from_optim_state_dict",
        trainer.get_shard_from_optim_state_dict,
        "fairseq/trainer.py:605@0.12.2",
        NEVER,
        FAIRSCALE,
    ),
    # ---- checkpoints
    wrap(
        _IO + "get_maybe_sharded_checkpoint_filename",
        checkpoint_io.get_maybe_sharded_checkpoint_filename,
        "fairseq/checkpoint_utils.py:418@0.12.2",
    ),
    replace(_IO + "torch", checkpoint_io.reading_checked, "fairseq/checkpoint_utils.py:315@0.12.2"),
    wrap(
        _IO + "load_checkpoint_to_cpu",
        checkpoint_io.load_checkpoint_to_cpu,
        "fairseq/checkpoint_utils.py:281@0.12.2",
    ),
    wrap(
        _IO + "load_model_ensemble_and_task",
        checkpoint_io.load_model_ensemble_and_task,
        "fairseq/checkpoint_utils.py:394@0.12.2",
    ),
    wrap(
        _IO + "load_checkpoint",
        checkpoint_io.load_checkpoint,
        "fairseq/checkpoint_utils.py:188@0.12.2",
    ),
    wrap(
        _IO + "convert_namespace_to_omegaconf",
        checkpoint_io.convert_namespace_to_omegaconf,
        "fairseq/dataclass/utils.py:386@0.12.2, fairseq/tasks/language_modeling.py:105@0.12.2",
        "a fairseq that leaves missing values out",
    ),
    wrap(
        _IO + "save_checkpoint",
        checkpoint_io.save_checkpoint,
        "fairseq/checkpoint_utils.py:35@0.12.2",
    ),
    wrap(
        _IO + "torch_persistent_save",
        checkpoint_io.torch_persistent_save,
        "fairseq/checkpoint_utils.py:549@0.12.2",
    ),
    wrap(
        _IO + "verify_checkpoint_directory",
        checkpoint_io.verify_checkpoint_directory,
        "fairseq/checkpoint_utils.py:841@0.12.2",
    ),
    replace(
        _IO + "PathManager",
        checkpoint_io.copying_whole,
        "fairseq/checkpoint_utils.py:125@0.12.2",
        "a fairseq that renames",
    ),
    # ---- evaluation and generation
    wrap(
        "fairseq.tasks.language_modeling:LanguageModelingTask.eval_lm_dataloader",
        eval_lm.eval_lm_dataloader,
        "fairseq/tasks/language_modeling.py:340@0.12.2",
    ),
    wrap(
        "fairseq.models:BaseFairseqModel.prepare_for_inference_",
        eval_lm.prepare_for_inference_,
        "fairseq_cli/eval_lm.py:274@0.12.2",
    ),
    wrap("fairseq_cli.eval_lm:eval_lm", eval_lm.eval_lm, "fairseq_cli/eval_lm.py:37@0.12.2"),
    wrap(
        "fairseq.ngram_repeat_block:NGramRepeatBlock.forward",
        generation.forward,
        "fairseq/ngram_repeat_block.py:63,105@0.12.2",
        "a fairseq that reads it at the current step",
    ),
    wrap(
        "fairseq.sequence_generator:SequenceGenerator._generate",
        generation.generate,
        "fairseq/sequence_generator.py:206,470,554,611@0.12.2",
        "a fairseq that reads a prompt at one go",
    ),
    wrap(
        "fairseq.sequence_generator:SequenceGenerator._prefix_tokens",
        generation.steer_prefix,
        "fairseq/sequence_generator.py:590,611@0.12.2",
        "a fairseq that reads a prompt at one go",
    ),
    wrap(
        "fairseq.search:Sampling.__init__",
        generation.sampling,
        "fairseq/search.py:625,696@0.12.2",
        "a fairseq that takes the smaller number",
    ),
)
