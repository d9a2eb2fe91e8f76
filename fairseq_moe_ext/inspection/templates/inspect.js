// The page itself: what is chosen, and the parts that follow from it.
const found = JSON.parse(document.getElementById("data").textContent);
const state = { layer: 0, text: 0, colour: "expert", filter: new Set(), token: 0, all: false };
const by = (id) => document.getElementById(id);
const layer = () => found.layers[state.layer];
const text = () => found.texts[state.text];
const CHOICES = ["first", "second", "third", "fourth"];
const CARDS = 24; // that are drawn at once, of the most used experts

function firstOf(token) {
  const best = text().candidates[state.layer][token][0];
  return best && best[2] > 0 ? best : null;
}

function tint(token, expert) {
  const { loss, twin } = text();
  if (state.colour === "expert") return expert === null ? "transparent" : colour(expert);
  const difference = state.colour === "twin";
  const value = difference ? loss[token] - twin[token] : loss[token];
  const strength = Math.min(100, Math.round((100 * Math.abs(value)) / (difference ? 3 : 9)));
  return `color-mix(in srgb, var(--${value > 0 ? "more" : "less"}) ${strength}%, transparent)`;
}

function drawTokens() {
  const box = by("tokens");
  box.replaceChildren();
  text().tokens.forEach((piece, i) => {
    const best = firstOf(i);
    const expert = best ? best[0] : null;
    const off = state.filter.size && !state.filter.has(expert);
    const classes = ["t", off ? "off" : state.colour === "expert" && best ? "on" : "", best && best[2] === 1 ? "lost" : ""];
    const span = make("span", {
      class: classes.join(" ").trim(), role: "option", "data-i": i, tabindex: i === state.token ? 0 : -1,
      "aria-selected": i === state.token, style: off ? "" : `--c:${tint(i, expert)}`,
      "aria-label": `${piece}, expert ${expert === null ? "none" : expert}`,
    }, piece, make("small", { "aria-hidden": "true" }, expert === null ? "–" : String(expert)));
    box.append(span);
    if (text().newline[i]) box.append(make("br"));
  });
  by("legend").textContent = { expert: "", loss: "The redder, the higher the loss of the token (9 nats: full colour).",
    twin: "Red: this model's loss is higher than the second one's; blue: lower (3 nats: full colour)." }[state.colour];
  by("cut").textContent = text().cut ? `${text().cut} more tokens are not shown (--show).` : "";
}

function choose(i, focus) {
  const spans = by("tokens").getElementsByClassName("t");
  for (const [j, chosen] of [[state.token, false], [i, true]]) {
    if (!spans[j]) continue;
    spans[j].setAttribute("aria-selected", chosen);
    spans[j].tabIndex = chosen ? 0 : -1;
  }
  state.token = i;
  if (focus) spans[i].focus({ preventScroll: false });
  drawDetail();
}

function drawDetail() {
  const i = state.token, { tokens, loss, twin, candidates } = text();
  const parts = [
    make("p", {}, make("b", {}, tokens[i]), ` token ${i + 1}, layer ${layer().layer}`),
    ...candidates[state.layer][i].map(([expert, probability, how], rank) =>
      bar(`expert ${expert}`, probability, 1, `${percent(probability)} ${how === 1 ? "dropped" : how ? CHOICES[rank] : "not chosen"}`, colour(expert))),
    make("p", {}, `Loss ${loss[i].toFixed(2)} nats: probability ${percent(Math.exp(-loss[i]))}`),
  ];
  if (twin) {
    const less = twin[i] - loss[i];
    parts.push(make("p", {}, `Second model ${twin[i].toFixed(2)} nats: ${Math.abs(less).toFixed(2)} ${less >= 0 ? "more" : "less"}`));
  }
  by("detail").replaceChildren(...parts);
}

function drawFilter() {
  const used = new Set(text().tokens.map((_, i) => firstOf(i)).filter(Boolean).map((best) => best[0]));
  const chips = [...Array(layer().experts).keys()].filter((e) => layer().experts <= 16 || used.has(e)).map((expert) => {
    const chip = make("button", {
      type: "button", class: "chip", style: `--c:${colour(expert)}`, "data-expert": expert,
      "aria-pressed": state.filter.has(expert), "aria-label": `expert ${expert}`,
    }, String(expert));
    chip.addEventListener("click", () => {
      if (!state.filter.delete(expert)) state.filter.add(expert);
      chip.setAttribute("aria-pressed", state.filter.has(expert));
      drawTokens();
    });
    return chip;
  });
  by("filter").replaceChildren(...chips);
}

