"""A study's file, of small models, and a study's results, made up."""

import json

from fairseq_moe_ext.study import result

STUDY = """
data: {data}
out: {out}
context: 32
updates: 3
seeds: [1]
train: {{batch-size: 4, optimizer: adam, lr: 0.01, cpu: true, num-workers: 0,
  decoder-layers: 2, decoder-attention-heads: 2, decoder-ffn-embed-dim: 32}}
evaluate: {{bootstrap: 20}}
dense: {{arch: dense_lm_tiny, flags: {{}},
  sizes: {{s: {{decoder-embed-dim: 8}}, m: {{decoder-embed-dim: 16}}}}}}
moe: {{arch: moe_lm_tiny, sizes: {{s: {{decoder-embed-dim: 8}}, m: {{decoder-embed-dim: 16}}}}}}
"""


def made_result(folder, moe=((1e12, 20.0), (4e12, 5.0))):
    """A study's result.json with made-up perplexities."""
    runs = []
    for family, points in (("dense", [(1e12, 30.0), (4e12, 20.0), (16e12, 10.0)]), ("moe", moe)):
        for size, (flops, perplexity) in zip("sml", points):
            for seed in (1, 2):
                one = {"perplexity": perplexity + 0.1 * seed, "dropped": None}
                if family == "moe":
                    one["dropped"] = [0.0, 0.0]  # evaluation drops nothing
                run = {"family": family, "size": size, "seed": seed, "flops": flops}
                run["router"] = {"overflow": 1.5 + seed / 3} if family == "moe" else {}
                run.update(parameters=1000, active=500, tokens=10**6, seconds=60.0)
                copa = {"task": "copa", "shots": 0, "spread": None, "questions": 10_000}
                copa.update(chance=0.25, majority=None, questions_cut=3, questions_left_out=0)
                copa["accuracy"] = 0.25 + 0.1 * seed
                run["priming"] = {"mean": {"0": 0.25 + 0.1 * seed}, "tasks": [copa]}
                overall = {"questions": 9, "lms": 80.0 + seed, "ss": 50.0, "icat": 81.0 + seed}
                pairs = {"questions": 4, "lms": 70.0 + seed, "ss": 50.0, "icat": 71.0 + seed}
                bias = {"task": "stereoset", "domains": {"overall": overall}}
                run["priming"]["bias"] = [{**bias, "intersentence": {"overall": pairs}}]
                means = {"in_domain": one, "out_of_domain": one}
                runs.append({**run, "sets": {"near": one, "far": one}, "mean": means})
    whole = {"title": "T <b>", "context": 32, "tokens_per_update": 128, "planned": len(runs)}
    whole.update(runs=runs, factors=result.factors(runs), commands=["fairseq-train data"])
    (folder / "result.json").write_text(json.dumps(whole))
    return whole
