"use strict";
// The page of a backward pass: the algorithm, the check of what was recorded, and what is
// drawn. Matrices are arrays of rows; W[j][k] goes from neuron k to neuron j; x, z, a, s (σ'),
// grad_a and delta are [example][neuron]. As in the book, delta is ∂C_x/∂z of one example x and
// gradients are means over the examples; what torchbp records carries the 1/n already.

// ---------------------------------------------------------------------------- the algorithm

const range = (n) => Array.from({ length: n }, (_, i) => i);
const sum = (v) => v.reduce((total, value) => total + value, 0);
const dot = (v, w) => v.reduce((total, value, i) => total + value * w[i], 0);
const norm = (v) => Math.sqrt(dot(v, v));
const sizes = (v) => v.map(Math.abs);
const column = (M, k) => M.map((row) => row[k]);
const mean = (M) => M[0].map((_, j) => sum(column(M, j)) / M.length);
const logistic = (z) => 1 / (1 + Math.exp(-z));
const lnLogistic = (z) => Math.min(0, z) - Math.log1p(Math.exp(-Math.abs(z)));
const others = (v, j) => v.filter((_, i) => i !== j);

function softmax(z) {
  const powers = z.map((z_j) => Math.exp(z_j - Math.max(...z)));
  return powers.map((power) => power / sum(powers));
}

// σ, σ' from a, the sizes of the terms of σ', and how both are written.
const SIGMA = {
  sigmoid: { of: logistic, prime: (a) => a * (1 - a), terms: (a) => a * (1 - a), most: 0.25,
    text: (z) => `1 / (1 + e^{${number(-z)}})`, slope: (a) => `${a} (1 − ${a})` },
  tanh: { of: Math.tanh, prime: (a) => 1 - a * a, terms: (a) => 1 + a * a, most: 1,
    text: (z) => `tanh(${number(z)})`, slope: (a) => `1 − (${a})^{2}` },
  relu: { of: (z) => Math.max(0, z), prime: (a) => (a > 0 ? 1 : 0), terms: () => 1, most: 1,
    text: (z) => `max(0, ${number(z)})`, slope: (a) => `[${a} > 0]` },
  identity: { of: (z) => z, prime: () => 1, terms: () => 1, most: 1,
    text: (z) => number(z), slope: () => "1" },
};

// C_x, ∇C_x and the sizes of its terms, of v: a^L, or z^L for a cost that applies the last σ
// itself; then `answer` is a^L.
const COSTS = {
  quadratic: {
    of: (a, y) => sum(a.map((a_j, j) => (y[j] - a_j) ** 2)) / 2,
    nabla: (a, y) => a.map((a_j, j) => a_j - y[j]),
    terms: (a, y) => a.map((a_j, j) => Math.abs(a_j) + Math.abs(y[j])),
    text: "½ Σ_{j} (y_{j} − a_{j})^{2}",
  },
  "cross-entropy": {
    of: (z, y) => -sum(z.map((z_j, j) => (y[j] && y[j] * lnLogistic(z_j))
      + (1 - y[j] && (1 - y[j]) * lnLogistic(-z_j)))),
    nabla: (z, y) => z.map((z_j, j) => (1 - y[j]) * logistic(z_j) - y[j] * logistic(-z_j)),
    terms: (z, y) => z.map((z_j, j) =>
      Math.abs(1 - y[j]) * logistic(z_j) + Math.abs(y[j]) * logistic(-z_j)),
    answer: (z) => z.map(logistic), sigma: "sigmoid",
    text: "−Σ_{j} [y_{j} ln a_{j} + (1 − y_{j}) ln(1 − a_{j})]",
  },
  "log-likelihood": {
    of: (z, y) => sum(softmax(z).map((a_j, j) => y[j] && -y[j] * Math.log(a_j))),
    nabla: (z, y) => softmax(z).map((a_j, j, a) =>
      a_j * (sum(y) - y[j]) - y[j] * sum(others(a, j))),
    terms: (z, y) => softmax(z).map((a_j, j) => (1 + 2 * Math.max(...sizes(z)))
      * (a_j * sum(sizes(y)) + Math.abs(y[j]))),
    answer: softmax, sigma: "softmax",
    text: "−Σ_{j} y_{j} ln a_{j}",
  },
};

// Feedforward, output error, sweep back, gradients.
function backprop({ layers, cost, X, Y }) {
  const empty = () => ({ x: [], z: [], a: [], s: [], grad_a: [], delta: [] });
  const pass = { C: 0, layers: layers.map(empty) };
  X.forEach((x, i) => {
    let a = x;
    layers.forEach(({ W, b, sigma }, l) => {
      const here = pass.layers[l];
      here.x.push(a);
      here.z.push(W.map((row, j) => dot(row, a) + (b ? b[j] : 0)));
      a = here.z[i].map(SIGMA[sigma].of);
      here.a.push(a);
      here.s.push(a.map(SIGMA[sigma].prime));
    });
    pass.C += COSTS[cost].of(a, Y[i]) / X.length; // A1
    let grad_a = COSTS[cost].nabla(a, Y[i]);
    layers.forEach((_, up) => {
      const l = layers.length - 1 - up, here = pass.layers[l];
      const delta = grad_a.map((g, j) => g * here.s[i][j]); // BP1, BP2
      here.grad_a.push(grad_a);
      here.delta.push(delta);
      grad_a = layers[l].W[0].map((_, k) => dot(delta, column(layers[l].W, k))); // BP2
    });
  });
  pass.layers.forEach(addGradients);
  return pass;
}

function addGradients(here) {
  const n = here.x.length;
  here.grad_b = mean(here.delta); // BP3
  here.grad_W = here.grad_b.map((_, j) => {
    const delta = column(here.delta, j);
    return here.x[0].map((_, k) => dot(delta, column(here.x, k)) / n); // BP4
  });
}

function descend({ layers, pass, lr }) {
  layers.forEach(({ W, b, trains }, l) => {
    const { grad_W, grad_b } = pass.layers[l];
    if (trains[0]) W.forEach((row, j) => row.forEach((_, k) => { row[k] -= lr * grad_W[j][k]; }));
    if (trains[1]) b.forEach((_, j) => { b[j] -= lr * grad_b[j]; });
  });
}

// ---------------------------------------------------------------------------- what was recorded

const DATA = JSON.parse(document.getElementById("data").textContent);

function numbers(packed) {
  const { buffer } = Uint8Array.from(atob(packed.f8 ?? packed.f4), (c) => c.charCodeAt(0));
  return Array.from(packed.f8 === undefined ? new Float32Array(buffer) : new Float64Array(buffer));
}

function matrix(packed, factor = 1) {
  if (!packed) return null;
  const all = numbers(packed).map((v) => v * factor), [rows, columns] = packed.shape;
  return range(rows).map((i) => all.slice(i * columns, (i + 1) * columns));
}

