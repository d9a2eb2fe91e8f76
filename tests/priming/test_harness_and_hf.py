"""The same checkpoint as lm-eval's own model type `hf` and as ours: the same numbers."""

import json

import pytest

from fairseq_moe_ext import cli

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytest.importorskip("transformers", reason="pip install transformers")

QUESTIONS = [
    {"q": "w1 it was.\nw2 it", "choices": ["was.", "w3 it was w4.", "it\nwas"], "label": 1},
    {"q": "w5 it was\n", "choices": ["w6 it", "was.", "w7 it was w8 it was."], "label": 0},
    {"q": "it was.\n\nw9 \n \t", "choices": ["it was w1.", "w2.", "was it"], "label": 2},
    {"q": "w3 it" * 30, "choices": ["it was. " * 5, "w12", "w1 w1 w1"], "label": 0},  # too long
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
KINDS = {
    "choice": """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_target: "{{q}}"
metric_list: [{metric: byte_perplexity}, {metric: word_perplexity}]
""",
    "written": """output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["w7"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
}
# As docs/convert.md says; of texts as a whole the </s> before them is no part.
HF = "prefix_token_id=2,trust_remote_code=True,dtype=float32"
ENDS = {"until": ["w7", "\n\n"]}


@pytest.fixture(scope="module")
def both(trained, tmp_path_factory):
    """name of a task -> the results and samples of ours and of `hf`."""
    import lm_eval.models  # registers hf
    from lm_eval.tasks import TaskManager

    data, checkpoint = trained
    folder = tmp_path_factory.mktemp("both")
    lines = "".join(json.dumps(line) + "\n" for line in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines)
    for name, rest in KINDS.items():
        text = TASK.format(name=name, file=folder / "questions.jsonl") + rest
        (folder / f"{name}.yaml").write_text(text)
    assert cli.main(["convert", str(checkpoint), str(folder / "hf"), "--to", "hf"]) == 0
    from fairseq_moe_ext.priming import harness  # registers ours

    def evaluate(name, more="", **settings):
        models = {
            harness.MODEL: f"path={checkpoint},data={data}",
            "hf": f"pretrained={folder / 'hf'},{HF}{more}",
        }
        return [
            lm_eval.simple_evaluate(
                model=model,
                model_args=arguments,
                tasks=[name],
                device="cpu",
                batch_size=2,
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                log_samples=True,
                bootstrap_iters=0,
                **settings,
            )
            for model, arguments in models.items()
        ]

    return evaluate


def numbers(result):
    (found,) = result["results"].values()
    return {key: value for key, value in found.items() if isinstance(value, float)}


def answers(result):
    (samples,) = result["samples"].values()
    return {one["doc_id"]: one["resps"] for one in samples}


def test_choices(both):
    ours, theirs = both("choice")
    assert numbers(ours) == numbers(theirs) and len(numbers(ours)) >= 3
    for number, found in answers(ours).items():
        for (one,), (other,) in zip(found, answers(theirs)[number]):
            assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-5)
            assert str(one[1]) == str(other[1])


def test_whole_texts(both):
    ours, theirs = both("rolling", ",add_bos_token=False")
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-5)


def test_generated_answers(both):
    ours, theirs = both("written", gen_kwargs=ENDS)
    assert answers(ours) == answers(theirs)