function card(one) {
  const fill = colour(one.expert), list = Object.keys(found.tokens);
  const share = (title, names, shares) => {
    const most = Math.max(...layer().cards.flatMap((c) => c[title]), 1e-9);
    return names.map((name, i) => bar(name, shares[i], most, percent(shares[i]), fill));
  };
  const words = one.words.map((w) => make("span", { class: "word" }, make("code", {}, w.token.trim() ? w.token : w.token.replaceAll(" ", "·")), ` ${number(w.lift)}× (${w.count})`));
  const quotes = one.examples.map((e) => make("p", { class: "quote", title: `${e.domain}, ${percent(e.probability)}` },
    e.before, make("code", {}, e.token), e.after));
  return make("article", { class: "card", style: `--c:${fill}`, "data-expert": one.expert },
    make("h3", {}, `Expert ${one.expert}: ${percent(one.share)} of the choices`),
    make("p", { class: "soft" }, `± ${percent(one.deviation)} (standard deviation over rows of text)${one.dropped ? `; ${percent(one.dropped)} dropped` : ""}`),
    make("h4", {}, "Tokens by lift: how much more often than among all tokens (and how often)"), make("p", {}, ...(words.length ? words : ["none stands out"])),
    make("h4", {}, "In context, where the gate is surest"), ...quotes,
    ...(list.length > 1 ? [make("h4", {}, "Share of each kind of text"), ...share("domains", list, one.domains)] : []),
    make("details", {}, make("summary", {}, "By position and frequency"),
      make("h4", {}, "Share by tokens since the last blank line"), ...share("positions", found.positions, one.positions),
      make("h4", {}, "Share by frequency of the token's type"), ...share("frequencies", found.frequencies, one.frequencies)));
}

function drawCards() {
  const one = layer(), sorted = [...one.cards].sort((a, b) => b.share - a.share);
  const shown = state.all ? sorted : sorted.slice(0, CARDS);
  by("cards").replaceChildren(...shown.map(card));
  by("more").hidden = shown.length === sorted.length;
  by("load").textContent = `Equal shares would be ${percent(1 / one.experts)}; they differ by ${percent(one.load_deviation)} of it ` +
    `(standard deviation over experts). The gate is undecided by ${number(one.entropy)} of ${number(Math.log2(one.experts + one.null_experts))} bits; ` +
    (one.null_experts ? `${percent(one.null_share)} of choices are null experts; ` : "") +
    `${percent(one.dropped)} of choices are dropped. Most used first.`;
}

const VARIABLES = { domain: "Kind of text", token: "Token", previous: "Token before", position: "Position in the document" };

function drawKnowledge() {
  const numbers = found.layers.map((one) => one.layer), plots = [], rows = [];
  for (const [name, title] of Object.entries(VARIABLES)) {
    const known = found.layers.map((one) => one.knowledge[name]);
    if (known.some((one) => !one)) continue;
    const learned = known.map((k, i) => {
      const ends = k.interval ? k.interval.map((end) => end + k.random_mean) : [];
      return [numbers[i], k.bits - k.bias, ...ends];
    });
    const random = known.flatMap((k, i) => k.random.map((value) => [numbers[i], value]));
    plots.push(lines(`${title}, bits`, [
      { name: "the model's gate", points: learned, style: 0, marks: true },
      { name: "random gates", points: random, style: 1, scatter: true },
    ], "layer", { zero: true, ticks: numbers, integers: true }));
    known.forEach((k, i) => rows.push([title, numbers[i], k.bits, k.bias, `${number(k.random_mean)} ± ${number(k.random_sd)}`,
      k.left, k.interval ? `${number(k.interval[0])} to ${number(k.interval[1])}` : "–", k.above ? "above" : "not above"]));
  }
  by("knowledge").replaceChildren(...plots);
  const head = ["", "layer", "bits as counted", "bias", "random gates", "above them", "95 % interval", "the control"];
  by("knowledge-table").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((v, i) => make(i ? "td" : "th", i ? {} : { scope: "row" },
      typeof v === "number" && i > 1 ? number(v) : String(v))))))));
}

