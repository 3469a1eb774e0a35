"use strict";
// The arithmetic of the model, one node at a time, in float64: embedding; then per layer gather, linear map, norm and
// activation. Batch norm is part of the linear map. The head is the last layer, and its nodes are the outputs.

/** The float32 numbers of a base64 text. */
function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 4 }, (_, index) => view.getFloat32(4 * index, true));
}

/** x @ weight + bias, with a weight of shape (in, out), as the lecture writes it. */
function linear(x, { weight, bias }) {
  const y = Float64Array.from(bias);
  for (let i = 0; i < x.length; i++) {
    for (let o = 0; o < y.length; o++) y[o] += x[i] * weight[i * y.length + o];
  }
  return y;
}

/** Layer norm over the channels of one node. */
function layerNorm(x, { weight, bias, eps }) {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  return x.map((value, i) => ((value - mean) / Math.sqrt(variance + eps)) * weight[i] + bias[i]);
}

/** The error function: 2 / sqrt(pi) * exp(-x²) * (x + 2 x³ / 3 + 4 x⁵ / 15 + ...), a sum of terms of one sign. */
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const relu = (x) => Math.max(x, 0);
const ACTIVATIONS = {
  tanh: Math.tanh,
  relu,
  gelu: (x) => (x / 2) * (1 + erf(x / Math.SQRT2)),
  silu: (x) => x * sigmoid(x),
  sigmoid,
  none: (x) => x,
};

function logSoftmax(logits) {
  const highest = logits.reduce((a, b) => Math.max(a, b));
  const logSum = Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - highest), 0));
  return logits.map((logit) => logit - highest - logSum);
}

class Model {
  /** json: what `page_html` writes; a tensor is {"float32": base64}. */
  constructor(json) {
    Object.assign(this, JSON.parse(json, (_, value) => (value?.float32 === undefined ? value : decode(value.float32))));
    this.alphabet = Array.from(this.characters); // in the order of the tokens, null for the end
    this.alphabet.splice(this.end, 0, null);
    this.context = this.layers.reduce((product, layer) => product * layer.kernelSize, 1);
    this.spans = [1, ...this.layers.map((layer) => layer.dilation * layer.kernelSize)]; // tokens that a node covers
    const width = this.embedding.length / this.alphabet.length;
    this.tokenNodes = this.alphabet.map((_, token) => {
      const h = this.embedding.slice(token * width, (token + 1) * width);
      return { id: token, h, s: h.map(() => 0) }; // s: the skip sum, which only gated layers read
    });
    this.known = this.layers.map(() => new Map()); // the distinct nodes of each layer
  }

  /** The sequence of a name, given as an array of characters: `context` times the end, then the characters. */
  tokens(characters) {
    return [...Array(this.context).fill(this.end), ...characters.map((c) => this.alphabet.indexOf(c))];
  }

  /** All nodes, row by row: the tokens, each layer, the outputs. Tap j of node p reads node p + j * dilation. */
  pass(tokens) {
    const rows = [tokens.map((token) => this.tokenNodes[token])];
    this.layers.forEach(({ kernelSize, dilation }, index) => {
      const below = rows[index];
      const taps = Array.from({ length: kernelSize }, (_, j) => j * dilation);
      const count = below.length - (kernelSize - 1) * dilation;
      rows.push(Array.from({ length: count }, (_, p) => this.node(index, taps.map((tap) => below[p + tap]))));
    });
    return rows;
  }

  /** The node with these children. Nodes with the same children have one id, and are computed once. */
  node(index, children) {
    const known = this.known[index];
    const key = children.map((child) => child.id).join();
    if (!known.has(key)) known.set(key, { id: known.size, ...this.values(this.layers[index], children) });
    return known.get(key);
  }

  /** The values of a new node: h, which parents read; in a gated layer also s; in the head also log-probabilities. */
  values(layer, children) {
    let x = Float64Array.from(children.flatMap((child) => [...(layer.hidden ? child.s : child.h)]));
    if (layer.hidden) x = linear(x.map(relu), layer.hidden).map(relu); // the head of a gated model
    let y = linear(x, layer);
    if (layer.norm) y = layerNorm(y, layer.norm);
    if (layer === this.layers.at(-1)) return { h: y, logProbs: logSoftmax(y) };
    if (!layer.skip) return { h: y.map(ACTIVATIONS[layer.activation]) };
    const rightmost = children.at(-1);
    const z = y.slice(0, y.length / 2).map((f, i) => Math.tanh(f) * sigmoid(y[y.length / 2 + i]));
    const plus = (a, b) => a.map((value, i) => value + b[i]);
    const h = layer.residual ? plus(linear(z, layer.residual), rightmost.h) : z;
    return { h, s: plus(linear(z, layer.skip), rightmost.s) };
  }

  /** A random name: each token is drawn from the distribution of the output after the tokens before it. */
  sample(longest) {
    const name = [];
    while (name.length < longest) {
      const { logProbs } = this.pass(this.tokens(name)).at(-1).at(-1);
      let left = Math.random();
      let token = logProbs.findIndex((logProb) => (left -= Math.exp(logProb)) < 0);
      if (token < 0 || token === this.end) break; // below 0: the sum was rounded to less than 1
      name.push(this.alphabet[token]);
    }
    return name;
  }

  /** How many of the windows of outputs 0 to `last` have node (row, position) in their tree: its multiplicity. */
  windows(row, position, last) {
    const span = this.spans[row];
    const high = Math.min(Math.floor(position / span), this.context / span - 1);
    const low = Math.max(Math.ceil((position - last) / span), 0);
    return Math.max(high - low + 1, 0);
  }

  /** Nodes that each way computes for outputs 0 to t, and distinct ones; the head's are not counted. */
  counts(rows, t) {
    const layers = this.spans.slice(1, -1).map((span, index) => ({ span, nodes: rows[index + 1] }));
    const total = (count) => layers.reduce((sum, layer) => sum + count(layer), 0);
    const upTo = ({ span }) => t + this.context + 1 - span;
    return {
      loop: (t + 1) * total(({ span }) => this.context / span),
      convolution: total(upTo),
      stream: (t + 1) * layers.length,
      distinct: total((layer) => new Set(layer.nodes.slice(0, upTo(layer))).size),
    };
  }
}
