"""Synthetic checkpoints in the layout of fairseq's `moe` branch, as the branch would write them.

    python tests/branch_files.py FOLDER         model-rank-0..63.pt and model-shared.pt, laid out as
                                                Meta's en_moe_lm_15b but 24 wide: 35 MB
    python tests/branch_files.py FOLDER --dim 768 --heads 12    the same in full width: 30 GB

The layout's facts: 2 ranks of it were run, the released models are described by their users. The
order of parameters is that of the branch's modules, in which a layer's final norm comes last.
"""

import argparse
import os
from argparse import Namespace

import torch

# As `cfg.model` of the branch has them; the rest of its settings is in _OTHER_MODEL_SETTINGS.
RELEASED_15B = dict(
    _name="transformer_lm_gpt",
    activation_fn="gelu",
    dropout=0.1,
    attention_dropout=0.1,
    decoder_layers=12,
    decoder_embed_dim=768,
    decoder_ffn_embed_dim=3072,
    decoder_attention_heads=12,
    share_decoder_input_output_embed=True,
    checkpoint_activations=True,
    moe_freq=2,
    moe_expert_count=512,
    moe_gating_use_fp32=True,
    moe_second_expert_policy="all",
    moe_normalize_expert_grad="sqrt_world_size",
    moe_eval_capacity_token_fraction=0.05,  # an override; the run scripts have -1
    tokens_per_sample=2048,
    max_target_positions=2048,
    ddp_backend="fully_sharded",
    memory_efficient_fp16=True,
    batch_size=4,
)

_OTHER_MODEL_SETTINGS = dict(
    activation_dropout=0.0,
    adaptive_input=False,
    adaptive_softmax_cutoff=None,
    add_bos_token=False,
    alternate_decoder_ffn_embed_dim=0,
    base_layers=0,
    character_embeddings=False,
    checkpoint_activations=False,
    decoder_layerdrop=0.0,
    decoder_layers_to_keep=None,
    decoder_learned_pos=False,
    distributed_rank=0,
    dummy_a2a=False,
    fp16=False,
    fp16_no_flatten_grads=False,
    layernorm_embedding=False,
    min_params_to_wrap=100000000,
    moe_batch_prioritized_routing=False,
    moe_expert_ffn_dim=None,
    moe_normalize_gate_prob_before_dropping=False,
    moe_top1_expert=False,
    no_decoder_final_norm=False,
    no_scale_embedding=False,
    no_token_positional_embeddings=False,
    offload_activations=False,
    quant_noise_pq=0.0,
    quant_noise_scalar=0.0,
    record_a2a_perf_stats=False,
    relu_dropout=0.0,
    tie_adaptive_weights=False,
    tpu=False,
    use_moe_pad_mask=False,
    use_stable_embedding=False,
    world_size=1,
    batch_size_valid=1,
    memory_efficient_fp16=False,
    ddp_backend="legacy_ddp",
    batch_size=2,
)


def complete(settings):
    """All that `cfg.model` holds."""
    dim = settings["decoder_embed_dim"]
    return {
        **_OTHER_MODEL_SETTINGS,
        "decoder_input_dim": dim,
        "decoder_output_dim": dim,
        **settings,
    }


def parameters(settings, vocabulary):
    """Names and shapes of the branch's parameters in its order, experts with their global number;
    the tied output projection, a key of its own in the files, is last."""
    s = complete(settings)
    dim, ffn = s["decoder_embed_dim"], s["decoder_ffn_embed_dim"]

    def norm(name):
        return [(f"{name}.weight", (dim,)), (f"{name}.bias", (dim,))]

    def linear(name, inputs, outputs):
        return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]

    found = [("decoder.embed_tokens.weight", (vocabulary, dim))]
    if s["decoder_learned_pos"]:
        found += [("decoder.embed_positions.weight", (s["max_target_positions"] + 2, dim))]
    if s["layernorm_embedding"]:
        found += norm("decoder.layernorm_embedding")
    for index in range(s["decoder_layers"]):
        layer = f"decoder.layers.{index}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found += linear(f"{layer}.self_attn.{projection}", dim, dim)
        found += norm(f"{layer}.self_attn_layer_norm")
        picked = s["moe_freq"] and (index + 1) % s["moe_freq"] == 0
        twin = s["alternate_decoder_ffn_embed_dim"]  # the width, in place of experts
        if picked and not twin:
            experts = f"{layer}.moe_layer.experts"
            found += [(f"{layer}.moe_layer.gate.wg.weight", (s["moe_expert_count"], dim))]
            for expert in range(s["moe_expert_count"]):
                found += linear(f"{experts}.{expert}.fc1", dim, ffn)
                found += linear(f"{experts}.{expert}.fc2", ffn, dim)
        else:
            width = twin if picked else ffn
            found += linear(f"{layer}.fc1", dim, width) + linear(f"{layer}.fc2", width, dim)
        found += norm(f"{layer}.final_layer_norm")
    if not s["no_decoder_final_norm"]:
        found += norm("decoder.layer_norm")
    return found + [("decoder.output_projection.weight", (vocabulary, dim))]