function recordedNetwork() {
  const layers = DATA.layers.map((r) => (
    { ...r, W: matrix(r.W), b: r.b && numbers(r.b), label: r.sigma ?? r.kind }));
  const passed = [];
  for (const r of DATA.layers) {
    const n = r.a.shape[0], here = { x: r.x ? matrix(r.x) : passed.at(-1).a, z: matrix(r.z),
      a: matrix(r.a), s: matrix(r.s), delta: matrix(r.delta, n), grad_a: matrix(r.grad_a, n) };
    if (here.delta) addGradients(here);
    passed.push(here);
  }
  const known = layers.every(({ sigma, delta }) => sigma && delta) && DATA.cost;
  return { layers, lr: DATA.lr, n: DATA.n, chain: DATA.chain, cost: DATA.cost,
    labels: DATA.labels, X: passed[0].x, Y: matrix(DATA.Y), recorded: true,
    live: Boolean(known && DATA.chain && DATA.few && !DATA.shared),
    pass: { C: numbers(DATA.C)[0], layers: passed } };
}

// Recompute each recorded number from those that it is made of; return those that are farther
// off than 8 ε Σ|terms|, from the output down, and how many were compared.
function check({ layers, pass, cost, chain, Y }) {
  const misses = [], last = layers.length - 1, ours = chain && COSTS[cost];
  let count = 0;
  const test = (equation, l, name, recorded, exact, terms) => {
    const expected = Math.abs(exact) > DATA.max ? Math.sign(exact) * Infinity : exact;
    const isClose = Math.abs(recorded - expected) <= 8 * DATA.eps * terms + DATA.tiny;
    if (!isClose && !Object.is(recorded, expected)) misses.push({ equation, l, name, recorded, expected });
    count += 1;
  };
  const each = (M, f) => M?.forEach((v, i) => v.forEach((value, j) => f(value, i, j)));
  const at = (symbol, l, i, j) => `${index(symbol, l, j)} of example ${i + 1}`;
  const product = (v, w) => [dot(v, w), dot(sizes(v), sizes(w))];
  if (ours) {
    const v = pass.layers[last].a, size = ours.answer ? Math.max(...v.flat().map(Math.abs)) : 0;
    const terms = mean(v.map((v_i, i) => [ours.of(v_i, Y[i]), sum(ours.terms(v_i, Y[i]))]));
    test("A1", last, "C", pass.C, terms[0], terms[0] + (1 + size) * terms[1]);
  }
  range(layers.length).reverse().forEach((l) => {
    const { W, b, sigma } = layers[l], here = pass.layers[l], above = pass.layers[l + 1];
    const { of, prime, terms } = SIGMA[sigma] ?? { terms: () => 0 };
    each(here.delta, (delta, i, j) => {
      let equation = "BP2", from = [here.grad_a[i][j], Math.abs(here.grad_a[i][j])];
      if (l === last && chain) equation = "BP1";
      if (l === last && ours) from = [ours.nabla, ours.terms].map((f) => f(here.a[i], Y[i])[j]);
      if (l < last && chain) from = product(above.delta[i], column(layers[l + 1].W, j));
      const s = here.s[i][j], size = from[1] * Math.max(Math.abs(s), terms(here.a[i][j]));
      test(equation, l, at("δ", l, i, j), delta, from[0] * s, size);
    });
    each(here.z, (z, i, j) => {
      const [z_j, size] = product([...W[j], b ? b[j] : 0], [...here.x[i], 1]);
      test("feedforward", l, at("z", l, i, j), z, z_j, size);
    });
    if (of) each(here.a, (a, i, j) => {
      test("feedforward", l, at("a", l, i, j), a, of(here.z[i][j]), Math.abs(of(here.z[i][j])));
      test("σ'", l, at("σ'", l, i, j), here.s[i][j], prime(a), terms(a));
    });
    if (here.delta) checkGradients(DATA.layers[l], here, l, test);
  });
  return { misses, count };
}

function checkGradients(r, here, l, test) {
  const terms = { delta: here.delta.map(sizes), x: here.x.map(sizes) }, width = here.x[0].length;
  addGradients(terms);
  for (const [equation, symbol, key] of [["BP3", "∂C/∂b", "grad_b"], ["BP4", "∂C/∂W", "grad_W"]]) {
    const expected = here[key].flat(), size = terms[key].flat();
    const place = (i) => (key === "grad_b" ? [i] : [Math.floor(i / width), i % width]);
    if (r[key]) numbers(r[key]).forEach((recorded, i) =>
      test(equation, l, index(symbol, l, ...place(i)), recorded, expected[i], size[i]));
    if (r[`${key}_norm`]) test(equation, l, `‖${symbol}${high(l + 1)}‖`,
      numbers(r[`${key}_norm`])[0], norm(expected), norm(size));
  }
}

// ---------------------------------------------------------------------------- words, elements

const byId = (id) => document.getElementById(id);
const minus = (text) => text.replaceAll("-", "−");
const high = (n) => String(n).replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).replace("-", "⁻");
const low = (n) => String(n).replace(/\d/g, (d) => "₀₁₂₃₄₅₆₇₈₉"[d]);
const pair = (j, k) => (k === undefined ? `${j + 1}` : `${j + 1}${j > 8 || k > 8 ? "," : ""}${k + 1}`);
const index = (symbol, l, j, k) => `${symbol}${high(l + 1)}${low(pair(j, k))}`;
const term = (symbol, l, j, k) => `${symbol}^{${l + 1}}_{${pair(j, k)}}`;

function number(v) {
  if (!Number.isFinite(v) || v === 0) return minus(String(v));
  if (Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5) return minus(v.toFixed(Math.abs(v) < 10 ? 4 : 2));
  const [digits, exponent] = v.toExponential(3).split("e");
  return `${minus(digits)}·10${high(Number(exponent))}`;
}
const factor = (v) => (v < 0 ? `(${number(v)})` : number(v));
const short = (v) => minus(v === 0 ? "0" : Math.abs(v) >= 0.005 && Math.abs(v) < 1000
  ? v.toFixed(Math.abs(v) < 100 ? 2 : 0) : v.toExponential(0).replace("+", ""));

const SVG = ["svg", "g", "circle", "line", "text", "rect", "polyline"];
function make(tag, attributes = {}, ...children) {
  const e = SVG.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") e.addEventListener(name, value);
    else if (name === "style") Object.assign(e.style, value);
    else e.setAttribute(name, value);
  }
  e.append(...children);
  return e;
}

// "W^{2}_{13}" with its indices raised and lowered; all else stays text.
function formula(text) {
  const pieces = text.split(/(\^\{[^}]*\}(?:_\{[^}]*\})?|_\{[^}]*\})/).map((part) => {
    const found = part.match(/^(?:\^\{([^}]*)\})?(?:_\{([^}]*)\})?$/);
    if (!part || !found) return part;
    const both = [["sup", found[1]], ["sub", found[2]]].filter(([, inner]) => inner !== undefined);
    return make("span", { class: both.length > 1 ? "both" : "one" },
      ...both.map(([tag, inner]) => make(tag, {}, inner)));
  });
  return make("span", { class: "math" }, ...pieces);
}

