"""Multiple choice: scores, loss and gradient against a plain loop in float64, on one process and
on two; what is frozen stays; what is said of the data; mistakes."""

import json
import logging
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from choice_data import CLASSES, SIZES, batch_of, load, make_choice_model, make_choice_task
from fairseq import metrics
from fairseq.tasks import FairseqTask
from omegaconf import OmegaConf
from processes import run_processes
from small_models import MOE

from fairseq_moe_ext import context
from fairseq_moe_ext.checkpoint import resuming
from fairseq_moe_ext.criterions.multiple_choice import MultipleChoiceConfig, MultipleChoiceCriterion
from fairseq_moe_ext.errors import ModelMisfit, UserError
from fairseq_moe_ext.questions.records import read_jsonl

DROPLESS = {**MOE, "moe_dropless": True}
FOUR = [3, 0, 7, 12]  # of different lengths and numbers of candidates


def make_criterion(task, **options):
    options = {"moe_gate_loss_wt": 0.0, "sentence_avg": False, **options}
    return MultipleChoiceCriterion(MultipleChoiceConfig(**options), task)


# ---- The truth: one candidate at a time, in Python


def scores_of(model, task, vocabulary, question, scoring):
    """A list of scalars, the score of each candidate."""
    eos = task.dictionary.eos()
    if scoring == "head" and "text" in question:
        tokens = [eos, *vocabulary.encode(question["text"] + "\n"), eos]
        features, _ = model.decoder(torch.tensor([tokens]), features_only=True)
        head = model.choice_head
        return [(features[0, -1] * w).sum() + b for w, b in zip(head.weight, head.bias)]
    scores = []
    for given, own in candidates_of(question):
        tokens = [*vocabulary.encode(given), *vocabulary.encode(own)]
        if scoring == "head":
            features, _ = model.decoder(torch.tensor([[eos, *tokens, eos]]), features_only=True)
            scores.append((features[0, -1] * model.choice_head.weight[0]).sum())
            continue
        logits = model(torch.tensor([[eos, *tokens[:-1]]]))[0][0]  # (T, V)
        total, count = 0.0, 0
        for position in range(shared(question, vocabulary), len(tokens)):
            exponentials = logits[position].exp()
            total = total + (exponentials[tokens[position]] / exponentials.sum()).log()
            count += 1
        scores.append(total / count if scoring == "mean" else total)
    return scores


def candidates_of(question):
    if "text" in question:
        return [(question["text"] + "\n", name) for name in CLASSES]
    return [(question["context"], choice) for choice in question["choices"]]


def shared(question, vocabulary):
    """How many first tokens all candidates have in common."""
    rows = [vocabulary.encode(given + own) for given, own in candidates_of(question)]
    count = 0
    while len({row[count] for row in rows}) == 1:
        count += 1
    return count


def loss_of(scores, right, loss):
    if loss == "likelihood":
        return -scores[right]
    return -(scores[right].exp() / sum(score.exp() for score in scores)).log()


def right_of(question):
    return question["label"] if "choices" in question else CLASSES.index(question["label"])


WAYS = [
    ("choices", "head", "candidates"),
    ("choices", "sum", "candidates"),
    ("choices", "mean", "candidates"),
    ("choices", "mean", "likelihood"),
    ("classes", "head", "candidates"),
    ("classes", "sum", "likelihood"),
]


