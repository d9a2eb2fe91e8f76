"""The quickstart's result (the dictionary run.py writes as result.json) in words and charts:
report.html. Every number comes from that dictionary; nothing is measured here.
"""

import math
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

from table import (
    DENSE,
    LABELS,
    MODELS,
    MOE,
    big,
    change,
    domains,
    mean,
    mean_perplexity,
    rows,
    signed,
)

from fairseq_moe_ext.evaluation import figures, report, specialisation
from fairseq_moe_ext.generate import showing
from fairseq_moe_ext.wording import clock

STYLES = {DENSE: 0, MOE: 1}
NOISE = 2.0  # per cent of perplexity: what one seed and so little text cannot tell apart


def samples(result: Dict) -> List[Tuple[str, List[str]]]:
    """Each prompt with what the two models wrote after it, in the order of MODELS."""
    prompts = list(dict.fromkeys(one["prompt"] for one in result["samples"]))
    return [
        (prompt, [one["texts"][0] for one in result["samples"] if one["prompt"] == prompt])
        for prompt in prompts
    ]


def terminal_samples(result: Dict) -> str:
    """`samples` in two columns, for the terminal."""
    heads = [LABELS[name] for name in MODELS]
    return "\n".join(
        showing.columns(*(prompt + text for text in texts), heads)
        for prompt, texts in samples(result)
    )


def sentence(result: Dict) -> str:
    """The result in a few words, whichever way it went."""
    a, b = mean(result, DENSE, False), mean(result, MOE, False)
    c = change(mean(result, DENSE, True), mean(result, MOE, True))
    seconds = [result["models"][name]["training_seconds"] for name in MODELS]
    return (
        "With the same FLOPs per token, the same text and the same number of updates, the MoE "
        f"model reaches a mean in-domain test perplexity of {b:.2f} against {a:.2f} for its dense "
        f"twin: {_lower_or_higher(change(a, b))}. On kinds of text that neither saw in training it "
        f"is {_lower_or_higher(c)}. It trained {seconds[1] / seconds[0]:.2f} times as long on this "
        "machine."
    )


def _lower_or_higher(percent: float) -> str:
    if f"{abs(percent):.1f}" == "0.0":
        return "the same to a tenth of a per cent"
    return f"{abs(percent):.1f} % {'lower' if percent < 0 else 'higher'}"


_ROUTING = {
    "hash": "of which a token takes the four that a table has for its id (hash routing: ids are "
    "dealt out by frequency, nothing is learned)",
    "topk": "of which a token takes the two of a learned gate (top-2, with a balancing loss; the "
    "gate's FLOPs are not counted, as in the paper)",
}


def description(result: Dict) -> str:
    """The recipe in words."""
    s, dense, moe = result["settings"], *(result["models"][name] for name in MODELS)
    precision = " and ".join(dict.fromkeys((dense["precision"], moe["precision"])))
    return (
        f"Both models: {s['layers']} layers of width {s['dim']}, {s['heads']} heads, context "
        f"{s['context']}, a vocabulary of {s['dictionary']:,}, tied embeddings, no dropout. Dense: "
        f"FFNs of width {s['ffn']}. MoE: in every layer {s['experts']} experts of width "
        f"{s['expert_ffn']}, {_ROUTING[s['router']]}, no token dropped, so that a token costs "
        f"{big(moe['flops_per_token'])}FLOPs against {big(dense['flops_per_token'])}FLOPs. "
        f"{s['updates']} updates of {s['tokens_per_update']:,} tokens; Adam, learning rate "
        f"{s['learning_rate']:g} with linear warm-up and decay to 0, the same seed and order of "
        "text. The checkpoint with the best in-domain validation perplexity is evaluated on the "
        f"test text, in blocks of {s['context']} tokens that are scored each on its own. "
        f"Training computed in {precision}, evaluation in float32."
    )


class _Grid(NamedTuple):
    """Charts side by side."""

    charts: List[figures.Chart]
    caption: str