// ---------------------------------------------------------------------------- lessons, state

function lessonNetwork(parts, X, Y, lr) {
  const layers = parts.map(([W, b], l) => (
    { W, b, sigma: "sigmoid", label: "sigmoid", linked: l > 0, trains: [true, true] }));
  const net = { layers, X, Y, lr, cost: "quadratic", chain: true, live: true, n: X.length };
  return { ...net, pass: backprop(net) };
}
const patterned = (n_out, n_in, l) => [range(n_out).map((j) =>
  range(n_in).map((k) => ((5 * j + 3 * k + 2 * l) % 7 - 2) / 3)), range(n_out).map((j) => (j - 1) / 4)];

const LESSONS = [{
  title: "A saturated neuron",
  make: () => lessonNetwork([[[[2]], [2]]], [[1]], [[0]], 0.15),
  text: "One sigmoid neuron is to turn the input 1 into the answer 0. It starts with weight 2 and "
    + "bias 2 and answers 0.98, as wrong as can be. Does it learn fast, then?",
  steps: [
    ["Look at its error. BP1 multiplies how wrong the answer is, a − y = 0.98, by σ'(z), the slope "
      + "of σ. The neuron is saturated: it sits where σ is flat, and of 0.98 only 0.017 is left.",
    "Show BP1", () => start("quadratic")],
    ["Train it. Each step is η times the error times the input, so a hundred steps change the "
      + "answer little, although it is still wrong.",
    "100 steps, quadratic cost", () => start("quadratic", 100)],
    ["The same start with the cross-entropy cost. Its ∂C/∂a is (a − y) / (a (1 − a)), and a (1 − a) "
      + "is σ': in BP1 the two cancel, and the error is a − y = 0.98 itself.",
    "Show BP1 with cross-entropy", () => start("cross-entropy")],
    ["Train again. Now the neuron learns fastest when it is most wrong. Compare the two curves.",
      "100 steps, cross-entropy", () => start("cross-entropy", 100)],
  ],
}, {
  title: "Vanishing gradients",
  make: () => lessonNetwork([[3, 2], [3, 3], [3, 3], [3, 3], [1, 3]].map(([n_out, n_in], l) =>
    patterned(n_out, n_in, l)), [[0.9, 0.4]], [[0]], 1),
  text: "Five layers of sigmoid neurons. The output has an error; the layers before it learn from "
    + "what BP2 passes back to them.",
  steps: [
    ["Go back layer by layer. Each time, the error is multiplied by weights of about 1 and by σ', "
      + "which is never above ¼. The colours have one scale for all layers: see them fade.",
    "Show BP2 at layer 1", () => goTo("bp2", 0)],
    ["Read the table: each layer's ‖δ‖ is a fraction of that of the layer above.",
      "Show the table", () => { goTo("bp4", 0); byId("layers").focus(); }],
    ["Train. The last layer's weights move, the first layer's hardly do: compare the column "
      + "η‖∂C/∂W‖ / ‖W‖.", "100 steps", () => train(100)],
  ],
}, {
  title: "A dead input",
  make: () => lessonNetwork([[[[0.8, -0.6], [-0.5, 0.9]], [0.1, -0.2]], [[[1.2, -0.9]], [0.3]]],
    [[0.7, 0]], [[0]], 1),
  text: "Two inputs, and the second is 0, as are most pixels at the edge of a picture.",
  steps: [
    ["BP4: a weight's gradient is the error where it ends times the activation where it starts. "
      + "Input 2 is 0, so its two weights have gradient 0, however large the errors are.",
    "Show BP4 at layer 1", () => goTo("bp4", 0, 0, 1)],
    ["Train. The two weights stay as they were, to the last digit.",
      "100 steps", () => { train(100); goTo("bp4", 0, 0, 1); }],
    ["Switch the input on. Now its weights have gradients, and learn.", "Set input 2 to 0.8",
      () => { state.net.X[0][1] = 0.8; changed(); goTo("bp4", 0, 0, 1); }],
  ],
}];

// What is looked at: a lesson (-1: what was recorded), a step, an example or "mean", neuron j of
// layer l (l < 0: input j of layer -1 - l), and the k of a weight into it. The first of `runs`
// is the training that goes on.
const state = { lesson: -1, net: null, steps: [], step: 0, example: 0, l: 0, j: 0, k: null, runs: [] };

function open(lesson) {
  state.runs = [];
  Object.assign(state, { lesson, step: 0, example: 0, l: 0, j: 0, k: null });
  reset();
  goToStep(0);
}

function reset() {
  state.net = state.lesson < 0 ? recordedNetwork() : LESSONS[state.lesson].make();
  state.steps = makeSteps();
  newRun();
  controls();
  paint();
}

function newRun() {
  const { cost, lr, pass } = state.net, earlier = state.runs.filter(({ C }) => C.length > 1);
  state.runs = [{ label: `${cost}, η ${lr}`, C: [pass.C] }, ...earlier].slice(0, 4);
}

function changed() {
  state.net.recorded = false;
  state.net.pass = backprop(state.net);
  newRun();
  paint();
}

function train(steps) {
  const { net, runs } = state;
  net.recorded = false;
  for (let i = 0; i < steps && Number.isFinite(net.pass.C); i++) {
    descend(net);
    net.pass = backprop(net);
    runs[0].C.push(net.pass.C);
  }
  knobs();
  paint();
}

function useCost(cost) {
  state.net.cost = cost;
  state.net.layers.at(-1).sigma = COSTS[cost].answer ? "identity" : "sigmoid";
  state.steps = makeSteps();
  changed();
  controls();
}

function start(cost, steps = 0) {
  reset();
  useCost(cost);
  goTo("bp1", output());
  if (steps) train(steps);
}

const output = () => state.net.layers.length - 1;
const step = () => state.steps[state.step];
const costOf = (l) => (l === output() && state.net.chain ? COSTS[state.net.cost] : undefined);
const sigmaOf = (l) => SIGMA[costOf(l)?.sigma ?? state.net.layers[l].sigma];
const steepest = (l) => sigmaOf(l)?.most ?? state.net.layers[l].max_slope ?? 1;
const isSaturated = (l, s) => Math.abs(s) < 0.05 * steepest(l);
const isMean = (l) => state.net.n > 1
  && (state.example === "mean" || state.net.pass.layers[l].a.length !== state.net.n);
const chosen = (M, l) => (isMean(l) ? mean(M) : M[state.example]);
const target = () => (state.example === "mean" ? mean(state.net.Y) : state.net.Y[state.example]);