@pytest.mark.parametrize("kind, scoring, loss", WAYS)
@pytest.mark.parametrize("flags", [{}, DROPLESS], ids=["dense", "moe"])
def test_a_padded_batch_equals_one_candidate_at_a_time(
    data, kind, scoring, loss, flags, request, vocabulary
):
    folder = request.getfixturevalue(kind)
    task = make_choice_task(data, folder, choice_scoring=scoring)
    dataset = load(task)
    questions = [line.values for line in read_jsonl(folder / "valid.jsonl")]
    model = make_choice_model(task, **flags).double().train()
    criterion = make_criterion(task, choice_loss=loss)
    sample = batch_of(dataset, FOUR)
    assert sample["net_input"]["src_tokens"].eq(1).any()  # there is padding
    found, size, log = criterion(model, sample)
    found.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    total, correct = 0.0, 0
    batched = criterion.scores(model, sample)[0]
    for row, index in zip(batched, FOUR):
        scores = scores_of(model, task, vocabulary, questions[index], scoring)
        assert row[: len(scores)].tolist() == pytest.approx([s.item() for s in scores], rel=1e-10)
        assert all(math.isinf(s) for s in row[len(scores) :].tolist())
        total = total + loss_of(scores, right_of(questions[index]), loss)
        correct += int(np.argmax([s.item() for s in scores])) == right_of(questions[index])
    total.backward()
    torch.testing.assert_close(found, total, rtol=1e-10, atol=0)
    assert size == len(FOUR) and int(log["correct"]) == correct
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name
            )
        else:
            assert gradients[name] is None or not gradients[name].any(), name


@pytest.mark.parametrize("scoring", ["sum", "head"])
def test_candidates_are_compared_by_what_is_not_rounded(data, choices, scoring):
    """In evaluation, of features in bfloat16: rounded scores of two candidates are often equal."""
    task = make_choice_task(data, choices, choice_scoring=scoring)
    model = make_choice_model(task).bfloat16().eval()
    sample = batch_of(load(task), FOUR)["net_input"]
    with torch.no_grad():
        found = model(**sample)[0].flatten()
        x, _ = model.decoder(sample["src_tokens"], features_only=True)
    assert x.dtype == torch.bfloat16
    if scoring == "head":
        expected = x[sample["scored"]].double() @ model.choice_head.weight[0].double()
    else:
        logits = x.double() @ model.decoder.output_projection.weight.double().T
        nats = logits.log_softmax(-1).gather(2, sample["target"].unsqueeze(2)).squeeze(2)
        expected = (nats * sample["scored"]).sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gates_losses_are_added_for_each_question(data, choices):
    task = make_choice_task(data, choices)
    sample = batch_of(load(task), FOUR)
    model = make_choice_model(task, **DROPLESS).double().train()
    bare, _, _ = make_criterion(task)(model, sample)
    _, extra = model.decoder(sample["net_input"]["src_tokens"], features_only=True)
    balance = sum(record.balance_loss for record in extra["moe"]) / 2
    z = sum(record.z_loss for record in extra["moe"]) / 2
    criterion = make_criterion(task, moe_gate_loss_wt=0.3, moe_z_loss_wt=0.2)
    loss, _, log = criterion(model, sample)
    torch.testing.assert_close(loss, bare + 4 * (0.3 * balance + 0.2 * z))
    torch.testing.assert_close(log["inner_loss"], bare.detach())
    with metrics.aggregate() as meters:
        criterion.reduce_metrics([log, log])
    logged = meters.get_smoothed_values()
    assert logged["moe_gate_loss"] == pytest.approx(balance.item(), abs=1e-7)
    assert logged["loss"] == pytest.approx(loss.item() / 4 / math.log(2), abs=1e-3)
    assert "entropy_gating" in logged and "ppl" not in logged


def test_accuracy_and_its_interval():
    log = {"sample_size": 40, "correct": 30, "loss": 1.0, "inner_loss": 1.0, "batch_count": 1}
    log.update(chance=20.0, cut=1)
    rest = {**log, "sample_size": 60, "correct": 60, "chance": 15.0, "cut": 0}
    with metrics.aggregate() as meters:  # in two steps, as a validation goes
        MultipleChoiceCriterion.reduce_metrics([log])
        MultipleChoiceCriterion.reduce_metrics([rest])
    logged = meters.get_smoothed_values()
    assert logged["accuracy"] == 90.0
    # 90 of 100 (Wilson 1927), as computed by hand: (p + z^2/2n -+ ...) / (1 + z^2/n)
    assert (logged["accuracy_low"], logged["accuracy_high"]) == (82.56, 94.48)
    assert (logged["chance"], logged["cut"]) == (35.0, 1.0)


@pytest.mark.parametrize("scoring", ["head", "mean"])
def test_half_precision_gives_scores_in_float32(data, choices, scoring):
    task = make_choice_task(data, choices, choice_scoring=scoring)
    model = make_choice_model(task, **DROPLESS).bfloat16()
    loss, _, _ = make_criterion(task, moe_gate_loss_wt=0.1)(model, batch_of(load(task), FOUR))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()


