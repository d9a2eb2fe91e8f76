"""To Hugging Face transformers and back: logits, tokens, training, generation."""

import gc
import json
import re
import shutil
import weakref
from types import SimpleNamespace

import branch_files
import pytest
import torch
import yaml
from converting import convert, load, mistake, same
from hf_models import KINDS, ours, theirs, tokenizer_of

from fairseq_moe_ext import cli, tokenizer_files
from fairseq_moe_ext.convert import hf_folder, model_card
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation import evaluated
from fairseq_moe_ext.questions.vocabulary import Vocabulary

pytest.importorskip("transformers", reason="pip install transformers")

QUICK = ("xglm", "dense", "top2", "kinds", "null", "bias", "hash", "threshold")


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_logits_are_equal_and_the_way_back_is_exact(converted, kind, tmp_path):
    path, folder = converted(kind)
    lm, model = ours(path), theirs(folder)
    assert type(model).__name__ == (
        "XGLMForCausalLM" if kind == "xglm" else "FairseqMoeForCausalLM"
    )
    tokens = torch.randint(4, 280, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 2
    padded = tokens.clone()
    padded[1, :5] = 1
    for rows in (tokens, padded):
        with torch.no_grad():
            expected = lm.models[0](rows)[0]
            real = rows.ne(1)
            places = (real.cumsum(1) - 1).clamp(min=0)  # as generate() has them; XGLM needs them
            found = model(rows, attention_mask=real.long(), position_ids=places).logits
        torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    convert(folder, tmp_path / "back.pt", "--from", "hf")
    before, after = load(path), load(tmp_path / "back.pt")
    assert same(after["model"], before["model"])
    assert after["task_state"] == before["task_state"]
    with torch.no_grad():
        assert torch.equal(ours(tmp_path / "back.pt").models[0](tokens)[0], lm.models[0](tokens)[0])


@pytest.mark.parametrize("kind", ["xglm", "top2", "hash"])
def test_generate_with_its_cache_writes_what_ours_does(converted, kind):
    path, folder = converted(kind)
    lm, model, tokenizer = ours(path), theirs(folder), tokenizer_of(folder)
    if kind != "xglm":  # whose code cannot
        lm, model = lm.double(), model.double()
    prompts = ["the cat", "a\ndog sat on", "é\n"]
    # ours leaves out tokens that are no text
    never = [0, 1, 3, *(i for i, w in enumerate(lm.tgt_dict.symbols) if w.startswith("madeup"))]
    settings = {"max_new_tokens": 9, "do_sample": False, "suppress_tokens": never}
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        rows = model.generate(**inputs, **settings)
        slow = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(rows, slow)
    new = rows[:, inputs["input_ids"].size(1) :]
    assert [tokenizer.decode(row) for row in new] == lm.generate(prompts, max_tokens=9)
    beams = model.generate(**inputs, **settings, num_beams=2, num_return_sequences=2)
    assert beams.size(0) == 6


def test_training(converted):
    """The loss is the mean cross-entropy and the balancing loss; every parameter has a gradient."""
    path, folder = converted("top2")
    model, tokenizer = theirs(folder), tokenizer_of(folder)
    batch = tokenizer(["the cat sat on the mat", "a dog"], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].eq(0), -100)
    plain = model(**batch, labels=labels)
    counted = labels[:, 1:].ne(-100)
    nats = plain.logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])
    torch.testing.assert_close(plain.loss, -nats[..., 0][counted].mean())
    items = model(**batch, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(items, plain.loss * counted.sum() / 7)
    # that of our layer, of which padding is no part
    with torch.no_grad():
        lm = ours(path).models[0]
        rows = [row[row.ne(1)] for row in batch["input_ids"]]
        logits = torch.cat([gate_logits(lm, row[None]) for row in rows])
    probs = logits.softmax(-1)
    share = torch.bincount(probs.argmax(-1), minlength=4) / len(probs)
    torch.testing.assert_close(plain.aux_loss, 4 * (probs.mean(0) * share).sum())
    model.train()
    trained = model(**batch, labels=labels)
    torch.testing.assert_close(trained.loss, plain.loss + 0.25 * plain.aux_loss)
    # an update of several batches: the mean over all their tokens, of both losses
    tokens = counted.sum()
    rows = [
        {**{k: v[i : i + 1] for k, v in batch.items()}, "labels": labels[i : i + 1]} for i in (0, 1)
    ]
    losses = [model(**row, num_items_in_batch=tokens).loss for row in rows]
    means = [(model(**row).loss, row["labels"][:, 1:].ne(-100).sum()) for row in rows]
    expected = sum(mean * number for mean, number in means) / tokens
    torch.testing.assert_close(sum(losses), expected)
    model.gradient_checkpointing_enable()
    again = model(**batch, labels=labels).loss
    torch.testing.assert_close(again, trained.loss)
    again.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def gate_logits(lm, tokens):
    """The logits of the router of the one sparse layer: (T, E)."""
    found = []
    layer = lm.decoder.layers[1].moe_layer.gate
    hook = layer.register_forward_hook(lambda module, args, output: found.append(output[0]))
    lm(tokens)
    hook.remove()
    return found[0]


def test_shards_and_half_precision(converted, tmp_path):
    path, _ = converted("top3")
    folder = tmp_path / "hf"
    flags = ("--to", "hf", "--dtype", "bf16", "--shard-size", 1e-5, "--license", "mit")
    convert(path, folder, *flags)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    model = theirs(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = model(torch.tensor([[2, 9, 8]])).logits
        expected = ours(path).models[0](torch.tensor([[2, 9, 8]]))[0]
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    convert(folder, tmp_path / "back.pt", "--from", "hf")
    for name, value in load(path)["model"].items():
        half = value.bfloat16() if value.is_floating_point() and "version" not in name else value
        assert torch.equal(load(tmp_path / "back.pt")["model"][name], half), name
    # what transformers saves comes back, too
    theirs(converted("top3")[1]).save_pretrained(tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "again.pt", "--from", "hf")
    assert same(load(tmp_path / "again.pt")["model"], load(path)["model"])


@pytest.mark.parametrize("kind", ["bias", pytest.param("threshold", marks=pytest.mark.slow)])
def test_a_router_s_state_keeps_its_precision(converted, kind):
    """In transformers a router's state is float32 and float64, as it is here."""
    _, folder = converted(kind)
    whole, half = theirs(folder).state_dict(), theirs(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    state = [n for n in whole if ".gate." in n and not n.endswith(".wg.weight")]
    assert state and all(same(half.state_dict()[name], whole[name]) for name in state)


def test_layers_outputs_are_kept_only_if_asked_for(converted):
    """At the last layer the outputs of earlier ones are gone."""
    model, kept = theirs(converted("top2")[1]), []

    def look(module, args):
        kept.append(weakref.ref(args[0]))

    def count(*_):
        gc.collect()
        alive.append(sum(x() is not None for x in kept))

    alive = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(look)
    model.model.layer_norm.register_forward_pre_hook(count)
    for asked in (False, True):
        kept.clear()
        with torch.no_grad():
            found = model(torch.tensor([[2, 9, 8]]), output_hidden_states=asked).hidden_states
        assert (found is None) is not asked
    assert alive == [0, len(model.model.layers)] and len(found) == alive[1] + 1


def test_the_card(converted, hf_data, tmp_path):
    path, folder = converted("top1")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\n") and "trust_remote_code=True" in card
    for fact in ("| experts of a token | 1, router topk |", "| updates | 4 |", "| corpora | a |"):
        assert fact in card
    (tmp_path / "e.json").write_text(json.dumps(evaluation(path)))
    convert(path, tmp_path / "hf", "--to", "hf", "--evaluation", tmp_path / "e.json",
            "--license", "cc-by-4.0")  # fmt: skip
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "| a | 1,234 | 12.50 |  |" in card
    assert "trust_remote_code" not in (converted("xglm")[1] / "README.md").read_text()


def evaluation(path, **more):
    """As `fairseq-moe evaluate --json` writes it."""
    one = {"in_domain": True, "tokens": 1234, "perplexity": 12.5, "bits_per_byte": None}
    head = {"path": str(path), "subset": "test", "protocol": "blocks", "context": 32, "stride": 32}
    return {**head, "capacity": 1.0, "sets": {"a": {**one, "dropped": [0.0, 0.0]}}, **more}


@pytest.mark.parametrize(
    "sparse, change, words",
    [
        (True, {}, "Split test, blocks of 32 tokens, nothing dropped."),
        (False, {}, "Split test, blocks of 32 tokens."),
        (
            True,
            {"protocol": "sliding", "stride": 8},
            "Split test, sliding windows (stride 8) of 32 tokens, nothing dropped.",
        ),
        (
            True,
            {"capacity": 0.05, "dropped": {"a": ([0.25, 0.5], 300), "b": ([0.0, 0.0], 100)}},
            "An expert took at most 5 % of a batch's tokens; 28.12 % of the choices of experts",
        ),
        (
            False,
            {"model_overrides": "{'moe_top_k': 1}"},
            "Split test, blocks of 32 tokens, with the settings {'moe_top_k': 1}.",
        ),
    ],
)
def test_the_card_says_how_it_was_evaluated(tmp_path, sparse, change, words):
    source = SimpleNamespace(path=str(tmp_path / "x.pt"), experts=4 if sparse else 0)
    found = evaluation(source.path)
    for name, (dropped, tokens) in change.pop("dropped", {}).items():
        found["sets"][name] = {**found["sets"]["a"], "dropped": dropped, "tokens": tokens}
    assert words in model_card._evaluation(source, {**found, **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"path": "{other}"}, "has the results of {other}, not of {own}; evaluate {own}, or"),
        ({"sweep": []}, "has the results of several capacities"),
        ({"capacity": "x"}, "not a file that `fairseq-moe evaluate --json` wrote"),
        ({"sets": None}, "not a file that `fairseq-moe evaluate --json` wrote"),
    ],
)
def test_results_that_are_not_of_the_model_are_refused(tmp_path, change, words):
    names = {"own": tmp_path / "x.pt", "other": tmp_path / "y.pt"}
    names["other"].touch()
    change = {k: v.format(**names) if isinstance(v, str) else v for k, v in change.items()}
    source = SimpleNamespace(path=str(names["own"]), experts=4)
    words = f"--evaluation e.json: {words.format(**names)}"
    with pytest.raises(UserError, match=re.escape(words)):
        found = {**evaluation(source.path), **change}
        model_card.check(found, source.path, "--evaluation e.json")
    moved = {**evaluation("elsewhere/x.pt")}  # named from another folder
    model_card.check(moved, source.path, "--evaluation e.json")
    assert "nothing dropped" in model_card._evaluation(source, moved)


def test_results_are_of_the_state_that_is_converted(converted, hf_data, tmp_path, capsys):
    """A resumed run overwrites checkpoint_last.pt; and an evaluated file may be gone."""
    path, results = tmp_path / "checkpoint_last.pt", tmp_path / "e.json"
    shutil.copy(converted("top1")[0], path)
    state = evaluated.state_of(str(path))

    def words(name, **more):
        results.write_text(json.dumps(evaluation(name, **more)))
        flags = ("--to", "hf", "--data", hf_data, "--evaluation", results)
        if cli.main(["convert", *map(str, (path, tmp_path / "hf", *flags))]) == 0:
            card = (tmp_path / "hf" / "README.md").read_text()
            shutil.rmtree(tmp_path / "hf")
            assert "| a | 1,234 | 12.50 |  |" in card
            return capsys.readouterr().err
        assert not (tmp_path / "hf").exists()
        return capsys.readouterr().err

    for name in (path, "gone.pt", converted("top1")[0]):  # of one state
        assert words(name, checkpoint=state) == ""
    wrong = {"updates": state["updates"], "digest": "0"}
    err = words("gone.pt", checkpoint=wrong)
    assert f"has the results of gone.pt with other bytes than {path} has now: evaluate" in err
    saved = torch.load(path, weights_only=False)
    saved["optimizer_history"][-1]["num_updates"] += 2
    torch.save(saved, path)
    err = words(path, checkpoint=state)
    assert err == (
        f"error: --evaluation {results}: has the results of {path} with 4 updates, but {path} has "
        f"6: evaluate {path} again\n"
    )
    assert "not a file that `fairseq-moe evaluate --json` wrote" in words(path, checkpoint={})
    (old,) = words(path).splitlines()  # of before it was written
    assert old.startswith(f"--evaluation {results}: of an older version, so it does not say which")


def test_a_released_model_in_one_command(tmp_path, hf_data, capsys):
    """The layout of the moe branch; its tokenizer lies beside it, or is named."""
    small = {"decoder_layers": 2, "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32}
    settings = {**branch_files.RELEASED_15B, **small, "decoder_attention_heads": 2}
    settings["moe_expert_count"] = 4
    vocabulary = Vocabulary(hf_data).size
    branch_files.write(str(tmp_path), settings, vocabulary, 2, branch_files.random_tensors())
    source = tmp_path / "model.pt"
    assert "add --data FOLDER, or --no-tokenizer" in mistake(
        capsys, source, tmp_path / "hf", "--to", "hf"
    )
    convert(source, tmp_path / "hf", "--to", "hf", "--data", hf_data)
    for name in tokenizer_files.NAMES:
        shutil.copy(hf_data / name, tmp_path)
    convert(source, tmp_path / "again", "--to", "hf")
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    lm, model = ours(source), theirs(tmp_path / "hf", dtype=torch.float32)
    tokens = tokenizer_of(tmp_path / "hf")("the cat\nsat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, lm.models[0](tokens)[0], rtol=1e-5, atol=1e-5
        )


def test_tokenizer_files_with_crlf_fit_the_checkpoint_on_the_way_back(converted, tmp_path):
    data = tmp_path / "crlf"
    data.mkdir()
    for name in tokenizer_files.NAMES:
        content = (converted("top2")[0].parent / name).read_bytes()
        (data / name).write_bytes(
            content.replace(b"\n", b"\r\n") + b"\r\n" * (name == "encoder.json")
        )
    state = load(converted("top2")[0])
    state["task_state"]["tokenizer"] = tokenizer_files.digests(data)
    torch.save(state, data / "x.pt")
    convert(data / "x.pt", tmp_path / "hf", "--to", "hf")
    convert(tmp_path / "hf", tmp_path / "back" / "x.pt", "--from", "hf")
    assert tokenizer_files.of_checkpoint(tmp_path / "back" / "x.pt") == tmp_path / "back"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": 8}, "hidden_size is 8, but the settings under fairseq.model give 16"),
        ({"num_experts": 5}, "num_experts is 5, but the settings under fairseq.model give 4"),
        ({"fairseq": None}, "has no settings under fairseq.model"),
        ({"fairseq": {"model": {"decoder_layers": "x"}}}, "decoder_layers is 'x', not int"),
        ({"model_type": "opt"}, "model_type is opt, not xglm or fairseq_moe"),
        ({"vocab_size": "a"}, "vocab_size is 'a', not a whole number"),
        ({"vocab_size": 7}, "vocab_size 7"),
    ],
)
def test_a_config_that_contradicts_itself(converted, tmp_path, capsys, change, words):
    shutil.copytree(converted("top2")[1], tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert words in mistake(capsys, tmp_path / "hf", tmp_path / "x.pt", "--from", "hf")
    assert not (tmp_path / "x.pt").exists()


def test_a_licence_is_text_in_yaml():
    for words in ("mit", "cc-by-4.0", "no", "1.0", "a: b", "[x", "MIT # free", "Österreich's"):
        assert yaml.safe_load(f"license: {model_card._scalar(words)}") == {"license": words}
    assert model_card._scalar("cc-by-4.0") == "cc-by-4.0"
    assert [model_card._cell(value) for value in ([0.002], [1, 2], "a|b")] == [
        "0.002",
        "1, 2",
        "a\\|b",
    ]


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="contains no weight_map"):
        hf_folder.read_weights(str(tmp_path))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--to", "hf", "--shard-size", "0"], "--shard-size 0.0: use a number"),
        (["--to", "hf", "--data", "nowhere"], "--data nowhere: contains no dict.txt"),
        (["--to", "hf", "--data", ".", "--no-tokenizer"], "with --no-tokenizer"),
        (["--to", "hf", "--license", ""], "--license '': use a name"),
        (["--to", "hf", "--evaluation", "no.json"], "no.json: cannot be read"),
        (["--to", "hf", "--expert-files", "2"], "--expert-files needs no --to"),
        (["--to", "branch", "--license", "mit"], "--license needs --to hf"),
    ],
)
def test_mistakes(converted, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    dest = "x.pt" if "branch" in flags else "x"
    assert words in mistake(capsys, converted("top2")[0], dest, *flags)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_model_is_kept_without_overwrite(converted, capsys):
    path, folder = converted("top2")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert "README.md: exists; choose another" in mistake(capsys, path, folder, "--to", "hf")
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "files", ["README.md", "dict.txt x.pt", "encoder.json", "tokenizer.json", "dict.txt a.idx"]
)
def test_a_folder_of_something_else_is_kept(converted, tmp_path, capsys, files):
    for name in files.split():
        (tmp_path / name).write_text("mine")
    flags = "--to", "hf", "--overwrite", "--no-tokenizer"
    words = mistake(capsys, converted("top2")[0], tmp_path, *flags)
    assert f"{tmp_path}: contains {files.split()[0]}, but no model for transformers" in words
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        files.split(), "mine"
    )


@pytest.mark.parametrize("checkpoint", ["", "x.pt"])
def test_an_earlier_tokenizer_goes_unless_it_is_a_checkpoint_s(converted, tmp_path, checkpoint):
    path, folder = converted("top2")
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf" / "model-00009-of-00009.safetensors").touch()
    if checkpoint:
        (tmp_path / "hf" / checkpoint).touch()
    convert(path, tmp_path / "hf", "--to", "hf", "--overwrite", "--no-tokenizer")
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert names.isdisjoint({"tokenizer.json", "model-00009-of-00009.safetensors"})
    assert names >= {"config.json", "model.safetensors"}
    kept = set(tokenizer_files.NAMES) if checkpoint else set()
    assert names & set(tokenizer_files.NAMES) == kept


def test_what_the_code_does_not_know_is_refused_by_name(converted, tmp_path, capsys):
    state = load(converted("base")[0])
    state["cfg"]["model"]["moe_base_evaluation"] = "balanced"
    torch.save(state, tmp_path / "x.pt")
    words = mistake(capsys, tmp_path / "x.pt", tmp_path / "hf", "--to", "hf", "--no-tokenizer")
    assert "transformers lacks: --moe-base-evaluation balanced: run it with fairseq" in words