def split(name, experts, ranks):
    """Global name -> ranks that have it (None: the shared file), and its name there."""
    if ".experts." not in name:
        return None, name
    start, _, end = name.partition(".experts.")
    number, _, rest = end.partition(".")
    holders = min(experts, ranks)
    local = experts // holders
    owners = range(int(number) // local, ranks, holders)
    return owners, f"{start}.experts.{int(number) % local}.{rest}"


def write(
    folder,
    settings,
    vocabulary,
    ranks,
    tensor_of,
    name="model",
    old_args=False,
    fsdp=None,
    wrapped=True,
    optimizer=None,
    zipped=True,
    updates=10,
    optimizer_name="FairseqAdam",
    group=None,
):
    """Write NAME-rank-R.pt and NAME-shared.pt.

    Args:
        tensor_of: function of a parameter's name and shape.
        old_args: a flat Namespace `args` instead of `cfg`.
        fsdp: as --ddp-backend fully_sharded writes them: "state", only the optimizer's state is in
            pieces; "weights", they are as well (--use-sharded-state).
        wrapped: whether FSDP has wrapped the layers one by one.
        optimizer: function of a parameter's name and shape -> its state.
        zipped: False: the format of torch before 1.6.
        updates, optimizer_name: as its optimizer_history says.
        group: settings of the optimizer other than the usual.
    """
    s = complete(settings)
    dtype = torch.float16 if s["memory_efficient_fp16"] else torch.float32
    values, states = {}, {}
    for key, shape in parameters(settings, vocabulary):
        if key == "decoder.output_projection.weight" and s["share_decoder_input_output_embed"]:
            continue
        values[key] = tensor_of(key, shape).detach().to(dtype).clone()
        if optimizer is not None:
            states[key] = optimizer(key, shape)
    parts = (
        _of_fsdp(s, ranks, values, states, fsdp, wrapped) if fsdp else _of(s, ranks, values, states)
    )
    for part, rank, model, state, count, metadata in parts:
        content = _rest_of_state(s, rank, ranks, old_args, updates, optimizer_name)
        content["model"] = model
        if metadata is not None:
            content["shard_metadata"] = metadata
        if optimizer is not None:
            usual = dict(lr=0.001, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, amsgrad=False)
            group_of = {**usual, **(group or {}), "params": list(range(count))}
            content["last_optimizer_state"] = {"state": state, "param_groups": [group_of]}
        path = os.path.join(folder, f"{name}-{part}.pt")
        torch.save(content, path, _use_new_zipfile_serialization=zipped)


def write_dense(folder, settings, vocabulary, tensor_of, name="model", **how):
    """NAME.pt, the one file of a dense model; arguments as write's."""
    write(folder, {**settings, "moe_freq": 0}, vocabulary, 1, tensor_of, name=name, **how)
    os.remove(os.path.join(folder, f"{name}-rank-0.pt"))
    os.rename(os.path.join(folder, f"{name}-shared.pt"), os.path.join(folder, f"{name}.pt"))


def _of(settings, ranks, values, states):
    """The parts of a run that replicates what is not an expert. Each process numbers its own
    parameters: of experts, those that it has."""
    for rank in [None, *range(ranks)]:
        buffers = _buffers(settings, values)
        model = {"decoder.version": buffers.pop("decoder.version")} if rank is None else {}
        of_part, number = {}, -1
        for key, value in values.items():
            owners, local_name = split(key, settings["moe_expert_count"], ranks)
            if owners is None or (rank or 0) in owners:
                number += 1
            if (owners is None) != (rank is None) or (owners is not None and rank not in owners):
                continue
            model[local_name] = value
            if key == "decoder.embed_tokens.weight":
                model.update(buffers)
            if states:
                of_part[number] = states[key]
        if rank is None and settings["share_decoder_input_output_embed"]:
            model["decoder.output_projection.weight"] = model["decoder.embed_tokens.weight"]
        part = "shared" if rank is None else f"rank-{rank}"
        yield part, rank or 0, model, of_part, number + 1, None


def _buffers(settings, values):
    buffers = {"decoder.version": torch.Tensor([3])}
    if not settings["decoder_learned_pos"]:
        dtype = values["decoder.embed_tokens.weight"].dtype
        buffers["decoder.embed_positions._float_tensor"] = torch.zeros(1, dtype=dtype)
    return buffers


def _of_fsdp(settings, ranks, values, states, fsdp, wrapped):
    """The parts of a run with fairscale's FSDP, which cuts the tensors here as it does there."""
    experts = settings["moe_expert_count"]
    for rank in range(ranks):
        own = {}  # name in this process -> name in all
        for key in values:
            owners, local_name = split(key, experts, ranks)
            if owners is None or rank in owners:
                own[local_name] = key

        def sharded(tensors, own=own, rank=rank):
            return _sharded(
                {n: tensors[key] for n, key in own.items()}, settings, rank, ranks, wrapped
            )

        module = sharded(values)
        metadata, model = module.local_metadata_dict(), module.local_state_dict()
        joined = [
            [f"{of['fsdp_path']}.{name}".lstrip(".") for name in flat["names"]]
            for of in metadata["param_metadata"]
            for flat in of["params"].values()
        ]
        state = {}
        if states:
            first = [states[own[names[0]]] for names in joined]
            state = {
                number: {k: v for k, v in of.items() if not torch.is_tensor(v)}
                for number, of in enumerate(first)
            }
            for key in [k for k, v in first[0].items() if torch.is_tensor(v)]:
                pieces = sharded({name: of[key] for name, of in states.items()}).parameters()
                for number, piece in enumerate(pieces):
                    state[number][key] = piece.detach()
        if fsdp == "state":
            model = {**_buffers(settings, values), **{n: values[key] for n, key in own.items()}}
            if settings["share_decoder_input_output_embed"]:
                model["decoder.output_projection.weight"] = model["decoder.embed_tokens.weight"]
        of_experts = {number for number, names in enumerate(joined) if ".experts." in names[0]}
        for part, is_expert in (("shared", False), (f"rank-{rank}", True)):
            yield (
                f"{part}-shard{rank}",
                rank,
                {key: value for key, value in model.items() if (".experts." in key) == is_expert},
                {n: of for n, of in state.items() if (n in of_experts) == is_expert},
                len(joined),
                metadata,
            )


class _Group:
    """As much of a process group as FSDP asks for until it computes."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def _sharded(tensors, settings, rank, ranks, wrapped):
    """Modules of these parameters in FSDP as the branch wraps them: each expert among the processes
    that have it, then its layer or not, then the model."""
    from fairscale.nn import FullyShardedDataParallel

    def wrap(module, group):
        return FullyShardedDataParallel(
            module,
            group,
            group,
            compute_dtype=tensors["decoder.embed_tokens.weight"].dtype,
            compute_device=torch.device("cpu"),
        )

    model = torch.nn.Module()
    for name, value in {**tensors, **_buffers(settings, tensors)}.items():
        *path, last = name.split(".")
        module = model
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, torch.nn.Module())
            module = getattr(module, step)
        if name in tensors:
            module.register_parameter(last, torch.nn.Parameter(value.clone()))
        else:
            module.register_buffer(last, value)
    if settings["share_decoder_input_output_embed"]:
        model.decoder.output_projection = torch.nn.Module()
        model.decoder.output_projection.weight = model.decoder.embed_tokens.weight
    everyone, holders = _Group(rank, ranks), min(settings["moe_expert_count"], ranks)
    replicas = _Group(rank // holders, ranks // holders)
    for index, layer in model.decoder.layers.named_children():
        if hasattr(layer, "moe_layer"):
            experts = layer.moe_layer.experts
            for number, expert in list(experts.named_children()):
                setattr(experts, number, wrap(expert, replicas))
        if wrapped:
            setattr(model.decoder.layers, index, wrap(layer, everyone))
    return wrap(model, everyone)


def _rest_of_state(settings, rank, ranks, old_args, updates, optimizer_name):
    """All of a file but the model and the optimizer."""
    task = dict(
        _name="language_modeling",
        data="data-bin",
        tokens_per_sample=settings["tokens_per_sample"],
        sample_break_mode="none",
        max_source_positions=None,  # stock's task has no such setting
        add_bos_token=False,
    )
    criterion = dict(
        _name="moe_cross_entropy",
        moe_gate_loss_combine_method="sum",
        moe_gate_loss_transform="none",
        moe_gate_loss_wt=0.01,
        sentence_avg=False,
    )
    model = {**settings, "distributed_rank": rank}
    distributed = dict(distributed_world_size=ranks, distributed_rank=rank)
    cfg = {
        "_name": None,
        "common": dict(_name=None, seed=1, log_nvidia_smi=False, fp16=False),
        "common_eval": dict(_name=None, is_moe=False, path=None, model_overrides="{}"),
        "checkpoint": dict(_name=None, checkpoint_suffix=f"-rank-{rank}", s3_upload_path=None),
        "distributed_training": distributed,
        "dataset": dict(_name=None, batch_size=2, num_workers_valid=0),
        "optimization": dict(_name=None, lr=[0.001], update_freq=[1]),
        "model": model,
        "task": task,
        "criterion": criterion,
        "optimizer": dict(_name="adam", adam_betas="(0.9, 0.98)", block_wise=False),
        "lr_scheduler": dict(_name="inverse_sqrt", lr=[0.001], warmup_updates=20),
    }
    args = None
    if old_args:
        args = Namespace(
            **{**task, **criterion, **model, **distributed},
            arch=settings["_name"],
            seed=1,
            task="language_modeling",
            criterion="moe_cross_entropy",
            optimizer="adam",
            adam_betas="(0.9, 0.98)",
            lr_scheduler="inverse_sqrt",
            lr=[0.001],
            no_progress_bar=False,
        )
        del args._name
        cfg = None
    history = dict(
        criterion_name="MoECrossEntropyCriterion",
        optimizer_name=optimizer_name,
        lr_scheduler_state={"best": None},
        num_updates=updates,
    )
    position = dict(version=2, epoch=1, iterations_in_epoch=1, shuffle=True)
    return {
        "args": args,
        "cfg": cfg,
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {"train_iterator": position, "val_loss": 7.0, "metrics": {}},
        "last_optimizer_state": None,
    }


def of_model(model):
    """`tensor_of` for a model of ours that has all experts."""
    state = model.state_dict()

    def tensor_of(name, shape):
        tensor = part_of(state, name)
        assert tensor.shape == shape, (name, tensor.shape, shape)
        return tensor

    return tensor_of


def part_of(by_name, name):
    """The entry of our stacked parameter that belongs to a global name of the branch."""
    if ".experts." not in name:
        return by_name[name]
    start, _, end = name.partition(".experts.")
    number, _, rest = end.partition(".")
    return by_name[f"{start}.experts.{rest}"][int(number)]


def random_tensors():
    generator = torch.Generator().manual_seed(0)

    def tensor_of(name, shape):
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape)
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    return tensor_of


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--dim", type=int, default=24)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50264)
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    settings = {
        **RELEASED_15B,
        "decoder_embed_dim": args.dim,
        "decoder_ffn_embed_dim": 4 * args.dim,
        "decoder_attention_heads": args.heads,
        "decoder_layers": args.layers,
    }
    write(args.folder, settings, args.vocabulary, 64, random_tensors())


if __name__ == "__main__":
    main()