# ---- Two processes


def half(rank, data, choices, scoring, world):
    """Loss and gradients of the same eight questions, of which this process has its share."""
    torch.manual_seed(0)
    flags = {**DROPLESS, "moe_routing_scope": "world"}
    task = make_choice_task(data, choices, choice_scoring=scoring)
    dataset = load(task)
    model = make_choice_model(task, **flags).double().train()
    # The gates' figures count padding, so the narrower half becomes as wide as the other.
    of_rank = [[7, 1, 2, 3], [0, 4, 10, 11]]
    widths = [max(dataset.sizes[i] for i in samples) for samples in of_rank]
    assert widths[0] > widths[1]
    samples = of_rank[rank] if world == 2 else of_rank[0] + of_rank[1]
    criterion = make_criterion(task, moe_gate_loss_wt=0.5)
    loss, size, log = criterion(model, batch_of(dataset, samples))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(log["inner_loss"]), float(log["correct"]), size, gradients


@pytest.mark.parametrize("scoring", ["head", "sum"])
def test_two_processes_add_up_to_one(data, choices, scoring):
    inner, correct, size, gradients = half(0, data, choices, scoring, 1)
    first, second = run_processes(2, half, data, choices, scoring, 2)
    assert first[0] + second[0] == pytest.approx(inner, rel=1e-9)
    assert (first[1] + second[1], first[2] + second[2]) == (correct, size)
    for name, gradient in gradients.items():
        parts = first[3][name], second[3][name]
        # Each process has its experts' sum over all tokens, scaled to the mean over processes.
        found = 2 * torch.cat(parts) if ".experts." in name else sum(parts)
        torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-10, msg=name)


def updates_of_untied(rank, data, choices):
    torch.manual_seed(0)
    task = make_choice_task(data, choices, choice_scoring="head")
    model = make_choice_model(task, **DROPLESS, share_decoder_input_output_embed=False).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    sample, criterion = batch_of(load(task), FOUR), make_criterion(task, moe_gate_loss_wt=0.1)
    for _ in range(3):  # PyTorch's wrapper raises at the second
        criterion(wrapped, sample)[0].backward()
    return model.decoder.output_projection.weight.grad


def test_a_head_leaves_an_untied_output_without_gradient(data, choices):
    """PyTorch's wrapper would wait for one."""
    assert run_processes(2, updates_of_untied, data, choices) == [None, None]


def test_a_process_without_questions(data, choices):
    """fairseq gives a process that has run out of batches an empty one."""
    from fairseq_moe_ext.patches.tasks import no_sentences

    task = make_choice_task(data, choices)
    sample = no_sentences(batch_of(load(task), FOUR))
    loss, size, log = make_criterion(task, moe_gate_loss_wt=0.1)(
        make_choice_model(task, **DROPLESS).train(), sample
    )
    loss.backward()
    assert (float(loss), size, int(log["correct"])) == (0, 0, 0)
    assert (float(log["chance"]), int(log["cut"])) == (0, 0)


@pytest.mark.parametrize(
    "kind, scoring", [("choices", "head"), ("choices", "mean"), ("classes", "head")]
)
def test_validation_where_a_process_has_no_batch_at_all(data, kind, scoring, request):
    """fairseq-validate gives it an empty sample. Its log has what the others' have."""
    task = make_choice_task(data, request.getfixturevalue(kind), choice_scoring=scoring)
    batch = batch_of(load(task), FOUR)
    model, criterion = make_choice_model(task, **DROPLESS).eval(), make_criterion(task)
    loss, size, log = task.valid_step({}, model, criterion)
    _, _, whole = task.valid_step(batch, model, criterion)
    assert (float(loss), size, int(log["correct"]), float(log["chance"])) == (0, 0, 0, 0)
    assert log.keys() == whole.keys()


# ---- The data


