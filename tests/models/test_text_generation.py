"""`lm.generate`: text by a search through the cache, against a plain loop without one."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from fairseq.modules import PositionalEmbedding
from small_models import make_task
from training import prepare_text, train_small

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel
from fairseq_moe_ext.models.next_token import Choice
from fairseq_moe_ext.models.search import Generator, Prompt
from fairseq_moe_ext.models.text_generation import generate, settings_of

TEXT = "the cat sat on the mat\nand saw a dog\n\né 木 a cat\n" * 20
PROMPTS = ["the cat", "", "the\ncat sat on the", "a dog\n", "é"]
KINDS = {"dense": "--moe-freq 0", "moe": "--moe-freq 2 --moe-expert-count 3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared corpus, and for each kind a model that is trained a little."""
    folder = tmp_path_factory.mktemp("text")
    data = prepare_text(folder, TEXT) / "a"
    for kind, flags in KINDS.items():
        train_small(data, folder / kind, f"--task language_modeling --max-update 20 {flags}")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return {kind: load(folder / kind) for kind in KINDS}


def load(folder, **settings):
    """In float64, so that rounding in batches decides nothing; with the tokenizer beside it."""
    return MoETransformerLanguageModel.from_pretrained(
        str(folder), "checkpoint_last.pt", **settings
    ).double()


def plain_loop(lm, prompt, max_tokens, pick, stop="\0", penalty=1.0, ngram=0):
    """Whole forward passes, one row at a time; the new text."""
    tokens = lm.encode(prompt).tolist()[:-1]
    start = len(tokens)
    dictionary = lm.tgt_dict
    for _ in range(max_tokens):
        with torch.no_grad():
            logits = lm.models[0](torch.tensor([[2, *tokens]]))[0][0, -1]
        for token in set(tokens) if penalty != 1 else ():
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        for i in range(len(tokens) - ngram + 1) if ngram else ():
            if tokens[i : i + ngram - 1] == tokens[len(tokens) - ngram + 1 :]:
                logits[tokens[i + ngram - 1]] = -math.inf
        for token, word in enumerate(dictionary.symbols):
            if token in (0, 1, 3) or word.startswith("madeupword"):
                logits[token] = -math.inf
        tokens.append(pick(logits))
        if stop in lm.decode([*tokens[start:], 2]):
            break
    return lm.decode([*tokens[start:], 2]).split(stop)[0]


def greedy(logits):
    return max(range(len(logits)), key=lambda i: float(logits[i]))


def sampler(number, seed, temperature, top_k, top_p):
    """Draws by hand, with the generator that generate() documents: one number for each token."""
    draws = random.Random(f"{seed}/0" if number == 1 else f"{seed}/0/{number}")

    def pick(logits):
        probs = (logits / temperature).softmax(0).tolist()
        order = sorted(range(len(probs)), key=lambda i: -probs[i])[: top_k or None]
        total = sum(probs[i] for i in order)
        kept, mass = [], 0.0
        for i in order:
            kept.append(i)
            mass += probs[i] / total
            if mass >= top_p:
                break
        left = draws.random() * sum(probs[i] for i in kept)
        for i in kept:
            left -= probs[i]
            if left < 0:
                return i
        return kept[-1]

    return pick


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings, loop",
    [
        ({}, {}),
        ({"repetition_penalty": 1.7}, {"penalty": 1.7}),
        ({"no_repeat_ngram_size": 2}, {"ngram": 2}),
        ({"no_repeat_ngram_size": 1}, {"ngram": 1}),
        ({"stop": "\n"}, {"stop": "\n"}),
        ({"temperature": 0.7, "seed": 3}, {"pick": (3, 0.7, 0, 1.0)}),
        ({"top_k": 3, "seed": 1}, {"pick": (1, 1.0, 3, 1.0)}),
        ({"top_k": 9, "top_p": 0.6, "seed": 5}, {"pick": (5, 1.0, 9, 0.6)}),
    ],
)
def test_a_batch_equals_plain_loops(models, kind, settings, loop):
    """Through newlines, with prompts of all lengths padded on the left."""
    lm = models[kind]
    pick = loop.pop("pick", None) if loop else None

    def plain(number, prompt):
        return plain_loop(lm, prompt, 12, sampler(number, *pick) if pick else greedy, **loop)

    expected = [plain(number, prompt) for number, prompt in enumerate(PROMPTS, 1)]
    alone = [plain(1, prompt) for prompt in PROMPTS] if pick else expected
    loop.update({"pick": pick} if pick else {})
    assert lm.generate(PROMPTS, max_tokens=12, **settings) == expected
    assert [lm.generate(p, max_tokens=12, **settings) for p in PROMPTS] == alone
    if not settings:
        assert any("\n" in text for text in expected), "they go on through newlines"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"beams": 2}, {"temperature": 1.0, "seed": 1}])