def _learning_curves(result: Dict) -> _Grid:
    per_update = result["settings"]["tokens_per_update"]
    curves = {name: result["models"][name]["validation"] for name in MODELS}

    def series(read, first: float = 0.0) -> List[figures.Series]:
        found = []
        for name in MODELS:
            points = [
                (point["update"] * per_update, read(point["perplexity"]))
                for point in curves[name]
                if point["update"] >= first
            ]
            found.append(figures.Series(LABELS[name], points, STYLES[name]))
        return found

    quarter = result["settings"]["updates"] / 4

    inside = [domain["name"] for domain in domains(result, False)]
    charts = [
        figures.line_chart(
            "Mean of the training domains",
            series(lambda perplexity: mean_perplexity([perplexity[name] for name in inside])),
            "tokens trained on",
            "perplexity",
            log_y=True,
        )
    ]
    dense_at = {point["update"]: point["perplexity"] for point in curves[DENSE]}
    gap = [
        (
            point["update"] * per_update,
            change(
                mean_perplexity([dense_at[point["update"]][name] for name in inside]),
                mean_perplexity([point["perplexity"][name] for name in inside]),
            ),
        )
        for point in curves[MOE]
        if point["update"] in dense_at
    ]
    charts.append(
        figures.line_chart(
            "MoE against dense, same mean",
            [figures.Series("MoE against dense", gap, STYLES[MOE])],
            "tokens trained on",
            "",
            zero_line=True,
            percent=True,
        )
    )
    for domain in result["domains"]:
        charts.append(
            figures.line_chart(
                domain["title"] + (" (held out)" if domain["held_out"] else ""),
                series(lambda perplexity, name=domain["name"]: perplexity[name], quarter),
                "tokens trained on",
                "perplexity",
                log_y=True,
            )
        )
    return _Grid(
        charts,
        "Perplexity on the validation text during training; logarithmic scale, each chart with its "
        "own range. Charts of single domains start after a quarter of the training. The second "
        "chart shows the distance between the two lines of the first: below zero, the MoE model "
        "is ahead.",
    )


def _expert_use(result: Dict) -> _Grid:
    layers = result["expert_use"]
    order = [d["name"] for d in domains(result, False)] + [d["name"] for d in domains(result, True)]
    titles = {domain["name"]: domain["title"] for domain in result["domains"]}
    highest = max(max(max(layer["share"][name]) for name in order) for layer in layers)
    inside = domains(result, False)
    charts = []
    for layer in layers:
        charts.append(
            figures.heatmap(
                specialisation.heading(layer),
                [titles[name] for name in order],
                [layer["share"][name] for name in order],
                "expert",
                highest,
                rule_before=len(inside),
            )
        )
    experts = len(layers[0]["share"][order[0]])
    return _Grid(
        charts,
        f"How each domain's test text is distributed over the {experts} experts of each MoE layer, "
        f"in per cent of all choices ({100 / experts:.1f} is even). The held-out domains are below "
        f"the line. Layers are counted from 0. {specialisation.MEANING} The bits are about the "
        f"training domain (0: nothing, {math.log2(len(inside)):.0f}: everything).",
    )


_BY_TOKEN = {
    "hash": [
        "The token alone selects the experts, so each expert knows its own tokens and no domain; "
        "with --router topk a learned gate chooses, as in the paper."
    ],
    "topk": [
        "On another processor, the MoE model's results differ, by up to 0.3 % so far: near a tie "
        "of two experts, rounding decides where a token goes."
    ],
}


