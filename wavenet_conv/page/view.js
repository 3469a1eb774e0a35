"use strict";
// Draws what model.js computes. `state` says what is shown; `showName` and `render` bring the page in line with it.

const COLUMNS = [36, 64]; // pixels from token to token, at least and at most
const ROW = 68; // pixels from layer to layer
const BARS = 64; // pixels of the highest surprise bar
const STEP = 900; // milliseconds per step of Play
const LONGEST_DRAW = 40; // characters of a name that the model draws
const SHOWN = 100; // characters of the distribution: of a larger vocabulary the likeliest

const model = new Model(document.getElementById("data").textContent);
const { alphabet, context, end, layers, spans } = model;
const TOP = layers.length; // the row of the outputs; row 0 is the tokens, row l is layer l
const state = { mode: "convolution", timer: null }; // and what `showName` and `buildDiagram` set
const find = (id) => document.getElementById(id);

/** A new HTML element, or an SVG element where the tag begins with "svg:". Text never becomes markup. */
function make(tag, attributes = {}, ...children) {
  const [name, space] = tag.split(":").reverse();
  const node = document.createElementNS(`http://www.w3.org/${space ? "2000/svg" : "1999/xhtml"}`, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** How a token is written: the end as ".", characters that one cannot see by their code. */
function glyph(token) {
  const character = alphabet[token];
  if (character === null) return model.characters.includes(".") ? "END" : ".";
  if (character === " ") return "␣";
  if (!/[\p{C}\p{Z}\p{M}]/u.test(character)) return character;
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

const written = (tag, token) => make(tag, glyph(token).length > 2 ? { class: "long" } : {}, glyph(token));
const spoken = (token) => (alphabet[token] === " " ? "space" : glyph(token)); // for a screen reader
const text = (tokens, write) => (tokens.length > 16 ? "… " : "") + tokens.slice(-16).map(write).join(" ");
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const fixed = (number, digits) => number.toFixed(digits).replace("-", "−");
const nodeName = (row, p) => (row === TOP ? `output ${p}` : row ? `node (${row}, ${p})` : `token ${p}`);
const capital = (words) => words[0].toUpperCase() + words.slice(1);

// Where things are: a node is centred over the tokens that it covers, so also over its children.
const x = (row, p) => state.column * (p + spans[row] / 2);
const y = (row) => 36 + (TOP - row) * ROW;
const covered = (row, p) => state.tokens.slice(p, p + spans[row]);
const exists = ([row, p]) => p >= 0 && p < (state.rows[row] ?? []).length;
const taps = (layer) => Array.from({ length: layer?.kernelSize ?? 0 }, (_, tap) => tap * layer.dilation);
const children = (row, p) => taps(layers[row - 1]).map((distance) => [row - 1, p + distance]);
const parents = (row, p) => taps(layers[row]).map((distance) => [row + 1, p - distance]).filter(exists);

/** The nodes of the tree of output t, per row; those that a stream computes for it. */
const treeOf = (t) => spans.map((span, row) => Array.from({ length: context / span }, (_, i) => [row, t + i * span]));
const newestOf = (t) => spans.map((span, row) => [[row, t + context - span]]);

/** A path with a line from a node to each of the others. */
const lines = ([row, p], others) => others.map(([r, q]) => `M${x(row, p)} ${y(row)}L${x(r, q)} ${y(r)}`).join("");
const edges = (nodes) => nodes.flat().map(([row, p]) => lines([row, p], children(row, p))).join("");

/** The token that output t predicts, and its surprise in bits. */
const target = (t) => state.tokens[context + t] ?? end;
const logProbs = (t) => state.rows[TOP][t].logProbs;
const bits = (t) => -logProbs(t)[target(t)] / Math.LN2;

/** "new": this output computes the node; "old": an earlier one did; "kept": a ring buffer keeps it; "rest": none. */
function stateOf(row, p) {
  const { t, mode } = state;
  if (mode === "stream") {
    const newest = t + context - spans[row];
    const ring = row < TOP ? (layers[row].kernelSize - 1) * layers[row].dilation : 0;
    if (p === newest && row > 0) return "new";
    return p < newest && p >= newest - ring ? "kept" : "rest";
  }
  if (row === 0) return "rest"; // nothing is computed for a token
  if (mode === "convolution" && model.windows(row, p, t - 1)) return "old";
  return inTree(row, p) ? "new" : "rest";
}
const inTree = (row, p) => model.windows(row, p, state.t) > model.windows(row, p, state.t - 1);

/** The number in a node: how often the loop has computed it so far, or how many windows share it. */
function numberIn(row, p) {
  if (row === 0 || row === TOP || state.mode === "stream") return "";
  const count = model.windows(row, p, state.mode === "loop" ? state.t : state.name.length);
  return count > 1 || (count && state.mode === "loop") ? `×${count}` : "";
}

/** Pixels from token to token: the diagram fills its place, or scrolls. */
function columnWidth() {
  const fitting = find("scroller").clientWidth / (state.tokens.length + 1);
  return Math.min(Math.max(Math.floor(fitting), COLUMNS[0]), COLUMNS[1]);
}

/** The diagram of a name; afterwards only attributes change. The tree of output t is that of output 0, moved. */
function buildDiagram() {
  state.column = columnWidth();
  const bottom = y(0) + 24;
  const scale = BARS / Math.max(6, ...state.rows[TOP].map((_, t) => bits(t)));
  const nodes = state.rows.flatMap((row, index) => row.map((_, p) => buildNode(index, p)));
  const surprises = state.rows[TOP].map((_, t) => {
    const height = Math.max(1, bits(t) * scale);
    const bar = { x: x(0, context + t) - 8, y: bottom, width: 16, height, rx: 3, class: "surprise" };
    const label = make("svg:text", { x: x(0, context + t), y: bottom + height + 10 }, fixed(bits(t), 1));
    return make("svg:g", {}, make("svg:rect", bar), label);
  });
  const [from, to] = [x(TOP, 0), x(0, context)];
  const arrow = `M${from} ${y(TOP) - 18}Q${from} 8 ${from + 14} 8H${to - 14}Q${to} 8 ${to} 22V${y(0) - 18}`;
  const tree = make("svg:g", { class: "tree", id: "tree" });
  tree.append(
    make("svg:rect", { class: "band", x: 2, y: y(0) - 20, width: state.column * context - 4, height: 40, rx: 9 }),
    make("svg:path", { class: "edges", id: "edges", d: edges(treeOf(0)) }),
    make("svg:path", { class: "edges", id: "newest", d: edges(newestOf(0)) }),
    make("svg:path", { class: "predicts", d: arrow }),
  );
  const links = ["children", "parents"].map((kin) => make("svg:path", { class: `links ${kin}`, id: kin }));
  const place = `translate(${x(0, state.tokens.length)} ${y(0)})`;
  const predictedEnd = make("svg:g", { class: "node token end", transform: place }, ...tokenShape(end));
  const svg = find("diagram");
  svg.setAttribute("width", state.column * (state.tokens.length + 1));
  svg.setAttribute("height", bottom + BARS + 22);
  svg.setAttribute("aria-label", `Nodes of the name ${state.name.join("") || "(empty)"}; move with the arrow keys`);
  svg.replaceChildren(tree, ...links, ...surprises, predictedEnd, ...nodes);
}

const square = { x: -14, y: -14, width: 28, height: 28, rx: 7 };
const tokenShape = (token) => [make("svg:rect", square), written("svg:text", token)];
function buildNode(row, p) {
  const shape = row ? [make("svg:circle", { r: 12 }), make("svg:text")] : tokenShape(state.tokens[p]);
  if (row === TOP) shape[1].append(p);
  const [kind, role] = row === TOP ? ["output", "button"] : [row ? "layer" : "token", "img"];
  const place = { transform: `translate(${x(row, p)} ${y(row)})`, "data-row": row, "data-p": p };
  return make("svg:g", { id: `n-${row}-${p}`, class: `node ${kind}`, role, tabindex: -1, ...place }, ...shape);
}

function renderDiagram() {
  const legend = [...document.querySelectorAll(".legend [data-state]:not([hidden])")];
  for (const node of find("diagram").querySelectorAll(".node[id]")) {
    const [row, p] = placeOf(node);
    const [now, number, tree] = [stateOf(row, p), numberIn(row, p), String(inTree(row, p))];
    if (node.dataset.state !== now || node.dataset.tree !== tree) Object.assign(node.dataset, { state: now, tree });
    const windows = plural(model.windows(row, p, state.name.length), "window");
    const label = [nodeName(row, p), `covers ${text(covered(row, p), spoken)}`, `in ${windows}`];
    if (row || now === "kept") label.push(legend.find((item) => item.dataset.state === now).textContent);
    node.setAttribute("aria-label", label.join(", "));
    if (row && row < TOP && node.lastChild.textContent !== number) node.lastChild.textContent = number;
  }
  document.querySelectorAll(".surprise").forEach((bar, t) => bar.classList.toggle("shown", t === state.t));
  find("tree").style.transform = `translateX(${state.column * state.t}px)`;
  const [left, right] = [state.column * state.t, state.column * (state.t + context + 1)]; // the window and what follows
  const seen = find("scroller").clientWidth;
  find("scroller").scrollLeft = Math.max((left + right - seen) / 2, right - seen);
}

const placeOf = (node) => [Number(node.dataset.row), Number(node.dataset.p)];
const elementOf = ([row, p]) => find(`n-${row}-${p}`);

/** The details of the node under the pointer, or with the focus, or at the top of the tree. */
function renderNode() {
  const pointed = state.hovered ?? state.focused;
  const [row, p] = pointed ?? [TOP - 1, state.t];
  const [below, above] = [children(row, p), parents(row, p)];
  find("children").setAttribute("d", pointed ? lines([row, p], below) : "");
  find("parents").setAttribute("d", pointed ? lines([row, p], above) : "");
  document.querySelectorAll("[data-kin]").forEach((node) => node.removeAttribute("data-kin"));
  for (const [kin, nodes] of Object.entries(pointed ? { self: [[row, p]], child: below, parent: above } : {})) {
    for (const node of nodes) elementOf(node).dataset.kin = kin;
  }
  const names = (nodes) => nodes.map((node) => nodeName(...node)).join(", ");
  const same = state.rows[row].filter((node) => node.id === state.rows[row][p].id).length - 1;
  const sentences = [
    `Covers ${plural(spans[row], "token")}, “${text(covered(row, p), glyph)}”.`,
    row > 0 && `Tap j reads position ${p} + j × ${layers[row - 1].dilation}: ${names(below)}.`,
    row < TOP && `Read by ${names(above) || "no node of this name"}.`,
    row > 0 && same > 0 && `Same children as ${plural(same, "other node")} of its layer, so the same values.`,
  ];
  find("node-title").textContent = capital(nodeName(row, p)) + (pointed ? "" : ", top of the tree");
  find("node-text").textContent = sentences.filter(Boolean).join(" ");
  find("strips").replaceChildren(...[...below.slice(0, 8), [row, p]].map(([r, q]) => strip(r, q)));
}

/** The values of a node as a strip: positive ones in the upper half, negative ones in the lower half. */
function strip(row, p) {
  const { h, s } = state.rows[row][p];
  const values = row && s ? [...h, ...s] : [...h];
  const scale = Math.max(...values.map(Math.abs)) || 1;
  const range = `${fixed(Math.min(...values), 2)} to ${fixed(Math.max(...values), 2)}`;
  const label = `${plural(values.length, "value")} of ${nodeName(row, p)}, ${range}`;
  const cells = values.map((value, i) => {
    const [sign, y] = value > 0 ? ["positive", 0] : ["negative", 1];
    const opacity = (Math.abs(value) / scale).toFixed(3);
    return make("svg:rect", { x: i, y, width: 1, height: 1, class: sign, "fill-opacity": opacity });
  });
  const frame = { viewBox: `0 0 ${values.length} 2`, preserveAspectRatio: "none", role: "img", "aria-label": label };
  const svg = make("svg:svg", frame, ...cells);
  return make("div", {}, make("span", {}, nodeName(row, p), make("small", { class: "muted" }, range)), svg);
}

const SENTENCES = {
  loop: (tree, first) => `computes its whole tree: ${plural(tree, "node")}, ${tree - first} of them computed before.`,
  convolution: (tree, first) =>
    `has ${plural(tree, "node")} in its tree, ${first} of them in no earlier tree. ` +
    "One pass computes each node once, and the windows share it.",
  stream: () => `computes ${plural(TOP - 1, "node")}, one per layer. Ring buffers keep what later outputs read.`,
};

function renderMode() {
  const tree = treeOf(state.t).slice(1, -1).flat();
  const first = tree.filter(([row, p]) => !model.windows(row, p, state.t - 1));
  const sentence = SENTENCES[state.mode](tree.length, first.length);
  find("sentence").textContent = `${capital(state.mode)}: output ${state.t} ${sentence}`;
  document.body.dataset.mode = state.mode;
  for (const item of document.querySelectorAll("[data-modes]")) item.hidden = !item.dataset.modes.includes(state.mode);
}

function renderCounters() {
  const counts = model.counts(state.rows, state.t);
  find("upto").textContent = state.t;
  for (const [key, count] of Object.entries(counts)) {
    find(key).querySelector(".number").textContent = count.toLocaleString("en");
    find(key).querySelector("i").style.width = `${(100 * count) / Math.max(...Object.values(counts))}%`;
    find(key).classList.toggle("chosen", key === state.mode);
  }
}

function buildDistribution() {
  const buttons = alphabet.map((character, token) => {
    const button = make("button", { type: "button" }, make("span", { class: "bar" }, make("i")));
    button.append(written("b", token), make("small"));
    button.addEventListener("click", () => typed([...state.name, character]));
    return button;
  });
  find("next").replaceChildren(...buttons);
}

function renderDistribution() {
  const probs = logProbs(state.t).map(Math.exp);
  const sorted = probs.slice().sort().reverse();
  find("next-title").textContent = `Next character at output ${state.t}, after ${text(covered(TOP, state.t), glyph)}`;
  const room = find("name").maxLength - state.name.join("").length;
  [...find("next").children].forEach((button, token) => {
    button.disabled = token === end || alphabet[token].length > room;
    const percent = 100 * probs[token];
    const actual = token === target(state.t);
    button.hidden = probs[token] < (sorted[SHOWN - 1] ?? 0) && !actual;
    button.classList.toggle("actual", actual);
    button.querySelector("i").style.height = `${(100 * probs[token]) / sorted[0]}%`;
    button.querySelector("small").textContent = percent < 0.1 ? "<0.1" : percent.toFixed(percent < 10 ? 1 : 0);
    const what = token === end ? "end of the name" : `append ${spoken(token)}`;
    button.setAttribute("aria-label", `${what}, ${percent.toFixed(1)} percent${actual ? ", next in the name" : ""}`);
  });
}

/** As `Scorer` computes them: nats, bits per character with the end counted as one, and the percentile. */
function renderScore() {
  const nats = state.rows[TOP].reduce((sum, output, t) => sum + output.logProbs[target(t)], 0);
  const perCharacter = nats / (-Math.LN2 * (state.name.length + 1));
  for (const [id, number] of Object.entries({ nats, bits: perCharacter })) find(id).textContent = fixed(number, 3);
  find("percentile").parentNode.hidden = !model.quantiles;
  if (!model.quantiles) return;
  const fewer = model.quantiles.filter((quantile) => quantile < Math.fround(perCharacter)).length;
  find("percentile").textContent = `${fixed((100 * fewer) / model.quantiles.length, 1)}%`;
}

/** Shows output t in the current mode, after a change of both or one of them. */
function render(change) {
  Object.assign(state, change);
  find("output").value = state.t;
  find("shown").textContent = `${state.t} of ${state.name.length}`;
  const percent = 100 * Math.exp(logProbs(state.t)[target(state.t)]);
  const summary = `output ${find("shown").textContent} gives ${spoken(target(state.t))} ${percent.toFixed(1)} percent`;
  find("output").setAttribute("aria-valuetext", summary);
  renderMode();
  renderDiagram();
  setEntry(state.focused ?? [TOP - 1, state.t]);
  renderNode();
  renderCounters();
  renderDistribution();
  find("live").textContent = `${capital(summary)}, ${bits(state.t).toFixed(1)} bits. ${find("sentence").textContent}`;
}

/** Shows a name, an array of known characters, at its last output. */
function showName(characters) {
  const tokens = model.tokens(characters);
  Object.assign(state, { name: characters, tokens, rows: model.pass(tokens), t: characters.length });
  Object.assign(state, { focused: null, hovered: null });
  find("output").max = state.t;
  find("output").disabled = find("play").disabled = state.t === 0;
  stop();
  buildDiagram();
  renderScore();
  render();
}

/** Shows what was typed; an unknown character leaves the diagram as it is. */
function typed(characters, fromField = false) {
  const position = characters.findIndex((character) => !alphabet.includes(character));
  if (position < 0) showName(characters);
  if (!fromField) find("name").value = characters.join("");
  const known = Array.from(model.characters);
  const list = known.slice(0, SHOWN).join(" ") + (known.length > SHOWN ? ` and ${known.length - SHOWN} more` : "");
  const problem = `The model does not know “${characters[position]}”, character ${position + 1}. It knows: ${list}`;
  find("problem").textContent = position < 0 ? "" : problem;
  find("name").setAttribute("aria-invalid", String(position >= 0));
}

function showOutput(t) {
  if (t === state.name.length) stop();
  render({ t });
}

function stop() {
  clearInterval(state.timer);
  state.timer = null;
  find("play").textContent = "Play";
}

function play() {
  if (state.timer !== null) return stop();
  if (state.t === state.name.length) showOutput(0);
  find("play").textContent = "Pause";
  state.timer = setInterval(() => showOutput(state.t + 1), STEP);
}

/** The Tab key enters the diagram at one node; arrow keys move from there. */
function setEntry(place) {
  document.querySelectorAll('.node[tabindex="0"]').forEach((node) => node.setAttribute("tabindex", -1));
  elementOf(place).setAttribute("tabindex", 0);
}

function moveFocus(event) {
  const node = event.target.closest(".node[id]");
  if (!node) return;
  const [row, p] = placeOf(node);
  const beside = { ArrowLeft: [[row, p - 1]], ArrowRight: [[row, p + 1]] };
  const moves = { ...beside, ArrowUp: parents(row, p), ArrowDown: children(row, p) };
  const [goal] = (moves[event.key] ?? []).filter(exists);
  if (goal) elementOf(goal).focus();
  if (event.key in moves) event.preventDefault();
  if ((event.key === "Enter" || event.key === " ") && row === TOP) go(event);
}

/** Shows the output that was clicked, or the one that predicts the clicked token. */
function go(event) {
  const node = event.target.closest(".node[id]");
  if (!node) return;
  event.preventDefault();
  const [row, p] = placeOf(node);
  const t = row ? p : p - context;
  if ((row === 0 || row === TOP) && t >= 0) showOutput(t);
}

function listen() {
  const events = { pointermove: "hovered", pointerleave: "hovered", focusin: "focused", focusout: "focused" };
  for (const [event, key] of Object.entries(events)) {
    // Not pointerover, which also comes when the keyboard scrolls the diagram under a pointer that rests.
    // Not of the SVG element itself: Chromium makes one that listens to focus a stop of the Tab key.
    find("scroller").addEventListener(event, ({ type, target }) => {
      const node = type === "pointermove" || type === "focusin" ? target.closest(".node[id]") : null;
      const place = node && placeOf(node);
      if (type === "pointermove" && String(place) === String(state.hovered)) return;
      Object.assign(state, key === "focused" && node ? { hovered: null, focused: place } : { [key]: place });
      if (state.focused) setEntry(state.focused);
      renderNode();
    });
  }
  find("scroller").addEventListener("keydown", moveFocus);
  find("scroller").addEventListener("click", go);
  find("name").addEventListener("input", () => typed(Array.from(find("name").value), true));
  find("draw").addEventListener("click", () => typed(model.sample(LONGEST_DRAW)));
  find("play").addEventListener("click", play);
  find("output").addEventListener("input", () => {
    stop();
    showOutput(Number(find("output").value));
  });
  window.addEventListener("resize", () => {
    if (columnWidth() === state.column) return;
    const { focused } = state;
    buildDiagram();
    if (focused) elementOf(focused).focus(); // what had the focus was replaced
    render();
  });
  find("modes").addEventListener("change", (event) => render({ mode: event.target.value }));
}

function start() {
  find("context").textContent = context.toLocaleString("en");
  const [sizes, dilations] = ["kernelSize", "dilation"].map((key) => layers.slice(0, -1).map((layer) => layer[key]));
  find("model").textContent =
    `Kernel sizes ${sizes.join(" · ")}, dilations ${dilations.join(" · ")}, ` +
    `${plural(model.parameters, "parameter")}. Your browser computes everything that you see.`;
  const label = (top, ...words) => make("div", { style: `top: ${top}px` }, ...words);
  const labels = dilations.map((d, l) => label(y(l + 1), `layer ${l + 1}`, make("small", {}, `dilation ${d}`)));
  labels.push(label(y(0) + 48, "surprise", make("small", {}, "in bits")));
  find("rows").append(label(y(TOP), "outputs"), ...labels, label(y(0), "tokens"));
  buildDistribution();
  listen();
  typed(Array.from(model.name));
}

start();