// A quantity of layer l, of the chosen example or its mean over all; null if it was not recorded.
function seen(l, name) {
  const here = state.net.pass.layers[l], answer = costOf(l)?.answer;
  if (answer && name === "a") return chosen(here.a.map(answer), l);
  if (answer && name === "s") {
    return chosen(here.a.map((v) => answer(v).map(sigmaOf(l)?.prime ?? (() => 1))), l);
  }
  return here[name] && chosen(here[name], l);
}

// The neurons of layer l, or its inputs, by the sizes of their errors or else activations.
function important(l, isInput = false) {
  const { x, a, delta } = state.net.pass.layers[l], v = mean((isInput ? x : delta ?? a).map(sizes));
  return range(v.length).sort((i, j) => v[j] - v[i] || i - j);
}

function select(l, j, k = null) {
  Object.assign(state, { l, j, k });
  if (l >= 0 && k === null && ["bp4", "update"].includes(step().kind)) {
    const x = sizes(seen(l, "x"));
    state.k = x.indexOf(Math.max(...x));
  }
  knobs();
  paint();
}

function goToStep(i) {
  state.step = Math.max(0, Math.min(state.steps.length - 1, i));
  const { kind, l } = step(), stays = state.l === l || kind === "update";
  select(stays ? state.l : l, stays ? state.j : important(l)[0], stays ? state.k : null);
}

function goTo(kind, l, j, k) {
  goToStep(stepOf(kind, l));
  if (j !== undefined) select(l, j, k);
}

// ---------------------------------------------------------------------------- the steps

const PHASES = { forward: "Forward", cost: "Forward", bp1: "Backward", bp2: "Backward",
  bp3: "Gradients", bp4: "Gradients", update: "Update" };
const TEXTS = {
  forward: "Each neuron adds up what arrives, weighted, and its bias: that is its weighted input z. "
    + "σ makes its activation a of it.",
  cost: "How wrong the answers are, as one number: the mean over the examples of what each of them "
    + "costs. Learning means to bring it down.",
  bp1: "The error δ says how fast the cost changes with z: how fast it changes with the activation, "
    + "times the slope of σ there. Where σ is flat, the neuron is saturated: its error is small "
    + "however wrong its answer is.",
  cancels: "The error δ says how fast the cost changes with z. With this cost σ' cancels: the error "
    + "is how wrong the answer is, and a saturated neuron learns fast if it is wrong.",
  bp2: "The error goes back along the same weights, from right to left: each neuron adds up the "
    + "errors of the neurons that it feeds, weighted, and multiplies the sum by its own σ'.",
  half: "∂C/∂a arrived from above, through whatever lies there; the layer multiplies it by σ'.",
  bp3: "The error is the gradient by the bias. Over a mini-batch it is the mean of the examples'.",
  bp4: "The error where the weight ends times the activation where it starts. A weight from a "
    + "neuron that is off, or into one without an error, learns nothing.",
  update: "Every weight and bias moves a little against its gradient, all at the same time.",
};

function makeSteps() {
  const { layers, chain, cost, pass } = state.net, last = layers.length - 1, steps = [];
  const add = (kind, l, title, equation, text = TEXTS[kind]) =>
    steps.push({ kind, l, title, equation, text });
  const ours = chain && COSTS[cost], n = (l) => `^{${l + 1}}`;
  const into = (l) => (layers[l].linked || l === 0 ? `a^{${l}}` : `x^{${l + 1}}`);
  const back = range(last + 1).reverse().filter((l) => pass.layers[l].delta);
  layers.forEach((_, l) => add("forward", l, `Feedforward: layer ${l + 1}`,
    `z${n(l)} = W${n(l)} ${into(l)} + b${n(l)},  a${n(l)} = σ(z${n(l)})`));
  add("cost", last, "The cost", `C = 1/n Σ_{x} C_{x},  C_{x} = ${ours?.text ?? DATA.cost_name}`);
  for (const l of back) {
    const gate = ` ⊙ σ'(z${n(l)})`, cancels = l === last && ours?.answer;
    if (cancels) add("bp1", l, "BP1: the error of the output", `δ${n(l)} = a${n(l)} − y`, TEXTS.cancels);
    else if (l === last && chain) add("bp1", l, "BP1: the error of the output", `δ${n(l)} = ∇_{a} C${gate}`);
    else if (chain) add("bp2", l, `BP2: the error of layer ${l + 1}`,
      `δ${n(l)} = ((W${n(l + 1)})ᵀ δ${n(l + 1)})${gate}`);
    else add("bp2", l, `BP2: the error of layer ${l + 1}`, `δ${n(l)} = ∂C/∂a${n(l)}${gate}`, TEXTS.half);
  }
  for (const l of back.filter((each) => layers[each].b)) {
    add("bp3", l, `BP3: the gradient by the biases of layer ${l + 1}`, `∂C/∂b${n(l)} = δ${n(l)}`);
  }
  for (const l of back) add("bp4", l, `BP4: the gradient by the weights of layer ${l + 1}`,
    `∂C/∂W${n(l)} = δ${n(l)} (${into(l)})ᵀ`);
  add("update", last, "The update", "W ← W − η ∂C/∂W,  b ← b − η ∂C/∂b");
  return steps;
}

const stepOf = (kind, l) => state.steps.findIndex((each) =>
  each.kind === kind && (each.l === l || kind === "update"));
const isReached = (kind, l) => stepOf(kind, l) >= 0 && stepOf(kind, l) <= state.step;

// ---------------------------------------------------------------------------- written out

