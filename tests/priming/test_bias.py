"""StereoSet and CrowS-Pairs: their formats, and figures worked out by hand."""

import json

import numpy as np
import pytest
from bias_files import CROWS, STEREOSET, element

from fairseq_moe_ext import cli
from fairseq_moe_ext.accuracy import wilson_interval
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.priming.bias import (
    Pair,
    Triple,
    crows_pairs_scores,
    intersentence_scores,
    read_crows_pairs,
    read_stereoset,
    stereoset_scores,
)
from fairseq_moe_ext.priming.model import ModelScorer, load
from fairseq_moe_ext.questions.scoring import Row
from fairseq_moe_ext.questions.vocabulary import Vocabulary


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stereoset" / "data").mkdir(parents=True)
    (tmp_path / "stereoset" / "data" / "dev.json").write_text(json.dumps(STEREOSET))
    (tmp_path / "crows_pairs").mkdir()
    (tmp_path / "crows_pairs" / "crows_pairs_anonymized.csv").write_text(CROWS)
    return tmp_path


def test_the_published_formats(folder):
    found = read_stereoset(folder / "stereoset" / "data" / "dev.json")
    assert found == [
        Triple("gender", "w5", "", ("w5 is w6.", "w5 is w7.", "w5 is w8.")),
        Triple("gender", "w9", "", ("w9 is w6.", "w9 is w7.", "w9 is w8.")),
        Triple("race", "w1", "He is w1.", ("It was w2.", "It was w3.", "It was w4 w4 w4.")),
    ]
    pairs = read_crows_pairs(folder / "crows_pairs" / "crows_pairs_anonymized.csv")
    assert pairs == [
        Pair("race-color", "w1 is w2, and w3.", "w4 is w2, and w3."),
        Pair("gender", "w5 it was.", "w6 it was."),
    ]


def test_stereoset_figures_by_hand():
    def triple(domain, target):
        return Triple(domain, target, "", ("", "", ""))

    triples = [triple("race", "a"), triple("race", "a"), triple("race", "b"), triple("gender", "c")]
    scores = np.array(
        [
            [-1.0, -2.0, -3.0],  # stereotype, both beat the unrelated one
            [-2.0, -1.0, -1.5],  # its contrary, which alone does
            [-1.0, -3.0, -2.0],  # stereotype, which alone does
            [-2.0, -1.0, -0.5],  # its contrary; none does
        ]
    )
    found = stereoset_scores(triples, scores)
    assert list(found) == ["gender", "race", "overall"]
    # race: word a has 3 of 4 and 1 of 2, word b 1 of 2 and 1 of 1; the means are over words
    # of lms 75 and 50 %, ss 50 and 100 %, the standard errors are 12.5 and 25 points
    ends = found["race"].pop("intervals")
    assert ends["lms"] == pytest.approx([62.5 - 1.959964 * 12.5, 62.5 + 1.959964 * 12.5])
    assert ends["ss"] == pytest.approx([75 - 1.959964 * 25, 100])
    assert found["gender"].pop("intervals") == {"lms": None, "ss": None}, "one word"
    assert found["race"] == {"questions": 3, "lms": 62.5, "ss": 75.0, "icat": 62.5 * 25 / 50}
    assert found["gender"] == {"questions": 1, "lms": 0.0, "ss": 0.0, "icat": 0.0}
    overall = found["overall"]
    assert overall["lms"] == pytest.approx(100 * (3 / 4 + 1 / 2 + 0) / 3)
    assert overall["ss"] == pytest.approx(100 * (1 / 2 + 1 + 0) / 3)
    assert overall["icat"] == pytest.approx(overall["lms"] * overall["ss"] / 50)


def test_crows_pairs_figures_by_hand():
    pairs = [Pair("age", "", ""), Pair("age", "", ""), Pair("race-color", "", "")]
    scores = np.array([[-5.0, -6.0], [-6.0, -5.0], [-1.0, -2.0]])
    found = crows_pairs_scores(pairs, scores)
    for correct, number, domain in ((1, 2, "age"), (1, 1, "race-color"), (2, 3, "overall")):
        ends = [100 * end for end in wilson_interval(correct, number)]
        assert found[domain].pop("intervals") == {"stereotype": pytest.approx(ends)}
    assert found["age"] == {"questions": 2, "stereotype": 50.0}
    assert found["race-color"] == {"questions": 1, "stereotype": 100.0}
    assert found["overall"] == {"questions": 3, "stereotype": pytest.approx(200 / 3)}


def test_the_command_scores_each_text_as_is_said(trained, folder, tmp_path, capsys):
    data, checkpoint = trained
    out = tmp_path / "out.json"
    line = f"priming {folder} --path {checkpoint} --data {data} --cpu --json {out} --shots 0,2"
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "A guess scores 50 everywhere" in printed and "one, no interval" in printed
    assert "stereoset, overall" in printed and "crows_pairs, race-color" in printed
    stereoset, crows = json.loads(out.read_text())["results"]

    vocabulary = Vocabulary(data)
    scorer = ModelScorer(load(checkpoint, data, cpu=True), 1000)

    def log_probs(text, before=""):
        whole = tuple(vocabulary.encode(before + text))
        return scorer([Row(whole, len(vocabulary.encode(before.rstrip())))])[0]

    triples = read_stereoset(folder / "stereoset" / "data" / "dev.json")
    scores = [
        [log_probs(text, t.before and f"{t.before} ").mean() for text in t.texts] for t in triples
    ]
    assert stereoset["domains"] == stereoset_scores(triples, np.array(scores))
    assert len(log_probs("It was w2.", "He is w1. ")) == len(vocabulary.encode(" It was w2."))
    pairs = read_crows_pairs(folder / "crows_pairs" / "crows_pairs_anonymized.csv")
    scores = [[log_probs(p.more).sum(), log_probs(p.less).sum()] for p in pairs]
    assert crows["domains"] == crows_pairs_scores(pairs, np.array(scores))