function drawRelations() {
  const one = layer(), next = found.layers[state.layer + 1], flows = [];
  if (one.flow) flows.push(heat(`From layer ${one.layer} (rows) to layer ${next.layer} (columns), % of a row`, one.flow, one.shown, one.flow_to,
    (a, b, v) => `Of the tokens of expert ${a}, ${percent(v)} go to expert ${b} next.`,
    { note: `The choice here tells ${number(one.flow_bits)} bits about the next one.` }));
  if (one.together) flows.push(heat("Chosen together, % of a row", one.together, one.shown, one.shown,
    (a, b, v) => a === b ? `Expert ${a} with itself.` : `Of the tokens of expert ${a}, ${percent(v)} go to expert ${b}, too.`));
  by("flows").replaceChildren(...(flows.length ? flows : [make("p", { class: "soft" }, "The last layer has no next one.")]));
  const cosine = (what) => (a, b, v) => `Experts ${a} and ${b}: cosine of their ${what} ${number(v)}.`;
  by("similar").replaceChildren(
    heat("Outputs on the same inputs", one.output_similarity, one.shown, one.shown, cosine("outputs"), { high: 1, digits: 2, note: "" }),
    heat("Rows of the router", one.router_similarity, one.shown, one.shown, cosine("rows of the router"), { high: 1, digits: 2, note: "" }));
  by("pairs").textContent = one.alike.length ? "Most alike: " + one.alike.slice(0, 3).map((p) =>
    `experts ${p.first} and ${p.second} (outputs ${number(p.outputs)}, router ${number(p.routers)})`).join("; ") + "." : "";
}

function drawOnce() {
  if (found.saturation.length) {
    const numbers = found.layers.map((one) => one.layer);
    const series = found.saturation.flatMap((one, i) => {
      const name = one.checkpoint.split("/").pop() + (one.updates === null ? "" : ` (${one.updates} updates)`);
      return [{ name, points: numbers.map((n, j) => [n, one.agreement[j]]), style: i, marks: true },
        { name: "by load alone", points: numbers.map((n, j) => [n, one.chance[j]]), style: i, dotted: true }];
    });
    by("saturated").replaceChildren(lines("The same choices", series, "layer", { zero: true, ticks: numbers, integers: true }));
  }
  if (found.training) {
    const { updates, metrics } = found.training;
    const titles = { load_max: "Load: the fullest expert over the mean", entropy_gating: "Entropy of the gate, nats",
      overflow: "Dropped choices, %", gate_loss: "Balancing loss" };
    by("trained").replaceChildren(...Object.entries(metrics).map(([name, series]) => lines(titles[name],
      Object.entries(series).map(([which, values], i) => ({ name: which === "all" ? "mean" : `layer ${which}`,
        points: values.map((v, j) => [updates[j], v]), style: i, dotted: which === "all" && Object.keys(series).length > 1 })), "update")));
  }
}

function drawLayer() {
  by("layer-name").textContent = `${layer().layer} (${layer().experts} experts)`;
  by("layer").setAttribute("aria-valuetext", `layer ${layer().layer}`);
  for (const place of document.getElementsByClassName("of-layer")) place.textContent = `in layer ${layer().layer}`;
  drawFilter();
  drawTokens();
  drawDetail();
  drawCards();
  drawRelations();
}

by("layer").addEventListener("input", (event) => {
  state.layer = Number(event.target.value);
  state.filter.clear();
  drawLayer();
});
by("which").append(...found.texts.map((one, i) => make("option", { value: i }, one.name)));
by("which").addEventListener("change", (event) => {
  Object.assign(state, { text: Number(event.target.value), token: 0 });
  state.filter.clear();
  drawLayer();
});
by("colour").addEventListener("change", (event) => { state.colour = event.target.value; drawTokens(); });
by("more").addEventListener("click", () => { state.all = true; drawCards(); });
for (const kind of ["pointerover", "click"]) {
  by("tokens").addEventListener(kind, (event) => {
    const span = event.target.closest(".t");
    if (span) choose(Number(span.dataset.i), kind === "click");
  });
}
by("tokens").addEventListener("keydown", (event) => {
  const last = text().tokens.length - 1;
  const to = { ArrowRight: state.token + 1, ArrowLeft: state.token - 1, ArrowDown: state.token + 10,
    ArrowUp: state.token - 10, Home: 0, End: last }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(last, to)), true);
});
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
drawKnowledge();
drawOnce();
drawLayer();