// The lines about the chosen neuron and weight that the steps so far have reached: left-hand
// side, and what it equals.
function story() {
  const { net, l, j, k } = state, lines = [];
  if (l < 0) return [{ left: `x_{${j + 1}}`, right: [number(seen(-1 - l, "x")[j])] }];
  const { layers, pass, chain } = net, { W, b } = layers[l], ours = costOf(l), many = isMean(l);
  const [x, z, a, s, grad_a, delta] = ["x", "z", "a", "s", "grad_a", "delta"].map((q) => seen(l, q));
  // `put` is the equation with numbers, which holds for one example and not for means.
  const line = (kind, left, text, put, value) => isReached(kind, l) && lines.push({ left,
    now: stepOf(kind, l) === state.step,
    right: [text, many && put ? "mean over the examples" : put, value].filter(Boolean) });
  const own = (symbol) => term(symbol, l, j), sigma = sigmaOf(l), y = net.Y && target()[j];
  const from = (i) => (layers[l].linked || l === 0 ? `a^{${l}}_{${i}}` : `x^{${l + 1}}_{${i}}`);
  const error = chain && l === output() ? "bp1" : "bp2";
  line("forward", own("z"), `Σ_{k} W^{${l + 1}}_{${j + 1}k} ${from("k")}${b ? ` + ${own("b")}` : ""}`,
    added(W[j], x, b?.[j]), number(z[j]));
  line("forward", own("a"), ours?.sigma === "softmax" ? "softmax" : `σ(${own("z")})`,
    sigma?.text(z[j]), number(a[j]));
  if (ours) line("cost", "C_{x}", ours.text, "", many ? "" : number(
    ours.of(pass.layers[l].a[state.example], net.Y[state.example])));
  if (l === output()) line("cost", "C", "1/n Σ_{x} C_{x}", "", number(pass.C));
  const wrong = [`${own("a")} − y_{${j + 1}}`, `${number(a[j])} − ${factor(y)}`];
  if (delta && ours?.answer) {
    line(error, own("δ"), ...wrong, number(delta[j]));
    if (sigma) line(error, `σ'(${own("z")})`, "", "", `${number(s[j])}, but it is not in δ`);
  } else if (delta) {
    const above = chain && l < output() ? column(layers[l + 1].W, j) : null;
    const text = ours ? wrong : !above ? ["", ""]
      : [`Σ_{i} W^{${l + 2}}_{i${j + 1}} δ^{${l + 2}}_{i}`, added(above, seen(l + 1, "delta"))];
    line(error, `∂C/∂${own("a")}`, ...text, number(grad_a[j]));
    line(error, `σ'(${own("z")})`, sigma?.slope(own("a")), sigma?.slope(number(a[j])), number(s[j]));
    line(error, own("δ"), `∂C/∂${own("a")} · σ'(${own("z")})`,
      `${number(grad_a[j])} · ${factor(s[j])}`, number(delta[j]));
  }
  if (!delta) return lines;
  const { grad_b, grad_W } = pass.layers[l], over = net.n > 1 ? "1/n Σ_{x} " : "";
  const update = (symbol, value, gradient, moves) => line("update", symbol, moves
    ? `${symbol} − η ∂C/∂${symbol}` : "frozen", moves && !many ? `${number(value)} − ${number(net.lr)}`
      + ` · ${factor(gradient)}` : "", number(moves ? value - net.lr * gradient : value));
  if (b) line("bp3", `∂C/∂${own("b")}`, `${over}${own("δ")}`, "", number(grad_b[j]));
  if (k !== null) {
    const w = term("W", l, j, k), product = `${own("δ")} ${from(k + 1)}`;
    if (!many) line("bp4", net.n > 1 ? `∂C_{x}/∂${w}` : `∂C/∂${w}`, product,
      `${number(delta[j])} · ${factor(x[k])}`, number(delta[j] * x[k]));
    if (net.n > 1) line("bp4", `∂C/∂${w}`, `${over}${product}`, "", number(grad_W[j][k]));
    update(w, W[j][k], grad_W[j][k], layers[l].trains[0]);
  }
  if (b) update(own("b"), b[j], grad_b[j], layers[l].trains[1]);
  return lines;
}

// w_1·x_1 + ... + b with numbers: the six largest terms, and the sum of the rest.
function added(w, x, b) {
  const order = range(w.length).sort((i, j) => Math.abs(w[j] * x[j]) - Math.abs(w[i] * x[i]));
  const parts = order.slice(0, 6).sort((i, j) => i - j).map((i) => `${factor(w[i])}·${factor(x[i])}`);
  const rest = order.slice(6);
  if (rest.length) parts.push(`${factor(dot(rest.map((i) => w[i]), rest.map((i) => x[i])))} (`
    + `${rest.length} others)`);
  return parts.concat(b === undefined ? [] : factor(b)).join(" + ");
}

// ---------------------------------------------------------------------------- the network

const MOST = 10; // neurons shown of a layer

// The columns to draw: up to eight around the step's layer; of a wide layer its most important
// neurons and the chosen one; a square input as a picture.
function columns() {
  const all = state.net.layers.flatMap(({ linked, W }, l) => [
    ...(linked ? [] : [{ l, isInput: true, size: W[0].length, own: -1 - l }]),
    { l, isInput: false, size: W.length, own: l }]);
  const at = all.findIndex((c) => c.own === step().l), first = Math.max(0, Math.min(at - 4, all.length - 8));
  return all.slice(first, first + 8).map((c) => {
    const side = Math.sqrt(c.size), isPicture = c.own === -1 && side >= 8 && Number.isInteger(side);
    if (isPicture) return { ...c, side, shown: range(c.size) };
    const must = [state.l === c.own ? state.j : null, sourceOf(state.l) === c.own ? state.k : null];
    const ranked = [...new Set([...must.filter((j) => j !== null), ...important(c.l, c.isInput)])];
    return { ...c, shown: ranked.slice(0, MOST).sort((i, j) => i - j) };
  });
}
const sourceOf = (l) => (l < 0 ? null : state.net.layers[l].linked ? l - 1 : -1 - l);

// What the neurons of a column show at this step, and whether the step is about them.
function shows(c) {
  const { kind, l } = step(), { linked } = state.net.layers[l], feeds = c.own === sourceOf(l);
  if (c.isInput) return { name: "x", symbol: c.l ? `x${high(c.l + 1)}` : "x", isActive: feeds && ["forward", "bp4"].includes(kind) };
  const a = { name: "a", symbol: `a${high(c.l + 1)}` };
  if (kind === "forward") return c.l > l ? {} : { ...a, isActive: c.l === l || feeds };
  if (kind === "cost" || (kind === "bp4" && feeds)) return { ...a, isActive: feeds === (kind === "bp4") };
  if (!isReached("bp1", c.l) && !isReached("bp2", c.l)) return a;
  if (kind === "bp3" && c.l === l) return { name: "grad_b", symbol: `∂C/∂b${high(l + 1)}`, isActive: true };
  return { name: "delta", symbol: `δ${high(c.l + 1)}`, isActive: c.l === l || (kind === "bp2" && c.l === l + 1) };
}
const shownValues = ({ l }, name) => (name === "grad_b" ? state.net.pass.layers[l].grad_b : seen(l, name));

// The number on each line into layer l, and whether the step is about it.
function edgesOf(l) {
  const { kind, l: at } = step(), { net } = state, { W, trains } = net.layers[l];
  const { grad_W } = net.pass.layers[l], delta = seen(l, "delta"), x = seen(l, "x");
  if (kind === "update" && grad_W) return { isActive: true, of: (j, k) => (trains[0] ? -net.lr * grad_W[j][k] : 0) };
  if (kind === "bp4" && l === at) return { isActive: true, of: (j, k) => (isMean(l) ? grad_W[j][k] : delta[j] * x[k]) };
  const isActive = (kind === "forward" && l === at) || (kind === "bp2" && l === at + 1 && net.chain);
  return { isActive, of: (j, k) => W[j][k] };
}