def test_sequences_begin_and_end_with_eos_and_choices_differ(data, choices, vocabulary):
    dataset = load(make_choice_task(data, choices))
    question = next(read_jsonl(choices / "valid.jsonl")).values
    item = dataset[0]["item"]
    assert len(item.inputs) == len(question["choices"]) and item.label == question["label"]
    for row, choice in zip(item.inputs, question["choices"]):
        assert row[0] == row[-1] == 2
        assert vocabulary.decode(row[1:-1].tolist()) == question["context"] + choice


def test_long_questions_lose_their_beginning(data, choices, caplog, vocabulary):
    dataset = load(make_choice_task(data, choices))
    limit = int(dataset.sizes.max()) - 3
    with caplog.at_level(logging.WARNING):
        short = load(make_choice_task(data, choices, tokens_per_sample=limit))
    assert f"are longer than --tokens-per-sample {limit}; they lose their" in caplog.text
    assert short.sizes.max() == limit
    lost = sum(item.cut for item in short.items)
    assert f" {lost} of " in caplog.text and not any(item.cut for item in dataset.items)
    criterion = make_criterion(make_choice_task(data, choices))
    model = make_choice_model(criterion.task, **DROPLESS)
    log = criterion(model, batch_of(short, range(len(short))))[2]
    assert int(log["cut"]) == lost > 0
    guesses = [1 / len(item.inputs) for item in short.items]
    assert float(log["chance"]) == pytest.approx(sum(guesses))
    for whole, cut in zip(dataset.items, short.items):
        for a, b in zip(whole.inputs, cut.inputs):
            assert b[1:].tolist() == a[1:].tolist()[-(limit - 1) :] and b[0] == 2


def test_batches_by_tokens_count_padding_and_candidates(data, choices):
    dataset = load(make_choice_task(data, choices), "train")
    with torch.random.fork_rng():
        order = dataset.ordered_indices()
    batches = dataset.batch_by_size(order, max_tokens=200)
    assert sorted(i for batch in batches for i in batch) == list(range(len(dataset)))
    for batch in batches:
        assert batch_of(dataset, batch)["net_input"]["src_tokens"].numel() <= 200


def test_what_is_in_the_data_is_said(data, classes, caplog):
    with caplog.at_level(logging.INFO):
        load(make_choice_task(data, classes))
    lines = [json.loads(line)["label"] for line in open(classes / "valid.jsonl", encoding="utf-8")]
    shares = {name: f"{100 * lines.count(name) / len(lines):.1f} %" for name in CLASSES}
    expected = ", ".join(f"{name} {share}" for name, share in shares.items())
    most = max(100 * lines.count(name) / len(lines) for name in CLASSES)
    assert (
        f"valid: 40 questions; right answer: {expected}; accuracy of the most frequent answer "
        f"{most:.1f} %, of chance 33.3 %" in caplog.text
    )


def test_a_share_of_the_training_set_can_be_held_out(data, choices):
    task = make_choice_task(data, choices, choice_valid_share=0.25)
    train, valid = task.files.read("train"), task.files.read("valid")
    assert len(train) + len(valid) == SIZES["train"] and 15 <= len(valid) <= 45
    assert not set(train) & set(valid)
    assert len(task.files.read("test")) == SIZES["test"]


def test_what_validation_shares_with_training_is_said(data, tmp_path, caplog):
    lines = [{"context": f"big{i}", "choices": [" big2", " mid2"], "label": 0} for i in range(9)]
    for split, some in (("train", lines[:6]), ("valid", lines[4:])):
        text = "".join(json.dumps(line) + "\n" for line in some)
        (tmp_path / f"{split}.jsonl").write_text(text)
    task = make_choice_task(data, tmp_path)
    load(task, "train")
    assert "are related to a training" not in caplog.text
    load(task, "valid")
    assert (
        "valid: 2 of 5 questions are related to a training question: the same passage"
        in caplog.text
    )


