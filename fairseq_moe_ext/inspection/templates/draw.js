// Elements and pictures. Text is set as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "g", "path", "rect", "text", "circle", "line", "title"].includes(tag);
  const made = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const colour = (expert) => `var(--e${expert % 8})`;
const percent = (share) => share === null ? "–" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const number = (x) => x === null ? "–" : Math.abs(x) >= 100 ? x.toFixed(0) : String(+x.toPrecision(3)).replace("-", "−");

// A name, a bar of a share of `most`, and the share in words.
function bar(name, share, most, words, fill) {
  const width = `${Math.min(100, (100 * (share || 0)) / (most || 1))}%`;
  const inside = make("i", { style: `width:${width};--c:${fill || "var(--s0)"}` });
  return make("div", { class: "row" }, make("span", { class: "of" }, name),
    make("div", { class: "rule" }, inside), make("span", {}, words));
}

// Ticks of an axis: about `count` round numbers from low to high.
function ticks(low, high, count) {
  const raw = (high - low || 1) / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(+at.toPrecision(12));
  return found;
}

// series: {name, points: [[x, y, low, high]...], style: number, dotted, marks}. Null y: a gap.
function lines(title, series, x, options = {}) {
  const [width, height, left, top, bottom] = [340, 210, 44, 10, 34];
  const all = series.flatMap((one) => one.points.filter((p) => p[1] !== null));
  if (!all.length) return make("p", { class: "soft" }, `${title}: no numbers.`);
  const xs = all.map((p) => p[0]);
  const ys = all.flatMap((p) => p.slice(1).filter((v) => v !== null && v !== undefined));
  const lowX = Math.min(...xs), highX = Math.max(...xs);
  let low = Math.min(...ys, options.zero ? 0 : Infinity), high = Math.max(...ys);
  if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
  const atX = (v) => left + 8 + ((v - lowX) / (highX - lowX || 1)) * (width - left - 20) + (highX === lowX ? (width - left) / 2 - 10 : 0);
  const atY = (v) => top + (1 - (v - low) / (high - low)) * (height - top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const tick of ticks(low, high, 4)) {
    svg.append(make("line", { class: "axis", x1: left, x2: width, y1: atY(tick), y2: atY(tick) }));
    svg.append(make("text", { class: "soft", x: left - 5, y: atY(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  const wanted = options.ticks || ticks(lowX, highX, 5);
  for (const tick of wanted) {
    svg.append(make("text", { class: "soft", x: atX(tick), y: height - bottom + 15, "text-anchor": "middle" }, options.integers ? String(tick) : number(tick)));
  }
  svg.append(make("text", { class: "soft", x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, x));
  for (const one of series) {
    const ink = `var(--s${one.style % 4})`;
    let path = "", pen = false;
    for (const [px, py] of one.points) {
      if (py === null) { pen = false; continue; }
      path += `${pen ? "L" : "M"}${atX(px).toFixed(1)} ${atY(py).toFixed(1)}`;
      pen = true;
    }
    const dash = one.dotted ? "2 4" : one.style >= 4 ? "7 3" : "none";
    if (!one.scatter) svg.append(make("path", { d: path, fill: "none", stroke: ink, "stroke-width": 2, "stroke-dasharray": dash }));
    const alone = one.points.filter((p) => p[1] !== null).length === 1;  // no line would show it
    for (const [px, py, lo, hi] of one.marks || one.scatter || alone ? one.points : []) {
      if (py === null) continue;
      if (lo !== undefined && lo !== null) svg.append(make("line", { x1: atX(px), x2: atX(px), y1: atY(lo), y2: atY(hi), stroke: ink, "stroke-width": 1.5 }));
      const said = make("title", {}, `${one.name}, ${x} ${px}: ${number(py)}`);
      svg.append(make("circle", { cx: atX(px), cy: atY(py), r: one.scatter ? 3 : 4, fill: one.scatter ? "none" : ink, stroke: ink }, said));
    }
  }
  const key = make("div", { class: "key" });
  for (const one of series.length > 1 ? series : []) {
    const line = make("svg", { viewBox: "0 0 26 8", style: "width:26px;height:8px;display:inline-block" });
    const dash = one.dotted ? "2 4" : one.style >= 4 ? "7 3" : "none";
    line.append(one.scatter
      ? make("circle", { cx: 13, cy: 4, r: 3, fill: "none", stroke: `var(--s${one.style % 4})` })
      : make("path", { d: "M0 4L26 4", stroke: `var(--s${one.style % 4})`, "stroke-width": 2, "stroke-dasharray": dash }));
    key.append(make("span", {}, line, ` ${one.name}`));
  }
  return make("figure", { class: "plot" }, make("figcaption", {}, title), svg, key);
}

// A matrix as squares; one that is pointed at, or gone to by the arrow keys, is put in words.
function heat(title, matrix, rows, columns, words, options = {}) {
  const size = Math.max(6, Math.min(34, 380 / columns.length));
  const [left, top] = [34, 20];
  const width = left + size * columns.length, height = top + size * rows.length;
  const svg = make("svg", {
    viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", class: "heat",
    "aria-label": `${title}; the arrow keys go through its cells`, style: `max-width:${width * 1.15}px`,
  });
  const values = matrix.flat().filter((v, i) => !(options.noDiagonal && i % (columns.length + 1) === 0));
  const high = options.high || Math.max(...values, 1e-9), low = options.low || 0;
  const every = Math.ceil(16 / size);
  const cells = [];
  const said = make("p", { class: "said", "aria-live": "polite" }, options.note || "");
  let at = 0;
  const say = (i) => {
    at = i;
    const [r, c] = [Math.floor(i / columns.length), i % columns.length];
    said.textContent = words(rows[r], columns[c], matrix[r][c]);
    cells.forEach((cell, j) => cell.setAttribute("stroke", j === i ? "var(--ink)" : "none"));
  };
  rows.forEach((name, r) => {
    if (r % every === 0) svg.append(make("text", { class: "soft", x: left - 5, y: top + size * (r + 0.5) + 4, "text-anchor": "end" }, String(name)));
    columns.forEach((_, c) => {
      const value = matrix[r][c];
      const strength = Math.max(0, Math.min(1, (value - low) / (high - low)));
      const cell = make("rect", {
        x: left + size * c, y: top + size * r, width: size - 1, height: size - 1,
        fill: "var(--heat)", "fill-opacity": (0.05 + 0.95 * strength).toFixed(3), stroke: "none", "stroke-width": 2,
      });
      cell.addEventListener("pointerenter", () => say(r * columns.length + c));
      cell.addEventListener("click", () => say(r * columns.length + c));
      cells.push(cell);
      svg.append(cell);
      if (size >= 24) {
        const shown = options.digits ? value.toFixed(options.digits).replace(/^-(0\.0*)$/, "$1").replace("0.", ".").replace("-", "−") : (100 * value).toFixed(0);
        svg.append(make("text", { x: left + size * (c + 0.5) - 0.5, y: top + size * (r + 0.5) + 4, "text-anchor": "middle", "pointer-events": "none", style: strength > 0.5 ? "fill:var(--onheat)" : "" }, shown));
      }
    });
  });
  columns.forEach((name, c) => {
    if (c % every === 0) svg.append(make("text", { class: "soft", x: left + size * (c + 0.5), y: top - 6, "text-anchor": "middle" }, String(name)));
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns.length, ArrowUp: -columns.length }[event.key];
    if (!step) return;
    event.preventDefault();
    say(Math.max(0, Math.min(cells.length - 1, at + step)));
  });
  return make("figure", { class: "plot" }, make("figcaption", {}, title), svg, said);
}
