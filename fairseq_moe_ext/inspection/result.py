"""The numbers of `fairseq-moe inspect`: plain values, as they are in the file of --json."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .. import outputs
from . import page


@dataclass
class Word:
    """A token id that is more frequent among an expert's tokens than chance explains."""

    token: str
    lift: float  # its share among the expert's tokens over its share among all
    count: int  # that go to the expert


@dataclass
class Example:
    """A token in its context that the gate sends to an expert with a high probability."""

    before: str
    token: str
    after: str
    domain: str
    probability: float


@dataclass
class Card:
    """What one expert of one layer takes. Shares are of choices before any is dropped."""

    expert: int
    share: float  # of the layer's choices
    deviation: float  # standard deviation of the share over blocks of text
    dropped: float  # share of its choices
    words: List[Word]
    examples: List[Example]
    domains: List[float]  # of the choices on each domain, the share that this expert takes
    positions: List[float]  # likewise for each class of positions
    frequencies: List[float]  # likewise for each class of token frequency


@dataclass
class Knowledge:
    """Bits of information that the first choice carries about a variable (controls:
    specialisation.py)."""

    bits: float  # as counted
    bias: float  # of finite counts, taken off below
    random: List[float]  # of the random gates, without their bias
    random_mean: float
    random_sd: float
    left: float  # of the learned gate, without bias, above the mean of the random gates
    above: bool  # more than their variation explains
    interval: Optional[Tuple[float, float]]  # 95 % of `left`, by the jackknife; None: little text


@dataclass
class Pair:
    """Two experts, and the cosine of their outputs on the same inputs."""

    first: int
    second: int
    outputs: float
    routers: float  # cosine of their rows of the router


@dataclass
class Layer:
    """One MoE layer. Matrices are over the experts in `shown`, the most used ones."""

    layer: int  # from 0, among all layers
    experts: int  # that compute; the numbers below leave out null experts but in `entropy`
    choices: int  # experts a token goes to, at most
    load_deviation: float  # standard deviation of the experts' shares over their mean
    dropped: float  # share of choices
    entropy: float  # mean, of the gate's probabilities, in bits
    null_experts: int
    null_share: float  # of the choices
    cards: List[Card]
    knowledge: Dict[str, Knowledge]  # "domain", "token", "previous", "position"
    shown: List[int]
    together: Optional[List[List[float]]]  # of the tokens of the row's expert, those of the column
    flow: Optional[List[List[float]]]  # likewise, of the next MoE layer's first choices (columns)
    flow_to: List[int]  # experts of the next layer that are columns
    flow_bits: Optional[float]  # that first choices carry about the next layer's, without bias
    router_similarity: List[List[float]]  # cosine
    output_similarity: List[List[float]]  # mean cosine on the same inputs
    alike: List[Pair]  # the most alike in their outputs


@dataclass
class ShownText:
    """One text, token by token. Lists over tokens; of layers, each in the order of `layers`."""

    name: str
    tokens: List[str]
    newline: List[bool]
    loss: List[float]  # nats
    twin: Optional[List[float]]  # of the second model
    candidates: List[List[List[Tuple[int, float, int]]]]  # layer, token: (expert, probability, how)
    cut: int  # tokens that are left out at the end


@dataclass
class Saturation:
    """How similarly an earlier checkpoint routes."""

    checkpoint: str
    updates: Optional[int]
    agreement: List[float]  # of each layer: share of the choices that are the same
    chance: List[float]  # of each layer: the same for experts drawn by their loads


@dataclass
class Training:
    """Metrics of the gates over training: name -> layer ("all": the mean) -> values."""

    log: str
    updates: List[int]
    metrics: Dict[str, Dict[str, List[Optional[float]]]]


@dataclass
class Inspection:
    """All results of `fairseq-moe inspect`."""

    checkpoint: str
    twin: Optional[str]
    subset: str
    capacity: str
    tokens: Dict[str, int]  # of each domain that is counted
    loss: Dict[str, float]  # nats per token, of each domain
    twin_loss: Optional[Dict[str, float]]
    positions: List[str]  # classes
    frequencies: List[str]
    layers: List[Layer]
    texts: List[ShownText]
    saturation: List[Saturation]
    training: Optional[Training]
    said: List[str] = field(default_factory=list)  # what is above the controls, in words

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)

    def write_json(self, path: Path) -> None:
        """Write all numbers, whole or not at all."""
        outputs.write_json(path, self.to_dict(), indent=None)

    def html(self) -> str:
        """One self-contained page."""
        return page.html(self.to_dict())

    def write_page(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        outputs.write_text(path, self.html())

    def _repr_html_(self) -> str:
        """In a notebook: the page in a frame of its own."""
        from markupsafe import escape

        frame = 'style="width:100%;height:720px;border:0"'
        return f'<iframe title="experts" {frame} srcdoc="{escape(self.html())}"></iframe>'