# ---- Mistakes


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_questions_are_read_before_a_model_is_made(data, choices, missing, tmp_path, monkeypatch):
    for split in {"train", "valid"} - {missing}:
        (tmp_path / f"{split}.jsonl").write_bytes((choices / f"{split}.jsonl").read_bytes())
    flags = {"valid_subset": "valid", "disable_validation": False}
    monkeypatch.setattr(FairseqTask, "build_model", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(UserError, match=f"{missing}.jsonl: missing"):
        make_choice_task(data, tmp_path, **flags).build_model(None)
    monkeypatch.setattr(FairseqTask, "build_model", lambda *_: SimpleNamespace(add_choice_head=int))
    flags["disable_validation"] = missing == "valid"
    task = make_choice_task(data, tmp_path, **flags)
    task.build_model(None, from_checkpoint=missing == "train")  # as fairseq-validate does
    if missing == "valid":
        dataset = task.dataset("train")
        assert load(task, "train") is dataset  # and not read again


LINES = [
    ('{"context": "a", "choices": ["b", "c"]}', "line 2: no field 'label'"),
    ('{"choices": ["b", "c"], "label": 0}', "line 2: no field 'context'"),
    ('{"context": "a", "choices": ["b"], "label": 0}', "line 2: field 'choices' is .'b'."),
    ('{"context": "a", "choices": ["b", 3], "label": 0}', "line 2: field 'choices' is"),
    ('{"context": "a", "choices": ["b", "c"], "label": 2}', "line 2: field 'label' is '2'"),
    ('{"context": "a", "choices"', "line 2: not JSON"),
    ("[1]", "line 2: not a JSON object"),
]


@pytest.mark.parametrize("line, message", LINES)
def test_a_line_that_is_wrong_is_named(data, tmp_path, line, message):
    good = '{"context": "big1", "choices": [" big2", " mid2"], "label": 0}'
    (tmp_path / "valid.jsonl").write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"valid.jsonl, {message}"):
        load(make_choice_task(data, tmp_path))


def test_a_class_that_is_none(data, tmp_path):
    (tmp_path / "labels.txt").write_text("big\nmid\n")
    (tmp_path / "valid.jsonl").write_text('{"text": "big1", "label": "small"}\n')
    with pytest.raises(UserError, match="line 1: field 'label' is 'small'; use one of big, mid"):
        load(make_choice_task(data, tmp_path))
    (tmp_path / "labels.txt").write_text("big\nbig\n")
    with pytest.raises(UserError, match="labels.txt: must list two or more different"):
        make_choice_task(data, tmp_path)


MISTAKES = [
    (dict(choice_data="/none"), "--choice-data /none: no such folder"),
    (dict(choice_data=None), "--choice-data is missing"),
    (
        dict(choice_task="hellaswagg"),
        "--choice-task hellaswagg: unknown; did you mean hellaswag.; use one of boolq",
    ),
    (dict(choice_task="record"), "--choice-task record: unknown"),
    (dict(choice_valid_share=1.0), "--choice-valid-share 1.0"),
    (dict(data="/none"), "/none/dict.txt: missing"),
    (dict(best_checkpoint_metric="ppl"), "--best-checkpoint-metric ppl: multiple_choice does not"),
    (dict(maximize_best_checkpoint_metric=False), "add --maximize-best-checkpoint-metric"),
    (dict(best_checkpoint_metric="loss"), "remove --maximize-best-checkpoint-metric"),
]


@pytest.mark.parametrize("settings, message", MISTAKES)
def test_mistakes_in_the_flags_are_named(data, choices, settings, message):
    with pytest.raises(UserError, match=message):
        make_choice_task(data, choices, **settings)


def test_other_mistakes(data, choices, tmp_path):
    with pytest.raises(UserError, match="dev.jsonl: missing|train.jsonl: missing"):
        make_choice_task(data, tmp_path).files.read("train")
    with pytest.raises(UserError, match="winogrande/dev.jsonl: missing; get it from WinoGrande"):
        make_choice_task(data, tmp_path, choice_task="winogrande").files.read("valid")
    (tmp_path / "valid.jsonl").write_text("\n")
    with pytest.raises(UserError, match="valid.jsonl: contains no example for the split valid"):
        load(make_choice_task(data, tmp_path))
    with pytest.raises(
        UserError, match="valid.jsonl, line 1: a choice is longer than --tokens-per-sample 2"
    ):
        load(make_choice_task(data, choices, choice_scoring="sum", tokens_per_sample=2))
    words = "--tokens-per-sample 2: leaves no room for a choice between two </s>: use 3 or more"
    with pytest.raises(UserError, match=words):
        load(make_choice_task(data, choices, tokens_per_sample=2))
    load(make_choice_task(data, choices, tokens_per_sample=3))
    task = make_choice_task(data, choices)
    with pytest.raises(UserError, match="--choice-loss likelihood with --choice-scoring head"):
        make_criterion(task, choice_loss="likelihood")
    (tmp_path / "dict.txt").write_bytes((data / "dict.txt").read_bytes())
    with pytest.raises(UserError, match="encoder.json: missing"):
        load(make_choice_task(tmp_path, choices))