def test_a_short_prompt_goes_on_beside_one_that_fills_the_context(folder, kind, flags, monkeypatch):
    """With learned positions: padding takes none. The context has 32 tokens."""
    lm = load(folder / kind)
    decoder = lm.models[0].decoder
    decoder.embed_positions = PositionalEmbedding(32, 16, 1, learned=True).double()
    full = "the " * 27
    room = 32 - (len(lm.encode(full)) - 1)
    assert 0 < room < 12
    alone = [lm.generate(prompt, **flags) for prompt in ("a", full)]
    assert lm.generate(["a", full], **flags)[:1] == alone[:1]
    if "seed" not in flags:
        assert lm.generate(["a", full], **flags) == alone


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_the_text(models, kind):
    for settings in ({}, {"stop": ["sat o", "dog\n"]}, {"temperature": 3.0, "seed": 2}):
        for prompt in PROMPTS:
            pieces = []
            text = models[kind].generate(prompt, max_tokens=20, stream=pieces.append, **settings)
            assert "".join(pieces) == text
            assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_prompts_do_not_share_random_numbers(models):
    """The text of one depends on the seed and its number, not on its batch."""
    lm, wanted = models["moe"], settings_of(temperature=2.0, seed=1, max_tokens=12)
    texts = [some[0].text for some in generate(lm, ["the"] * 3, wanted)]
    assert len(set(texts)) == 3
    assert [some[0].text for some in generate(lm, ["the"] * 3, wanted, batch_tokens=1)] == texts
    assert generate(lm, ["the"], wanted, first=2)[0][0].text == texts[1]


def test_texts_of_a_prompt(models):
    lm = models["moe"]
    several = lm.generate(PROMPTS[:2], n=3, seed=7, max_tokens=8)
    assert [len(some) for some in several] == [3, 3] and len(set(several[0])) > 1
    assert lm.generate(PROMPTS[0], n=3, seed=7, max_tokens=8) == several[0]
    assert lm.generate(PROMPTS[0], temperature=1, seed=7, max_tokens=8) == several[0][0]
    best = lm.generate("the", beams=4, n=3, max_tokens=6)
    assert len(set(best)) == 3 and best[0] == lm.generate("the", beams=4, max_tokens=6)
    means = [float(lm.score("the" + text)["positional_scores"][-6:].mean()) for text in best]
    assert means == sorted(means, reverse=True)


def test_sampling_has_the_right_frequencies():
    logits = torch.tensor([1.0, 3.0, -math.inf, 2.0, 2.5])
    choice, draws = Choice(temperature=2.0, top_k=3), random.Random(1)
    found = [choice.draw(logits, draws) for _ in range(4000)]
    expected = (torch.tensor([3.0, 2.5, 2.0]) / 2).softmax(0)
    for token, share in zip((1, 4, 3), expected):
        assert found.count(token) / 4000 == pytest.approx(float(share), abs=0.03)
    assert set(found) == {1, 3, 4}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_tokens": 0}, "max_tokens 0: use a whole number from 1"),
        ({"max_tokens": 31}, "max_tokens 31: prompt 1 of 1 has 2 tokens, which leaves 30 of"),
        ({"temperature": -1.0}, "temperature -1.0: use 0"),
        ({"temperature": math.nan}, "temperature nan: use 0"),
        ({"top_p": 0.0}, "top_p 0.0: use a probability above 0"),
        ({"top_k": -1}, "top_k -1: use 0"),
        ({"top_k": 4, "temperature": 0.0}, "top_k 4: temperature 0 takes the most likely"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0: use a number above 0"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size -2: use 0"),
        ({"beams": 0}, "beams 0: use a whole number from 1"),
        ({"beams": 2, "temperature": 1.0}, "does not sample"),
        ({"n": 2, "temperature": 0.0}, "n 2: without sampling"),
        ({"stop": ""}, "stop: an empty text"),
        ({"seed": -1}, "seed -1"),
        ({"top": 1}, "unexpected keyword argument 'top'"),
        ({"n": 2, "stream": print}, "stream: one prompt"),
    ],
)
def test_mistakes_are_reported(models, settings, words):
    with pytest.raises(UserError, match=words):
        models["dense"].generate("the cat", **settings)


def test_a_prompt_without_room(models):
    with pytest.raises(UserError, match="prompt 2 of 2 has 40 tokens, but the model takes 31"):
        models["dense"].generate(["a", "the " * 39 + "a"])


def test_experts_on_disk_write_the_same(folder, models):
    lm = load(folder / "moe", moe_experts_on_disk=True)
    assert lm.generate(PROMPTS, max_tokens=9) == models["moe"].generate(PROMPTS, max_tokens=9)


class Constant(torch.nn.Module):
    """A decoder that always yields the same logits (V,)."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.dictionary = make_task(len(logits)).source_dictionary

    def forward(self, tokens, **options):
        return torch.zeros(*tokens.shape, 1), {}

    def output_layer(self, features):
        return self.logits.expand(len(features), -1)

    def reorder_incremental_state_scripting(self, state, order):
        pass


@pytest.mark.parametrize(
    "beam, choice",
    [(1, Choice()), (1, Choice(temperature=1.0, top_k=1)), (2, Choice())],
    ids=["greedy", "sampled", "beam"],
)
def test_a_long_text_is_as_likely_as_a_short_one(beam, choice):
    """Its log-probabilities sum to -3,800, where numbers of float32 are 2.4e-4 apart."""
    torch.manual_seed(0)
    logits = 1e-5 * torch.randn(600)
    logits[:4], logits[77] = -1.0, 4e-5 + logits[4:].max()
    model = SimpleNamespace(decoder=Constant(logits), parameters=lambda: iter([logits]))
    search = Generator(model, beam, 10_000, choice=choice)
    drawn = random.Random(0) if choice.temperature else None
    (found,) = search([Prompt((5,), 600, lambda new: False, drawn)])
    assert found == [77] * 600