function drawNetwork() {
  const width = Math.max(300, byId("network").clientWidth), r = width > 560 ? 21 : 16, all = columns();
  const picture = all[0].side ? Math.min(190, width * 0.36) : 0, space = 2.7 * r;
  const height = Math.max(picture, space * Math.max(...all.map((c) => (c.side ? 1 : c.shown.length)))) + 60;
  const first = picture ? picture / 2 + 4 : r + 14, gap = (width - first - r - 46) / Math.max(1, all.length - 1);
  const lines = make("g", { "aria-hidden": "true" }), parts = [];
  const largest = largestValues();
  all.forEach((c, i) => {
    Object.assign(c, { r, X: first + i * gap, half: c.side ? picture / 2 : r, middle: 50 + (height - 60) / 2 });
    c.Y = c.shown.map((_, row) => c.middle + (row - (c.shown.length - 1) / 2) * space);
    if (i && !c.isInput) lines.append(...drawEdges(all[i - 1], c));
    if (i && c.isInput) parts.push(make("text", { x: c.X - gap / 2, y: c.middle, class: "head" }, "⋯"));
    parts.push(c.side ? drawPicture(c, largest) : drawColumn(c, largest));
  });
  const focused = document.activeElement?.dataset?.at;
  byId("network").replaceChildren(make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": "Layers, from the input to the output" }, lines, ...parts));
  if (focused) document.querySelector(`[data-at="${focused}"]`)?.focus();
  byId("others").replaceChildren(...all.filter((c) => c.size > c.shown.length).map((c) => {
    const ranked = important(c.l, c.isInput), list = make("select", { change: () => select(c.own, Number(list.value)) },
      make("option", {}, `${c.shown.length} of ${c.size} shown`), ...ranked.map((j) => make("option", { value: j }, j + 1)));
    return make("label", {}, `${c.isInput ? "Inputs" : `Layer ${c.l + 1}`}, most important first `, list, " ");
  }));
}

function largestValues() {
  const of = (name) => state.net.layers.flatMap((_, l) => sizes(shownValues({ l }, name) ?? []).filter(Number.isFinite));
  return Object.fromEntries(["x", "a", "delta", "grad_b"].map((name) => [name, Math.max(name === "a" ? 1 : 1e-300, ...of(name))]));
}

function drawEdges(from, to) {
  if (from.side) return to.Y.map((y) => make("line", { x1: from.X + from.half, y1: from.middle, x2: to.X - to.r, y2: y, class: "bundle" }));
  const { of, isActive } = edgesOf(to.l), isGradient = ["bp4", "update"].includes(step().kind) && isActive;
  const scale = isGradient ? gradientScale() : Math.max(...state.net.layers[to.l].W.flat().map(Math.abs));
  return to.shown.flatMap((j, row) => from.shown.flatMap((k, i) => {
    const place = { x1: from.X + from.r, y1: from.Y[i], x2: to.X - to.r, y2: to.Y[row] }, v = of(j, k);
    const isMine = state.l === to.l && state.j === j, isChosen = isMine && state.k === k;
    const kind = [v < 0 ? "neg" : "pos", isActive && "active", isMine && "mine", isChosen && "chosen"];
    return [make("line", { ...place, class: `edge ${kind.filter(Boolean).join(" ")}`, "data-edge": `${to.l},${j},${k}`,
      style: { strokeWidth: v ? `${0.7 + (5 * Math.abs(v)) / scale}px` : "0px" } }),
    make("line", { ...place, class: "hit", click: () => select(to.l, j, k) })];
  }));
}

const gradientScale = () => (step().kind === "update" ? state.net.lr : 1) * Math.max(1e-300,
  ...state.net.pass.layers.flatMap(({ grad_W }) => sizes((grad_W ?? []).flat())));

function drawColumn(c, largest) {
  const { name, symbol = "", isActive } = shows(c), { label, name: called } = state.net.layers[c.l];
  const values = name ? shownValues(c, name) : null, s = c.isInput ? null : seen(c.l, "s");
  const y = c.own === output() && state.net.Y ? target() : null, isError = ["delta", "grad_b"].includes(name);
  const stop = state.l === c.own && c.shown.includes(state.j) ? state.j : c.shown[0];
  const nodes = c.shown.map((j, row) => {
    const v = values?.[j], place = { cx: c.X, cy: c.Y[row] }, saturated = s && values && isSaturated(c.l, s[j]);
    const kind = [isActive && "active", state.l === c.own && state.j === j && "chosen", saturated && "saturated",
      sourceOf(state.l) === c.own && state.k === j && "from"].filter(Boolean).join(" ");
    const words = [`${c.isInput ? "input" : "neuron"} ${j + 1}`, v === undefined ? "" : `${symbol} ${number(v)}`,
      saturated ? "saturated" : "", y ? `wanted ${number(y[j])}` : ""].filter(Boolean).join(", ");
    return make("g", { role: "option", class: `neuron ${kind}`, "data-at": `${c.own},${j}`, tabindex: j === stop ? 0 : -1,
      "aria-selected": String(state.l === c.own && state.j === j), "aria-label": words, click: () => select(c.own, j),
      keydown: (event) => move(event, { ArrowUp: c.shown[row - 1], ArrowDown: c.shown[row + 1] }, (to) => select(c.own, to), c.own) },
    make("circle", { ...place, r: c.r + 3, class: "rim" }),
    make("circle", { ...place, r: c.r + 3, class: "ring", pathLength: 1, transform: `rotate(-90 ${c.X} ${c.Y[row]})`,
      style: { strokeDasharray: `${s && values ? Math.min(1, Math.abs(s[j]) / steepest(c.l)) : 0} 1` } }),
    make("circle", { ...place, r: c.r, class: `body ${isError || v < 0 ? (v < 0 ? "neg" : "pos") : "act"}`,
      style: { fillOpacity: v === undefined ? 0 : (0.6 * Math.abs(v)) / largest[name] } }),
    make("text", { x: c.X, y: c.Y[row] + 4, class: "value" }, v === undefined ? "" : short(v)),
    make("text", { x: c.X - c.r - 5, y: c.Y[row] - c.r + 5, class: "index" }, String(j + 1)),
    make("text", { x: c.X + c.r + 7, y: c.Y[row] + 4, class: "note" }, y ? `y ${short(y[j])}` : ""));
  });
  const heading = c.isInput ? "input" : `layer ${c.l + 1}`;
  return make("g", { role: "listbox", "aria-label": `${heading}${c.isInput ? "" : `, ${label}`}${called ? `, ${called}` : ""}` },
    make("text", { x: c.X, y: 16, class: "head" }, heading), make("text", { x: c.X, y: 33, class: "symbol" }, symbol), ...nodes);
}

function drawPicture(c, largest) {
  const x = seen(c.l, "x"), cell = (2 * c.half) / c.side, left = c.X - c.half, top = c.middle - c.half;
  const box = (k) => ({ x: left + (k % c.side) * cell, y: top + Math.floor(k / c.side) * cell, width: cell, height: cell });
  const choose = (k) => select(c.l, state.l === c.l ? state.j : important(c.l)[0], k);
  const at = state.l === c.l && state.k !== null ? state.k : Math.floor(c.size / 2);
  const pixels = x.map((v, k) => make("rect", { ...box(k), class: v < 0 ? "pixel neg" : "pixel", style: { fillOpacity: Math.abs(v) / largest.x },
    click: () => choose(k) }));
  const label = `pixel ${at + 1}, row ${Math.floor(at / c.side) + 1}, column ${(at % c.side) + 1}: ${number(x[at])}`;
  const cursor = make("g", { role: "option", tabindex: 0, "data-at": c.own, "aria-selected": String(state.k === at), "aria-label": label,
    keydown: (event) => move(event, { ArrowUp: at - c.side, ArrowDown: at + c.side, ArrowLeft: at - 1, ArrowRight: at + 1, Enter: at }, choose) },
  make("rect", { ...box(at), class: "cursor" }));
  return make("g", { role: "listbox", "aria-label": `input, a picture of ${c.side} × ${c.side} pixels` },
    make("text", { x: c.X, y: top - 10, class: "head" }, "input"), make("g", { "aria-hidden": "true" }, ...pixels), cursor);
}

// Arrow keys within a layer: `places` are the neurons that they lead to.
function move(event, places, choose, own) {
  const to = places[event.key];
  if (!(event.key in places)) return;
  event.preventDefault();
  event.stopPropagation();
  if (!(to >= 0)) return;
  choose(to);
  if (own !== undefined) document.querySelector(`[data-at="${own},${to}"]`)?.focus();
}

// ---------------------------------------------------------------------------- beside and below

function paint() {
  const { title, equation, text, kind } = step(), { net, l, j, k, example } = state, n = state.step;
  drawNetwork();
  byId("phase").textContent = `${PHASES[kind]} · step ${n + 1} of ${state.steps.length}`;
  byId("phase").className = PHASES[kind].toLowerCase();
  byId("title").textContent = title;
  byId("equation").replaceChildren(formula(equation));
  byId("explanation").textContent = text;
  Object.assign(byId("slider"), { max: state.steps.length, value: n + 1 });
  byId("slider").setAttribute("aria-valuetext", title);
  [byId("back").disabled, byId("next").disabled] = [n === 0, n === state.steps.length - 1];
  byId("lines").textContent = { bp4: "the gradients ∂C/∂W", update: "what the step adds, −η ∂C/∂W" }[kind] ?? "the weights";
  byId("checked").textContent = state.lesson >= 0 ? "A lesson: the page computes all numbers."
    : net.recorded ? checked : "Changed: the page computes all numbers; none is recorded.";
  const weight = l >= 0 && k !== null ? `, and its weight from ${sourceOf(l) < 0 ? "input" : "neuron"} ${k + 1}` : "";
  byId("choice").textContent = `${l < 0 ? `Input ${j + 1}` : `Neuron ${j + 1} of layer ${l + 1}`}${weight}, `
    + (net.n === 1 ? "of the one example" : example === "mean" ? `mean over ${net.n} examples` : `of example ${example + 1}`);
  byId("written").replaceChildren(...story().map(({ now, left, right }) => make("p", { class: now ? "line now" : "line" },
    formula(left), ...right.map((part, i) => make("span", { class: i && i === right.length - 1 ? "result" : "" }, " = ", formula(part))))));
  byId("curve-of-sigma").replaceChildren(...(l >= 0 && sigmaOf(l) ? sigmaCurve(l, seen(l, "z")[j]) : []));
  paintTable();
  paintCosts();
}

function sigmaCurve(l, z) {
  const { of, prime, most } = sigmaOf(l), span = Math.max(6, 1.2 * Math.abs(z) || 0), [w, h] = [220, 100];
  const grid = range(81).map((i) => span * (i / 40 - 1)), [low, high] = [Math.min(...grid.map(of)), Math.max(...grid.map(of))];
  const X = (v) => (w * (v + span)) / (2 * span), Y = (v) => h - 8 - ((h - 16) * (v - low)) / (high - low);
  const slope = prime(of(z)), reach = Math.min(span / 3, (high - low) / (3 * slope));
  const label = `σ at z = ${number(z)}: slope σ' = ${number(slope)}${Math.abs(slope) < 0.05 * most ? ", saturated" : ""}`;
  return [make("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": label },
    make("line", { x1: w / 2, y1: 0, x2: w / 2, y2: h, class: "axis" }),
    make("polyline", { points: grid.map((v) => `${X(v)},${Y(of(v))}`).join(" "), class: "sigma" }),
    make("line", { x1: X(z - reach), y1: Y(of(z) - reach * slope), x2: X(z + reach), y2: Y(of(z) + reach * slope), class: "tangent" }),
    make("circle", { cx: X(z), cy: Y(of(z)), r: 4, class: "point" })), make("figcaption", {}, label)];
}