# ---- Checkpoints


def test_a_head_is_new_left_behind_or_loaded(data, choices, classes):
    task = make_choice_task(data, choices)
    plain = make_choice_model(make_choice_task(data, choices, choice_scoring="sum"), **MOE)
    tuned, other = make_choice_model(task, seed=3, **MOE), make_choice_model(task, seed=4, **MOE)
    own = tuned.choice_head.weight.clone()
    tuned.load_state_dict(plain.state_dict())
    assert torch.equal(tuned.choice_head.weight, own)
    other.load_state_dict(tuned.state_dict())
    assert torch.equal(other.choice_head.weight, own)
    plain.load_state_dict(tuned.state_dict())
    assert plain.choice_head is None
    three = make_choice_model(make_choice_task(data, classes), **MOE)
    three.load_state_dict(tuned.state_dict())
    assert three.choice_head.weight.shape == (3, 16)


# ---- Another fine-tuning's checkpoint


def test_a_head_of_other_classes_is_no_model_to_evaluate(data, choices, classes):
    """In training a new one begins."""
    tuned = make_choice_model(make_choice_task(data, choices), **DROPLESS).state_dict()
    model = make_choice_model(make_choice_task(data, classes), **DROPLESS)
    own = model.choice_head.weight.clone()
    model.load_state_dict(dict(tuned))
    assert torch.equal(model.choice_head.weight, own)
    with context.during(context.building, context.Building(True, True)):
        for state in (tuned, {k: v for k, v in tuned.items() if "choice_head" not in k}):
            with pytest.raises(ModelMisfit, match="has no head that scores these candidates"):
                model.load_state_dict(dict(state))


def test_a_head_belongs_to_an_order_of_the_classes(data, classes, tmp_path):
    saved = make_choice_task(data, classes).state_dict()
    make_choice_task(data, classes).load_state_dict(saved)
    shutil.copytree(classes, tmp_path / "other")
    (tmp_path / "other" / "labels.txt").write_text("\n".join(reversed(CLASSES)))
    with pytest.raises(UserError, match="classes are small, mid, big, but .* big, mid, small: use"):
        make_choice_task(data, tmp_path / "other").load_state_dict(saved)


def test_a_fine_tuning_does_not_go_on_from_another_ones_checkpoint(tmp_path, caplog):
    """As with Hydra, whose folder has the config's name."""

    def settings(choice_task, start):
        task = {"choice_task": choice_task, "choice_data": "tasks"}
        checkpoint = {"save_dir": str(tmp_path), "finetune_from_model": start}
        return OmegaConf.create({"task": task, "checkpoint": checkpoint})

    def check(saved, here, path):
        task = SimpleNamespace(scoring="sum")
        trainer = SimpleNamespace(cfg=here, task=task, checkpoint_suffix="")
        resuming.check_questions({"cfg": saved}, trainer, str(path))

    last, piqa = tmp_path / "checkpoint_last.pt", settings("piqa", "a.pt")
    check(piqa, piqa, last)
    check(settings("hellaswag", None), piqa, "a.pt")  # what a fine-tuning starts from
    assert not caplog.messages
    with pytest.raises(
        UserError, match="^--choice-task piqa: .* of a training with hellaswag: use"
    ):
        check(settings("hellaswag", "a.pt"), piqa, last)
    check(piqa, settings("piqa", "b.pt"), last)
    assert caplog.messages[0].startswith(f"--finetune-from-model b.pt: the run goes on from {last}")
