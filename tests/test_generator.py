"""Searches of fairseq's SequenceGenerator over our model, against plain loops."""

import math

import pytest
import torch
from fairseq import checkpoint_utils, search
from fairseq.sequence_generator import SequenceGenerator
from small_models import MOE, PAD, build_model, make_task
from training import USER_DIR, fairseq

from fairseq_moe_ext import context
from fairseq_moe_ext.models.search import Generator, Prompt

EOS = 2
DICTIONARY = make_task().source_dictionary


@pytest.fixture(scope="module")
def model():
    return build_model(**MOE, moe_eval_capacity_token_fraction=1.0).eval().double()


def generate(model, prompts, **flags):
    """The hypotheses of each prompt, given without the </s> that the model begins with."""
    longest = max(map(len, prompts)) + 1
    tokens = torch.full((len(prompts), longest), PAD)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt) + 1] = torch.tensor([EOS, *prompt])
    generator = SequenceGenerator([model], DICTIONARY, **{"max_len_b": 12, **flags})
    sample = {
        "id": torch.arange(len(prompts)),
        "net_input": {"src_tokens": tokens, "src_lengths": tokens.ne(PAD).sum(1)},
    }
    return generator.generate([model], sample, prefix_tokens=tokens[:, 1:], bos_token=EOS)


def log_probs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([[EOS, *tokens]]))[0][0].log_softmax(-1)


def banned(tokens, size):
    """The tokens that would complete an n-gram that is there."""
    row = [EOS, *tokens]
    known = row[len(row) - size + 1 :]
    begin = 1 if size == 1 else 0
    return {
        row[i + size - 1]
        for i in range(begin, len(row) - size + 1)
        if row[i : i + size - 1] == known
    }


def greedy(model, prompt, longest=12, size=0):
    tokens = list(prompt)
    while len(tokens) < longest:
        scores = log_probs(model, tokens)[-1]
        scores[PAD] = -math.inf
        for token in banned(tokens, size) if size else ():
            scores[token] = -math.inf
        tokens.append(int(scores.argmax()))
        if tokens[-1] == EOS:
            return tokens
    return [*tokens, EOS]


PROMPTS = [[5, 6, 7], [8], [9, 10, 9, 10, 9], [11, 12, 13, 14]]


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_no_ngram_is_repeated(model, size):
    found = generate(model, PROMPTS, beam_size=1, no_repeat_ngram_size=size)
    assert [row[0]["tokens"].tolist() for row in found] == [
        greedy(model, prompt, size=size) for prompt in PROMPTS
    ]


def test_a_beam_repeats_no_bigram_behind_its_prompt(model):
    for hypotheses in generate(model, PROMPTS[:2], beam_size=3, no_repeat_ngram_size=2):
        for hypothesis in hypotheses:
            row = [EOS, *hypothesis["tokens"].tolist()[:-1]]
            pairs = list(zip(row, row[1:]))
            assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale, more", [(2.0, 1.0), (3.0, 3.0)])
def test_our_own_search_finds_what_fairseq_finds(monkeypatch, seed, scale, more):
    """Where </s> is often among the likelier tokens. Ours may also keep a last few."""
    model = build_model(seed, decoder_layers=2).double().eval()
    logits = model.decoder.output_layer

    def with_ends(features):
        out = scale * logits(features)
        out[..., EOS] += more
        out[..., PAD] = -math.inf  # fairseq's probabilities of the others would not sum to 1
        return out

    monkeypatch.setattr(model.decoder, "output_layer", with_ends)
    for beam in (1, 3, 5):
        prompt = Prompt((), 40, lambda new: new[-1] == EOS)
        (ours,) = Generator(model, beam, 10_000).best([prompt])
        (found,) = generate(model, [[]], beam_size=beam, max_len_b=40, min_len=0)
        theirs = [one["tokens"].tolist() for one in found]
        assert ours[0] == theirs[0] and len(ours) < 2 * beam
        assert all(one in ours for one in theirs)


NEWLINES = [[5, EOS, 6], [EOS, EOS, 7], [8, 9], [10, EOS, 11, EOS, 12]]


def test_text_goes_on_behind_newlines_in_prompts(model):
    found = generate(model, NEWLINES, beam_size=1)
    assert [row[0]["tokens"].tolist() for row in found] == [greedy(model, p) for p in NEWLINES]
    with context.during(context.prompts_go_on, True):
        found = generate(model, [[5, EOS], [8]], beam_size=1)
    assert [row[0]["tokens"].tolist() for row in found] == [
        greedy(model, [5, EOS]),
        greedy(model, [8]),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        {"beam_size": 3},
        {"beam_size": 4, "search_strategy": search.DiverseBeamSearch(DICTIONARY, 2, 0.5)},
        {"beam_size": 2, "search_strategy": search.Sampling(DICTIONARY, 5)},
        {"beam_size": 2, "search_strategy": search.Sampling(DICTIONARY, 10**6)},
        {"beam_size": 2, "search_strategy": search.Sampling(DICTIONARY, -1, 0.8)},
        {"beam_size": 3, "max_len_b": 3},
        {"beam_size": 3, "max_len_b": 2},
        {"beam_size": 3, "no_repeat_ngram_size": 2},
    ],
)
def test_searches_with_newlines_and_finished_sentences(model, flags):
    """Each begins with its prompt, and has the model's log-probability of each token; one that is
    over has one hypothesis, itself."""
    prompts = [*NEWLINES, [EOS], [5, 6, EOS]]
    longest = flags.get("max_len_b", 12)
    found = generate(model, prompts, temperature=1.0, **flags)
    for prompt, hypotheses in zip(prompts, found):
        for hypothesis in hypotheses:
            tokens = hypothesis["tokens"].tolist()
            assert tokens[: min(len(prompt), longest)] == prompt[:longest]
            if "search_strategy" not in flags:
                scores = log_probs(model, tokens[:-1])
                expected = scores[torch.arange(len(tokens)), torch.tensor(tokens)]
                torch.testing.assert_close(
                    hypothesis["positional_scores"].double(), expected, rtol=1e-4, atol=1e-4
                )
    assert [len(row) for row in found[-2:]] == [1, 1]
    if longest > 3:
        assert [row[0]["tokens"].tolist() for row in found[-2:]] == [[EOS], [5, 6, EOS]]


def test_an_overlong_line_does_not_end_the_session(model, monkeypatch, capsys, tmp_path):
    """Nor one without a known word; the lines after them have their own numbers."""
    folder = tmp_path / "data"
    folder.mkdir()
    DICTIONARY.save(str(folder / "dict.txt"))
    path = tmp_path / "model.pt"
    lines = ["w1 w2", " ".join(["w3"] * 64), "none of these", "", "w4"]
    (tmp_path / "input").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(
        checkpoint_utils, "load_model_ensemble", lambda *args, **kwargs: ([model.float()], None)
    )
    line = f"fairseq-interactive {folder} --task language_modeling --path {path} --cpu"
    fairseq(f"{line} --beam 2 --max-len-b 6 --input {tmp_path / 'input'} --user-dir {USER_DIR}")
    out, err = capsys.readouterr()
    assert [word for word in ("H-0", "H-1", "H-2", "H-3", "H-4") if word in out] == [
        "H-0",
        "H-3",
        "H-4",
    ]
    told = [text for text in err.splitlines() if text.startswith("error: ")]
    assert told == [
        "error: line 2 is left out: 65 tokens; the model takes 64",
        "error: line 3 is left out: only <unk>: add --bpe and its files",
    ]