def findings(result: Dict) -> List[str]:
    """What holds and what does not, from the numbers."""
    inside, outside = domains(result, False), domains(result, True)
    dense, moe = (result["models"][name] for name in MODELS)
    layers = result["expert_use"]
    inside_change = change(mean(result, DENSE, False), mean(result, MOE, False))
    outside_change = change(mean(result, DENSE, True), mean(result, MOE, True))
    shows = "shows here too" if inside_change < outside_change else "does not show here"
    if abs(inside_change - outside_change) < NOISE:
        shows = "cannot be decided here, with one seed"
    tested = sum(d["counts"]["test"]["bytes"] for d in result["domains"]) / len(result["domains"])
    return [
        _verdict(result, inside, "training domains"),
        _verdict(result, outside, "held-out domains"),
        f"The paper's finding that experts help more in domain than out of it {shows}: "
        f"{signed(inside_change)} in domain, {signed(outside_change)} out of domain.",
        *_BY_TOKEN.get(result["settings"]["router"], []),
        "Do experts specialise? " + specialisation.verdict(layers, "domain", "domain"),
        specialisation.verdict(layers, "token", "token"),
        "Equal FLOPs are not equal time: on this machine the MoE model trained for "
        f"{clock(moe['training_seconds'])} min, the dense one for "
        f"{clock(dense['training_seconds'])} min. It also holds "
        f"{moe['parameters'] / dense['parameters']:.1f} times the parameters in memory.",
        f"One run, one seed, about {tested / 1e3:.0f} kB of test text per domain: a difference of "
        "one per cent on a single domain may be noise.",
        f"Both models are far from trained out after {big(moe['training_tokens'])} tokens; "
        "these numbers do not show what a longer training would give.",
        "Perplexities are per token of this run's own tokenizer on this installation's text: "
        "compare only these two models by them.",
    ]


def _verdict(result: Dict, group: Sequence[Dict], words: str) -> str:
    dense, moe = (result["models"][name]["perplexity"] for name in MODELS)
    behind = [d["title"] for d in group if moe[d["name"]] >= dense[d["name"]]]
    text = f"The MoE model is ahead on {len(group) - len(behind)} of {len(group)} {words}"
    return text + (f", not on {', '.join(behind)}." if behind else ".")


def html(result: Dict) -> str:
    """report.html as a string."""
    inside_change = change(mean(result, DENSE, False), mean(result, MOE, False))
    outside_change = change(mean(result, DENSE, True), mean(result, MOE, True))
    dense, moe = (result["models"][name] for name in MODELS)
    versions = result["environment"].items()
    return report.render(
        "report.html.jinja",
        Path(__file__).resolve().parent,
        title="MoE against dense at equal FLOPs",
        sentence=sentence(result),
        cards=[
            (signed(inside_change), "MoE perplexity against dense, in domain"),
            (signed(outside_change), "the same, out of domain"),
            (
                f"× {moe['flops_per_token'] / dense['flops_per_token']:.3f}",
                "FLOPs per token, MoE against dense",
            ),
            (f"× {moe['parameters'] / dense['parameters']:.1f}", "parameters"),
            (
                f"× {moe['training_seconds'] / dense['training_seconds']:.2f}",
                "training time on this machine",
            ),
        ],
        result=_result_table(result),
        findings=findings(result),
        legend=figures.legend([LABELS[name] for name in MODELS], [STYLES[name] for name in MODELS]),
        curves=_learning_curves(result),
        use=_expert_use(result),
        samples=[
            (prompt, list(zip((LABELS[name] for name in MODELS), texts)))
            for prompt, texts in samples(result)
        ],
        vocabulary=f"{result['settings']['vocabulary']:,}",
        text=_text_table(result),
        description=description(result),
        commands=result["commands"],
        stages=report.table(
            ("Stage", "min:s"),
            [(stage["title"], clock(stage["seconds"])) for stage in result["stages"]],
        ),
        versions="; ".join(f"{name} {version}" for name, version in versions),
    )


def _result_table(result: Dict) -> report.Table:
    """`rows`, good and bad changes marked."""
    table: List[Tuple] = []
    for row in rows(result):
        if len(row) == 1:
            table.append(row)
            continue
        css = ""
        if row[3].endswith("%"):
            css = {"−": "good", "+": "bad"}.get(row[3][0], "")
        first = (row[0], "total") if row[0].startswith("Mean") else row[0].strip()
        table.append((first, row[1], row[2], (row[3], css)))
    return report.table(("", "Dense", "MoE", "MoE : dense"), table)


def _text_table(result: Dict) -> report.Table:
    rows = [
        (
            f"{domain['title']}\n{domain['source']}",
            "held out"
            if domain["held_out"]
            else f"{domain['counts']['train']['bytes'] / 1e6:.2f} MB",
            f"{domain['counts']['test']['bytes'] / 1e3:.0f} kB",
            f"{sum(split['documents'] for split in domain['counts'].values())}",
        )
        for domain in result["domains"]
    ]
    return report.table(("Domain", "Training", "Test", "Documents"), rows)