function paintTable() {
  const { net } = state, lengths = net.pass.layers.map(({ grad_W }, l) => [seen(l, "delta"), grad_W?.flat()].map((v) => v && norm(v)));
  const cell = (text, share) => make("td", {}, ...(share === undefined ? [] : [make("span", { class: "bar" },
    make("span", { style: { width: `${100 * Math.max(0, Math.min(1, share))}%` } }))]), text);
  const shown = (v, most) => (v ? cell(number(v), 1 + Math.log10(v / most) / 6) : cell(v === 0 ? "0" : "—"));
  const most = [0, 1].map((i) => Math.max(...lengths.map((row) => row[i] ?? 0)));
  byId("layers").replaceChildren(...net.layers.map(({ W, label, name, trains }, l) => {
    const s = seen(l, "s"), slope = sum(s) / s.length, [delta, gradient] = lengths[l], above = lengths[l + 1]?.[0];
    return make("tr", { class: l === step().l ? "active" : "" }, make("th", { scope: "row" }, `${l + 1}${name ? ` ${name}` : ""}`),
      cell(costOf(l)?.sigma ?? label), cell(number(slope), Math.abs(slope) / steepest(l)),
      cell(`${s.filter((v) => isSaturated(l, v)).length} of ${s.length}`), shown(delta, most[0]),
      cell(above && delta !== null ? `× ${number(delta / above)}` : "—"), shown(gradient, most[1]),
      cell(gradient ? number((trains[0] * net.lr * gradient) / norm(W.flat())) : "—"));
  }));
}

