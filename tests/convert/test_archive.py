"""What is written is what torch reads, and memory does not grow with it."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import branch_files
import pytest
import torch
from converting import same
from small_models import VOCABULARY

from fairseq_moe_ext.convert.archive import Lazy, read_safetensors, write_torch
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.moe.experts import TensorPerExpert


def test_the_archive_is_what_torch_reads(tmp_path):
    a = torch.arange(12.0).view(3, 4)
    half = Lazy((2, 2), torch.float16, lambda: iter([torch.ones(2).half(), torch.zeros(2).half()]))
    state = {"a": a, "tied": a, "t": a.t(), "empty": a[:0], "scalar": torch.tensor(3)}
    state.update(stack=TensorPerExpert([a, a + 1]), half=half, rest=[None, (1, "x"), {2: True}])
    path = str(tmp_path / "x.pt")
    written = []
    write_torch(state, path, written.append)
    expected = {**state, "stack": torch.stack([a, a + 1])}
    expected["half"] = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).half()
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert same(found, expected)
        assert found["a"].data_ptr() == found["tied"].data_ptr()
        if mapped:
            assert all(found[k].data_ptr() % 64 == 0 for k in ("a", "half", "scalar"))
    assert sum(written) == 4 * 12 * 2 + 4 * 24 + 8 + 8


MEMORY = """
import sys, threading, time
from fairseq_moe_ext.cli import main

def own():
    with open("/proc/self/status") as stream:
        fields = dict(line.split(":", 1) for line in stream)
    return int(fields["RssAnon"].split()[0]) / 1024

import fairseq_moe_ext.convert.targets
before, peak, done = own(), [0.0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], own())
thread = threading.Thread(target=watch)
thread.start()
status = main(sys.argv[1:])
done.set()
thread.join()
print(status, peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """384 MB in 4 files to one of half the precision, by memory that is not a file's page."""
    settings = {**branch_files.RELEASED_15B, "decoder_layers": 2, "decoder_embed_dim": 256}
    settings.update(decoder_ffn_embed_dim=1024, moe_expert_count=128, decoder_attention_heads=4)
    settings.update(memory_efficient_fp16=False)
    ones = torch.ones(1)
    branch_files.write(
        str(tmp_path), settings, VOCABULARY, 4, lambda name, shape: ones.expand(shape)
    )
    size = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    command = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "x.pt"), "--dtype", "bf16"]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *command], capture_output=True, text=True, check=True
    )
    status, megabytes = done.stdout.splitlines()[-1].split()
    assert status == "0" and size > 250e6
    assert float(megabytes) < 100


def header_of(*offsets):
    """A safetensors header of tensors that lie between these bytes."""
    shapes = [[places[1] - places[0]] if places else [] for places in offsets]
    return {
        str(number): {"dtype": "U8", "shape": shape, "data_offsets": places}
        for number, (shape, places) in enumerate(zip(shapes, offsets))
    }


@pytest.mark.parametrize(
    "header",
    [
        12,
        header_of([]),
        header_of([-4, 0], [0, 8]),
        header_of([0, 4], [0, 8]),  # one overlaps the other
        header_of([4, 8]),
        header_of([0, 4]),
    ],
)
def test_a_safetensors_file_whose_header_is_none(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match="^.*: truncated or not a safetensors file"):
        read_safetensors(str(path))
    text = json.dumps(header_of([4, 8], [0, 4])).encode()  # in any order
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(8)))
    found = {name: value.tolist() for name, value in read_safetensors(str(path)).items()}
    assert found == {"0": [4, 5, 6, 7], "1": [0, 1, 2, 3]}
