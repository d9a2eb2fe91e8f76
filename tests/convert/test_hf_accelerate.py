"""With accelerate: a model's parts on several devices and on disk, and transformers' Trainer."""

import pytest
import torch
from converting import convert, load
from hf_models import theirs, tokenizer_of

transformers = pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("accelerate", reason="pip install accelerate")
pytestmark = pytest.mark.slow  # importing them takes long

TOKENS = torch.tensor([[2, 9, 8, 30, 41, 7], [2, 12, 11, 10, 200, 201]])
DISK = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}


@pytest.mark.parametrize("kind", ["xglm", "dense", "top2", "kinds", "null", "bias", "hash", "base"])
@pytest.mark.parametrize("where", ["cpu", "auto", "disk"])
def test_parts_on_devices_and_on_disk(converted, kind, where, tmp_path):
    _, folder = converted(kind)
    plain = theirs(folder)
    spread = where
    if where == "disk":
        rest = [name for name, _ in plain.model.named_children()]
        spread = {f"model.{name}": "cpu" for name in rest if name != "layers"}
        spread.update(DISK, lm_head="cpu")
    model = theirs(
        folder, device_map=spread, offload_folder=tmp_path / "offloaded", offload_buffers=True
    )
    if where == "disk":
        assert {p.device.type for p in model.model.layers.parameters()} == {"meta"}
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits)
        written, expected = (
            one.generate(TOKENS[:1], max_new_tokens=6, do_sample=False) for one in (model, plain)
        )
    assert torch.equal(written, expected)


@pytest.mark.parametrize("kind", ["xglm", "dense", "top2", "kinds", "hash", "threshold"])
@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer(converted, kind, how, tmp_path):
    """Two steps on one batch lower its loss; what is saved loads here and there."""
    _, folder = converted(kind)
    model, tokenizer = theirs(folder), tokenizer_of(folder)
    texts = ["the cat sat on the mat\nand saw a dog", "a dog sat on a cat"] * 2
    rows = [tokenizer(text)["input_ids"] for text in texts]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, **how,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row} for row in rows],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    first, second = (line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert second < first - 0.01
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = theirs(tmp_path / "tuned")
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(TOKENS).logits, model(TOKENS).logits)
    convert(tmp_path / "tuned", tmp_path / "tuned.pt", "--from", "hf")
    assert load(tmp_path / "tuned.pt")["model"]