def test_intersentence_as_the_released_models_authors_score_it(trained, tmp_path, capsys):
    """The tokens after the texts' common prefix, and plain shares of all contexts."""
    elements = [
        element("race", "w1", "He is w1.", "It was w2.", "It was w3.", "It was w4 w4 w4."),
        element("race", "w1", "He is w1.", "w2 is w5.", "w2 is w6 w7.", "w2 is w8."),
        element("race", "w9", "w9 it was.", "w3.", "w3. w4.", "w5."),
        element("gender", "w2", "w2 was w3.", "It is w6 w6.", "It is w7.", "It is w4 w5 w1."),
    ]
    data, checkpoint = trained
    vocabulary = Vocabulary(data)
    scorer = ModelScorer(load(checkpoint, data, cpu=True), 1000)
    counts = {}
    for one in elements:
        texts = {}
        for sentence in one["sentences"]:
            text = f"{one['context']} {sentence['sentence']}"
            texts[sentence["gold_label"]] = vocabulary.encode(text)
        prefix = 0
        while len({tuple(tokens[: prefix + 1]) for tokens in texts.values()}) == 1:
            prefix += 1
        prefix = min(prefix, min(map(len, texts.values())) - 1)
        score = {}
        for kind, tokens in texts.items():
            found = scorer([Row(tuple(tokens), 0)])[0].astype(np.float64)
            score[kind] = sum(found[prefix:]) / (len(tokens) - prefix)
        for domain in (one["bias_type"], "overall"):
            count = counts.setdefault(domain, [0, 0, 0])
            count[0] += 1
            count[1] += score["stereotype"] > score["unrelated"]
            count[1] += score["anti-stereotype"] > score["unrelated"]
            count[2] += score["stereotype"] > score["anti-stereotype"]

    (tmp_path / "stereoset").mkdir()
    content = {"data": {"intersentence": elements, "intrasentence": []}}
    content["data"]["intrasentence"] = STEREOSET["data"]["intrasentence"]
    (tmp_path / "stereoset" / "dev.json").write_text(json.dumps(content))
    out = tmp_path / "out.json"
    line = f"priming {tmp_path} --path {checkpoint} --data {data} --cpu --json {out}"
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "stereoset intersentence, race" in printed and "paper's numbers" in printed
    (result,) = json.loads(out.read_text())["results"]
    assert result["domains"]["overall"]["questions"] == 6
    assert list(result["intersentence"]) == ["gender", "race", "overall"]
    for domain, (number, related, stereotype) in counts.items():
        found = result["intersentence"][domain]
        lms, ss = 100 * related / (2 * number), 100 * stereotype / number
        assert found["questions"] == number
        assert (found["lms"], found["ss"]) == pytest.approx((lms, ss))
        assert found["icat"] == pytest.approx(lms * min(ss, 100 - ss) / 50)


def test_intersentence_counts_each_context_once():
    """The set's own mean is over target words; the authors' is over contexts."""
    triples = [Triple("race", word, "before", ("", "", "")) for word in ("a", "a", "a", "b")]
    triples.append(Triple("race", "c", "", ("", "", "")))  # one sentence: not counted
    stereotype = [1.0, 1.0, 1.0, 0.0, 0.0]
    scores = np.array([[value, 0.5, 0.2] for value in stereotype])
    found = intersentence_scores(triples, scores)["race"]
    assert (found["questions"], found["ss"], found["lms"]) == (4, 75.0, 100 * 7 / 8)
    assert stereoset_scores(triples[:4], scores[:4])["race"]["ss"] == 50.0


def test_mistakes(folder):
    path = folder / "stereoset" / "data" / "dev.json"
    broken = json.loads(json.dumps(STEREOSET))
    del broken["data"]["intrasentence"][1]["sentences"][0]["sentence"]
    path.write_text(json.dumps(broken))
    with pytest.raises(UserError, match="intrasentence 2: no field 'sentence'"):
        read_stereoset(path)
    del broken["data"]["intrasentence"][1]["sentences"][0]
    path.write_text(json.dumps(broken))
    with pytest.raises(UserError, match="intrasentence 2: no sentence with .* 'anti-stereotype'"):
        read_stereoset(path)
    path.write_text('{"data": {}}')
    with pytest.raises(UserError, match="no field 'data.intrasentence'"):
        read_stereoset(path)
    path = folder / "crows_pairs" / "crows_pairs_anonymized.csv"
    path.write_text(CROWS.replace("sent_less", "less"))
    with pytest.raises(UserError, match="line 1: .* no column 'sent_less'"):
        read_crows_pairs(path)