function paintCosts() {
  const { runs, net } = state, [w, h] = [600, 150], steps = Math.max(10, ...runs.map(({ C }) => C.length - 1));
  byId("trained").textContent = `C = ${number(net.pass.C)} after ${runs[0].C.length - 1} steps from ${number(runs[0].C[0])}`;
  const shares = runs.map(({ C }) => C.map((v) => v / C[0]).filter(Number.isFinite)), top = Math.min(5, Math.max(1, ...shares.flat()));
  const point = (v, i) => `${30 + ((w - 40) * i) / steps},${h - 20 - ((h - 30) * Math.min(v, top)) / top}`;
  const texts = [[4, 14, number(top)], [16, h - 20, "0"], [w - 90, h - 4, `${steps} steps`]].map(([x, y, t]) => make("text", { x, y, class: "index" }, t));
  byId("costs").hidden = steps === 10 && runs.every(({ C }) => C.length === 1);
  byId("costs").replaceChildren(make("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": "C over the steps, as a share of its start" },
    ...texts, make("line", { x1: 30, y1: h - 20, x2: w - 10, y2: h - 20, class: "axis" }),
    ...shares.map((share, i) => make("polyline", { class: `run run${i}`, points: share.map(point).join(" ") }))),
  make("figcaption", {}, "C over the steps, as a share of its start: ", ...runs.map(({ label }, i) => make("span", { class: `key run${i}` }, label))));
}

// ---------------------------------------------------------------------------- controls

function controls() {
  const { net, lesson } = state, titles = ["What was recorded", ...LESSONS.map(({ title }) => title)];
  byId("choices").replaceChildren(...titles.map((title, i) => make("button", { "aria-pressed": String(i - 1 === lesson), click: () => open(i - 1) }, title)));
  byId("lesson").replaceChildren(...(lesson < 0 ? [] : [make("p", {}, LESSONS[lesson].text), make("ol", {}, ...LESSONS[lesson].steps.map(
    ([text, label, act]) => make("li", {}, `${text} `, make("button", { click: act }, label))))]));
  const options = range(net.n).map((i) => make("option", { value: i }, `${i + 1}${net.labels ? `, a ${net.labels[i]}` : ""}`));
  byId("example").replaceChildren(...options, ...(net.n > 1 ? [make("option", { value: "mean" }, "mean of all")] : []));
  byId("example").value = state.example;
  byId("all").replaceChildren(...state.steps.map(({ title, equation }, i) => make("li", {},
    make("button", { click: () => goToStep(i) }, title), " ", formula(equation))));
  byId("controls").hidden = !net.live;
  byId("fixed").textContent = net.live ? "" : `This network cannot be changed here: ${!DATA.chain ? "its layers are not one chain"
    : !DATA.few ? "it has more than 500 weights" : DATA.shared ? "layers share parameters" : "a layer or the cost is not built in"}. The lessons' can.`;
  const both = net.cost === "cross-entropy" || (net.cost === "quadratic" && net.layers.at(-1).sigma === "sigmoid");
  byId("cost").replaceChildren(...(both ? ["quadratic", "cross-entropy"] : [DATA.cost_name]).map((name) => make("option", {}, name)));
  byId("cost").value = both ? net.cost : DATA.cost_name;
  knobs();
}

// A slider for η and for each number that belongs to what is chosen.
function knobs() {
  const { net, l, j, k, example } = state, list = [["learning rate η", net, "lr", 0, 10]];
  if (!net.live) return;
  if (l >= 0 && net.layers[l].b) list.push([`bias ${index("b", l, j)}`, net.layers[l].b, j, -4, 4]);
  if (l >= 0 && k !== null) list.push([`weight ${index("W", l, j, k)}`, net.layers[l].W[j], k, -4, 4]);
  const i = l < 0 ? j : sourceOf(l) < 0 ? k : null;
  if (i !== null && example !== "mean") list.push([`input x${low(i + 1)}`, net.X[example], i, 0, 1]);
  if (l === output() && example !== "mean") list.push([`target y${low(j + 1)}`, net.Y[example], j, 0, 1]);
  const weights = l < 0 ? [] : net.layers[l].W[j].map((_, from) => make("option", { value: from }, index("W", l, j, from)));
  const list_of_weights = make("select", { id: "weight", change: () => { select(l, j, Number(list_of_weights.value)); byId("weight").focus(); } },
    make("option", { value: "" }, "choose"), ...weights);
  list_of_weights.value = k ?? "";
  byId("knobs").replaceChildren(make("label", { class: "knob" }, make("span", {}, "a weight into it"), list_of_weights),
    ...list.map(([name, holder, key, least, most]) => {
      const v = holder[key], value = make("output", {}, number(v));
      const slider = make("input", { type: "range", min: Math.min(least, 2 * v), max: Math.max(most, 2 * v), step: "any", input: () => {
        holder[key] = slider.valueAsNumber;
        value.textContent = number(holder[key]);
        changed();
      } });
      slider.value = v;
      return make("label", { class: "knob" }, make("span", {}, name), slider, value);
    }));
}

function introduce({ misses, count }) {
  const { layers, n, pass } = state.net, [first] = misses, unreached = layers.filter(({ delta }) => !delta).map(({ name }) => name);
  const parts = [DATA.title, `${DATA.cost_name}`, n === 1 ? "1 example" : `${n} examples`, DATA.dtype, `C = ${number(pass.C)}`];
  if (!DATA.chain) parts.push("the layers are not one chain: what lies between them is not drawn");
  if (DATA.others.length) parts.push(`not drawn: ${DATA.others.join(", ")}`);
  if (unreached.length) parts.push(`no backward pass reached ${unreached.join(", ")}`);
  byId("about").textContent = parts.join(" · ");
  if (first) byId("warning").textContent = `${misses.length} of ${count} recorded numbers are not what this page computes. `
    + `${first.equation} at layer ${first.l + 1} (${layers[first.l].name}): ${first.name} was recorded as ${first.recorded}, expected `
    + `${first.expected}. Where: ${[...new Set(misses.map((m) => `${m.equation} at layer ${m.l + 1}`))].join(", ")}.`;
}

byId("back").onclick = () => goToStep(state.step - 1);
byId("next").onclick = () => goToStep(state.step + 1);
byId("slider").oninput = ({ target: { valueAsNumber } }) => goToStep(valueAsNumber - 1);
byId("example").onchange = ({ target: { value } }) => {
  state.example = value === "mean" ? value : Number(value);
  select(state.l, state.j, state.k);
};
byId("cost").onchange = ({ target: { value } }) => useCost(value);
byId("reset").onclick = reset;
document.querySelectorAll("[data-steps]").forEach((e) => { e.onclick = () => train(Number(e.dataset.steps)); });
document.addEventListener("keydown", ({ key, target: { tagName } }) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (by && !["INPUT", "SELECT"].includes(tagName)) goToStep(state.step + by);
});
addEventListener("resize", drawNetwork);

state.net = recordedNetwork();
const found = check(state.net);
const checked = found.misses.length ? "" : `✓ All ${found.count} recorded numbers agree with what this page computes.`;
introduce(found);
open(-1);
if (Number(location.hash.slice(1))) goToStep(Number(location.hash.slice(1)) - 1);
