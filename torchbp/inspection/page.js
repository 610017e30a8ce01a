"use strict";
// The page of a backward pass: the algorithm, the check of what was recorded, and what is
// drawn. Matrices are arrays of rows; W[j][k] goes from neuron k to neuron j; x, z, a, s (σ'),
// grad_a and delta are [example][neuron]. As in the book, delta is ∂C_x/∂z of one example x and
// gradients are means over the examples; what torchbp records carries the 1/n already.

// ----------------------------------------------------------------------------------- the algorithm
const range = (n) => Array.from({ length: n }, (_, i) => i);
const sum = (v) => v.reduce((total, value) => total + value, 0);
const dot = (v, w) => v.reduce((total, value, i) => total + value * w[i], 0);
const squares = (v, half = v.length >> 1) => (half < 9 ? dot(v, v) // long sums by halves: exact
  : squares(v.slice(0, half)) + squares(v.slice(half)));
const norm = (v) => Math.sqrt(squares(v));
const sizes = (v) => v.map(Math.abs);
const column = (M, k) => M.map((row) => row[k]);
const mean = (M) => M[0].map((_, j) => sum(column(M, j)) / M.length);
const ranked = (v) => range(v.length).sort((i, j) => v[j] - v[i] || i - j);
const logistic = (z) => 1 / (1 + Math.exp(-z));
const lnLogistic = (z) => Math.min(0, z) - Math.log1p(Math.exp(-Math.abs(z)));

function softmax(z) {
  const powers = z.map((z_j) => Math.exp(z_j - Math.max(...z)));
  return powers.map((power) => power / sum(powers));
}

// σ, σ' from a, the sizes of its terms if larger, its largest value if not 1, how both are written.
const SIGMA = {
  sigmoid: { of: logistic, prime: (a) => a * (1 - a), most: 0.25,
    text: (z) => `1 / (1 + e^{${number(-z)}})`, slope: (a) => `${a} (1 − ${a})` },
  tanh: { of: Math.tanh, prime: (a) => 1 - a * a, terms: (a) => 1 + a * a,
    text: (z) => `tanh(${number(z)})`, slope: (a) => `1 − (${a})^{2}` },
  relu: { of: (z) => Math.max(0, z), prime: (a) => (a > 0 ? 1 : 0),
    text: (z) => `max(0, ${number(z)})`, slope: (a) => `[${a} > 0]` },
  softplus: { of: (z) => (z > 20 ? z : Math.log1p(Math.exp(z))), prime: (a) => -Math.expm1(-a),
    text: (z) => `ln(1 + e^{${number(z)}})`, slope: (a) => `1 − exp(−${a})` },
  identity: { of: (z) => z, prime: () => 1, text: (z) => number(z), slope: () => "1" },
};

// What each output adds to C_x, ∇C_x and the sizes of its terms, of v: a^L, or z^L for a cost that
// applies the last σ itself; then `answer` is a^L. `text` is what an output adds, written out.
const COSTS = {
  quadratic: {
    of: (a, y) => a.map((a_j, j) => (y[j] - a_j) ** 2 / 2),
    text: (a, y) => `½ (${number(y)} − ${factor(a)})^{2}`,
    nabla: (a, y) => a.map((a_j, j) => a_j - y[j]),
    terms: (a, y) => a.map((a_j, j) => Math.abs(a_j) + Math.abs(y[j])),
  },
  "cross-entropy": {
    of: (z, y) => z.map((z_j, j) => -(y[j] && y[j] * lnLogistic(z_j))
      - (1 - y[j] && (1 - y[j]) * lnLogistic(-z_j))),
    text: (a, y) => [[y, number(a)], [1 - y, `(1 − ${number(a)})`]].filter(([share]) => share)
      .map(([share, v]) => `(−${share === 1 ? "" : `${factor(share)} `}ln ${v})`).join(" + "),
    nabla: (z, y) => z.map((z_j, j) => (1 - y[j]) * logistic(z_j) - y[j] * logistic(-z_j)),
    terms: (z, y) => z.map((z_j, j) =>
      Math.abs(1 - y[j]) * logistic(z_j) + Math.abs(y[j]) * logistic(-z_j)),
    answer: (z) => z.map(logistic), sigma: "sigmoid",
  },
  "log-likelihood": {
    of: (z, y) => softmax(z).map((a_j, j) => y[j] && -y[j] * Math.log(a_j)),
    text: (a, y) => `(−${factor(y)} ln ${number(a)})`,
    nabla: (z, y) => softmax(z).map((a_j, j, a) =>
      a_j * (sum(y) - y[j]) - y[j] * sum(a.filter((_, i) => i !== j))),
    terms: (z, y) => softmax(z).map((a_j, j) => (1 + 2 * Math.max(...sizes(z)))
      * (a_j * sum(sizes(y)) + Math.abs(y[j]))),
    answer: softmax, sigma: "softmax",
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
    pass.C += sum(COSTS[cost].of(a, Y[i])) / X.length; // A1
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
  const { x, delta } = here, columns = x[0].map((_, k) => column(x, k));
  here.grad_b = mean(delta); // BP3
  here.grad_W = mean(delta).map((_, j) =>
    columns.map((x_k) => dot(column(delta, j), x_k) / x.length)); // BP4
}

function descend({ layers, pass, lr }) {
  layers.forEach(({ W, b, trains }, l) => {
    const { grad_W, grad_b } = pass.layers[l];
    if (trains[0]) W.forEach((row, j) => row.forEach((_, k) => { row[k] -= lr * grad_W[j][k]; }));
    if (trains[1]) b.forEach((_, j) => { b[j] -= lr * grad_b[j]; });
  });
}

// ------------------------------------------------------------------------------- what was recorded
function numbers({ f4, f8 }) {
  const { buffer } = Uint8Array.from(atob(f4 ?? f8), (c) => c.charCodeAt(0));
  return Array.from(f4 ? new Float32Array(buffer) : new Float64Array(buffer));
}

function matrix(packed, scale = 1) {
  if (!packed) return null;
  const all = numbers(packed).map((v) => v * scale), [rows, width] = packed.shape;
  return range(rows).map((i) => all.slice(i * width, (i + 1) * width));
}

// The network as it was recorded: `pass` holds what backprop would return.
function load(recorded) {
  const layers = recorded.layers.map((r) => ({ ...r, W: matrix(r.W), b: r.b && numbers(r.b) }));
  const passed = [];
  for (const r of recorded.layers) {
    const n = r.a.shape[0], here = { x: matrix(r.x) ?? passed.at(-1).a, z: matrix(r.z),
      a: matrix(r.a), s: matrix(r.s), delta: matrix(r.delta, n), grad_a: matrix(r.grad_a, n) };
    if (here.delta) addGradients(here);
    passed.push(here);
  }
  return { ...recorded, layers, isRecorded: true, X: passed[0].x, Y: matrix(recorded.Y),
    pass: { C: numbers(recorded.C)[0], layers: passed } };
}

// Recompute each recorded number from those that it is made of; return those that are farther
// off than 8 ε Σ|terms|, from the output down, and how many were compared.
function check({ layers, pass, cost, chain, Y, eps, tiny, max }) {
  const misses = [], last = layers.length - 1, ours = chain && COSTS[cost];
  let count = 0;
  const test = (equation, l, name, recorded, exact, terms) => {
    const expected = Math.abs(exact) > max ? Math.sign(exact) * Infinity : exact;
    const isClose = Math.abs(recorded - expected) <= 8 * eps * terms + tiny;
    count += 1;
    if (isClose || Object.is(recorded, expected)) return;
    misses.push({ equation, l, name: `${layers[l].name}: ${name}`, recorded, expected });
  };
  const each = (M, f) => M?.forEach((v, i) => v.forEach((value, j) => f(value, i, j)));
  const at = (symbol, l, i, j) => `${index(symbol, l, j)} of example ${i + 1}`;
  const product = (v, w) => [dot(v, w), dot(sizes(v), sizes(w))];
  if (ours) {
    const v = pass.layers[last].a, size = ours.answer ? Math.max(...v.flat().map(Math.abs)) : 0;
    const terms = mean(v.map((v_i, i) => [sum(ours.of(v_i, Y[i])), sum(ours.terms(v_i, Y[i]))]));
    test("A1", last, "C", pass.C, terms[0], terms[0] + (1 + size) * terms[1]);
  }
  range(layers.length).reverse().forEach((l) => {
    const { W, b, sigma } = layers[l], here = pass.layers[l], above = pass.layers[l + 1];
    const { of, prime, terms = prime ?? (() => 0) } = SIGMA[sigma] ?? {};
    each(here.delta, (delta, i, j) => {
      const equation = l === last && chain ? "BP1" : "BP2";
      let from = [here.grad_a[i][j], Math.abs(here.grad_a[i][j])];
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
    if (here.delta) checkGradients(layers[l], here, l, test);
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

// --------------------------------------------------------------------------------- words, elements
const byId = (id) => document.getElementById(id);
const minus = (text) => text.replaceAll("-", "−");
const high = (n) => `${n}`.replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).replace("-", "⁻");
const low = (n) => `${n}`.replace(/\d/g, (d) => "₀₁₂₃₄₅₆₇₈₉"[d]);
const pair = (j, k) => [j, k].filter((i) => i !== undefined).map((i) => i + 1)
  .join(Math.max(j, k) > 8 ? "," : "");
const index = (symbol, l, j, k) => `${symbol}${high(l + 1)}${low(pair(j, k))}`;
const term = (symbol, l, j, k) => `${symbol}^{${l + 1}}_{${pair(j, k)}}`;

function number(v) {
  if (!Number.isFinite(v) || (v % 1 === 0 && Math.abs(v) < 1e5)) return minus(String(v));
  if (Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5) return minus(v.toFixed(Math.abs(v) < 10 ? 4 : 2));
  const [digits, exponent] = v.toExponential(3).split("e");
  return `${minus(digits)}·10${high(Number(exponent))}`;
}
const factor = (v) => (v < 0 ? `(${number(v)})` : number(v));
const short = (v, size = Math.abs(v)) => minus(size < 1000 && v % 1 === 0 ? `${v}`
  : size >= 0.001 && size < 1000 ? v.toFixed(size < 0.1 ? 3 : size < 100 ? 2 : 0)
    : v.toExponential(0).replace("+", ""));

// An element; false and the like among the children are left out.
function make(tag, attributes = {}, ...children) {
  const isDrawn = /^(svg|g|circle|line|text|rect|polyline)$/.test(tag);
  const space = `http://www.w3.org/${isDrawn ? "2000/svg" : "1999/xhtml"}`;
  const e = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") e.addEventListener(name, value);
    else e.setAttribute(name, value);
  }
  return fill(e, children);
}

function fill(e, ...children) {
  (e.tagName ? e : byId(e)).replaceChildren(...children.flat(2).filter(Boolean));
  return e;
}

// "W^{2}_{13}" with its indices raised and lowered; all else stays text.
function formula(text) {
  const pieces = text.split(/((?:\^\{[^}]*\}|_\{[^}]*\})+)/).map((part) => {
    const scripts = [...part.matchAll(/([\^_])\{([^}]*)\}/g)];
    return !scripts.length ? part : make("span", { class: scripts.length > 1 ? "both" : "one" },
      scripts.map(([, kind, inner]) => make(kind === "^" ? "sup" : "sub", {}, inner)));
  });
  return make("span", { class: "math" }, pieces);
}

// --------------------------------------------------------------------------------------- the state
// What is looked at: a network (0: the reader's own; then the lessons), a step, an example or
// "mean", neuron j of layer l (l < 0: input j of layer -1 - l, no k) and the k of a weight into it.
// The first of `runs` is the training that goes on.
const DATA = JSON.parse(byId("data").textContent);
const state = { which: 0, net: null, step: 0, example: 0, l: 0, j: 0, k: null, runs: [] };

const output = () => state.net.layers.length - 1;
const steps = () => state.net.steps[state.net.cost];
const step = () => steps()[state.step];
const stepOf = (kind, l) => steps().findIndex((s) => s.kind === kind && (s.l === l || kind === "update"));
const isReached = (kind, l) => stepOf(kind, l) >= 0 && stepOf(kind, l) <= state.step;
const costOf = (l) => (l === output() && state.net.chain ? COSTS[state.net.cost] : undefined);
const sigmaOf = (l) => SIGMA[costOf(l)?.sigma ?? state.net.layers[l].sigma];
const steepest = (l) => sigmaOf(l)?.most ?? state.net.layers[l].max_slope;
const isSaturated = (l, s) => Math.abs(s) < 0.05 * steepest(l);
const sourceOf = (l) => (l < 0 ? null : state.net.layers[l].linked ? l - 1 : -1 - l);
const isMean = (l) => state.net.n > 1
  && (state.example === "mean" || state.net.pass.layers[l].a.length !== state.net.n);
const ofChosen = (M, l) => (isMean(l) ? mean(M) : M[state.example]);
const target = () => state.net.Y && ofChosen(state.net.Y, output());

// A quantity of layer l, of the chosen example or its mean; null if it was not recorded.
function seen(l, name) {
  const here = state.net.pass.layers[l], answer = costOf(l)?.answer;
  if (name === "grad_b") return here.grad_b;
  const slope = sigmaOf(l)?.prime ?? (() => NaN), v = answer && here.a.map(answer);
  if (v && name === "a") return ofChosen(v, l);
  if (v && name === "s") return ofChosen(v.map((a) => a.map(slope)), l);
  return here[name] && ofChosen(here[name], l);
}

// The neurons of layer l, or its inputs, by the sizes of their errors or else activations.
function important(l, isInput = false) {
  const { x, a, delta } = state.net.pass.layers[l];
  return ranked(mean((isInput ? x : delta ?? a).map(sizes)));
}

function select(l, j, k = l < 0 ? null : ranked(sizes(seen(l, "x")))[0]) {
  Object.assign(state, { l, j, k });
  drawKnobs();
  draw();
}

function goToStep(i) {
  state.step = Math.max(0, Math.min(steps().length - 1, i));
  const { kind, l } = step(), stays = state.l === l || kind === "update";
  select(...(stays ? [state.l, state.j, state.k]
    : [l, state.net.layers[l].W.length > 10 ? important(l)[0] : 0]));
}

function open(which) {
  Object.assign(state, { which, step: 0, example: 0, l: 0, j: 0, k: 0, runs: [] });
  reset();
  select(0, 0);
}

function reset() {
  state.net = load(DATA.networks[state.which]);
  newRun();
  drawControls();
  draw();
}

function newRun() {
  const { cost, lr, pass } = state.net, { runs } = state;
  const old = runs.filter(({ C }) => C.length > 1).slice(0, 2); // each keeps its colour
  const hue = ["neg", "pos", "good"].find((each) => old.every((run) => run.hue !== each));
  state.runs = [{ label: `${cost} cost, η ${number(lr)}`, hue, C: [pass.C] }, ...old];
}

function changed() {
  state.net.isRecorded = false;
  state.net.pass = backprop(state.net);
  newRun();
  draw();
}

function useCost(cost) {
  state.net.cost = cost;
  state.net.layers.at(-1).sigma = COSTS[cost].answer ? "identity" : "sigmoid";
  changed();
  drawControls();
}

function train(count) {
  const { net, runs } = state;
  net.isRecorded = false;
  for (let i = 0; i < count && Number.isFinite(net.pass.C); i++) {
    descend(net);
    net.pass = backprop(net);
    runs[0].C.push(net.pass.C);
  }
  drawKnobs();
  draw();
}

// One thing to do of a lesson; what it changes comes into view.
function act(what) {
  if (what.reset) reset();
  if (what.cost && what.cost !== state.net.cost) useCost(what.cost);
  if (what.inputs) { state.net.X[0] = [...what.inputs]; changed(); }
  if (what.train) train(what.train);
  if (what.step) goToStep(stepOf(...what.step));
  if (what.weight !== undefined) select(what.step[1], 0, what.weight);
  if (what.focus) byId(what.focus).focus();
  byId(what.focus ?? (what.train ? "costs" : "written")).scrollIntoView({ block: "nearest" });
}

// ------------------------------------------------------------------------------------- written out
// The lines about the chosen neuron and weight that the steps so far have reached: a left-hand
// side, and what it equals. `put` is the equation with numbers in it; of means it would be wrong.
function story() {
  const { net, l, j, k } = state, lines = [];
  if (l < 0) return [{ left: `x_{${j + 1}}`, sign: " = ", right: [number(seen(-1 - l, "x")[j])] }];
  const { layers, pass, chain, n, lr } = net, { W, b, trains } = layers[l], ours = costOf(l);
  const [x, z, a, s, grad_a, delta] = "x z a s grad_a delta".split(" ").map((q) => seen(l, q));
  const line = (kind, left, text, put, value) => isReached(kind, l) && lines.push({ left,
    sign: kind === "update" ? " ← " : " = ", isNow: stepOf(kind, l) === state.step, right: [text,
      put && isMean(l) && kind !== "update" ? "mean over examples" : put, value].filter(Boolean) });
  const own = (symbol) => term(symbol, l, j), sigma = sigmaOf(l), over = n > 1 ? "1/n Σ_{x} " : "";
  const source = (i) => (layers[l].linked || l === 0 ? `a^{${l}}_{${i}}` : `x^{${l + 1}}_{${i}}`);
  const C = n > 1 ? "C_{x}" : "C", weighted = `Σ_{k} W^{${l + 1}}_{${j + 1}k} ${source("k")}`;
  line("forward", own("z"), b ? `${weighted} + ${own("b")}` : weighted, product(W[j], x, b?.[j]), number(z[j]));
  line("forward", own("a"), ours?.sigma === "softmax" ? "softmax" : `σ(${own("z")})`,
    sigma?.text(z[j]), number(a[j]));
  if (ours && !isMean(l)) {
    const y = target(), parts = ours.of(pass.layers[l].a[state.example], y);
    const some = range(y.length).filter((i) => parts[i] !== 0);
    line("cost", C, "", added(some.map((i) => parts[i]), (i) => ours.text(a[some[i]], y[some[i]])),
      number(sum(parts)));
  }
  if (l === output() && (n > 1 || !ours)) line("cost", "C", "", "", number(pass.C));
  if (!delta) return lines;
  const error = chain && l === output() ? "bp1" : "bp2", y = ours && target()[j];
  const wrong = [`${own("a")} − y_{${j + 1}}`, `${number(a[j])} − ${factor(y)}`];
  const above = chain && l < output() && column(layers[l + 1].W, j);
  const errors = above && [`Σ_{i} W^{${l + 2}}_{i${j + 1}} δ^{${l + 2}}_{i}`,
    product(above, seen(l + 1, "delta"))];
  const slope = sigma ? [sigma.slope(own("a")), sigma.slope(number(a[j]))] : ["", ""];
  const [gradient, slopes] = [`∂${C}/∂${own("a")}`, `σ'(${own("z")})`], cancels = ours?.answer;
  const quotient = wrong.map((v, i) => `(${v}) / [${slope[i]}]`);
  const from = cancels ? quotient : ours ? wrong : errors || ["", ""];
  const share = number(cancels ? delta[j] / s[j] : grad_a[j]), rule = `${gradient} · ${slopes}`;
  if (!cancels || (sigma && !isMean(l))) line(error, gradient, ...from, share);
  if (!cancels || sigma) line(error, slopes, ...slope, number(s[j])); // softmax has no slope
  line(error, own("δ"), ...(!cancels ? [rule, `${share} · ${factor(s[j])}`]
    : [sigma ? `${rule} = ${wrong[0]}` : wrong[0], wrong[1]]), number(delta[j]));
  const { grad_b, grad_W } = pass.layers[l];
  const update = (symbol, value, gradient, moves) => line("update", symbol,
    moves ? `${symbol} − η ∂C/∂${symbol}` : `${symbol}, which is frozen`,
    moves && `${number(value)} − ${number(lr)} · ${factor(gradient)}`,
    number(moves ? value - lr * gradient : value));
  if (b) line("bp3", `∂C/∂${own("b")}`, `${over}${own("δ")}`, "", number(grad_b[j]));
  const w = term("W", l, j, k), both = `${own("δ")} ${source(k + 1)}`;
  if (!isMean(l)) line("bp4", `∂${C}/∂${w}`, both, `${number(delta[j])} · ${factor(x[k])}`,
    number(delta[j] * x[k]));
  if (n > 1) line("bp4", `∂C/∂${w}`, `${over}${both}`, "", number(grad_W[j][k]));
  update(w, W[j][k], grad_W[j][k], trains[0]);
  if (b) update(own("b"), b[j], grad_b[j], trains[1]);
  return lines;
}

// w_1·x_1 + ... + b with numbers, and any sum: its six largest terms and the sum of the rest.
const product = (w, x, b) => added(w.map((w_i, i) => w_i * x[i]),
  (i) => `${factor(w[i])}·${factor(x[i])}`) + (b === undefined ? "" : ` + ${factor(b)}`);

function added(terms, text) {
  const order = ranked(sizes(terms)), rest = order.slice(6);
  const parts = order.slice(0, 6).sort((i, j) => i - j).map(text);
  if (rest.length) parts.push(`${factor(sum(rest.map((i) => terms[i])))} (${rest.length} others)`);
  return parts.join(" + ");
}

// ------------------------------------------------------------------------------------- the network
// The columns to draw: up to eight around the step's layer; of a wide layer the ten most
// important neurons, with the chosen one; a square input as a picture.
function columns() {
  const all = state.net.layers.flatMap(({ linked, W }, l) => [
    ...(linked ? [] : [{ l, own: -1 - l, size: W[0].length }]), { l, own: l, size: W.length }]);
  const at = all.findIndex(({ own }) => own === step().l);
  const first = Math.max(0, Math.min(at - 4, all.length - 8));
  return all.slice(first, first + 8).map((c) => {
    const isInput = c.own < 0, side = Math.sqrt(c.size);
    if (c.own === -1 && side >= 8 && side % 1 === 0) return { ...c, isInput, side, shown: [0] };
    const must = state.l === c.own ? state.j : sourceOf(state.l) === c.own ? state.k : null;
    const ranked = important(c.l, isInput).sort((i, j) => (j === must) - (i === must));
    return { ...c, isInput, ranked, shown: ranked.slice(0, 10).sort((i, j) => i - j) };
  });
}

// What the neurons of a column show at this step, and whether the step is about them.
function shows(c) {
  const { kind, l } = step(), n = high(c.l + 1);
  const isSource = c.own === sourceOf(l) && ["forward", "bp4"].includes(kind);
  if (c.isInput) return { name: "x", symbol: c.l ? `x${n}` : "x = a⁰", isActive: isSource };
  if (kind === "forward" && c.l > l) return {};
  const hasError = !isSource && (isReached("bp1", c.l) || isReached("bp2", c.l));
  if (!hasError) return { name: "a", symbol: `a${n}`, isActive: isSource || c.l === l };
  if (kind === "bp3" && c.l === l) return { name: "grad_b", symbol: `∂C/∂b${n}`, isActive: true };
  const isAbove = kind === "bp2" && c.l === l + 1;
  return { name: "delta", symbol: `δ${n}`, isActive: c.l === l || isAbove };
}

// The number on the line from neuron k to neuron j of layer l, and whether the step is about it.
function edgesOf(l) {
  const { kind, l: at } = step(), { chain, lr, layers, pass } = state.net;
  const { W, trains } = layers[l], { grad_W } = pass.layers[l];
  const delta = seen(l, "delta"), x = seen(l, "x"), own = (j, k) => delta[j] * x[k];
  if (kind === "update" && grad_W) return [true, (j, k) => -trains[0] * lr * grad_W[j][k]];
  if (kind === "bp4" && l === at) return [true, isMean(l) ? (j, k) => grad_W[j][k] : own];
  const carries = (kind === "forward" && l === at) || (kind === "bp2" && l === at + 1 && chain);
  return [carries, (j, k) => W[j][k]];
}

const polyline = (name, points) => make("polyline", { class: name, points: points.join(" ") });
const head = (x, y, text, kind = "head") => make("text", { x, y, class: kind }, text);
const classes = (...names) => names.filter(Boolean).join(" ");
const largest = (values, least = 1e-300) => values.reduce((most, v) =>
  (Math.abs(v) < Infinity ? Math.max(most, Math.abs(v)) : most), least);

function drawNetwork() {
  const width = Math.max(300, byId("network").clientWidth), all = columns(), parts = [];
  const r = width > 560 ? 21 : 16, picture = all[0].side ? Math.min(210, width * 0.36) : 0;
  const rows = Math.max(...all.map(({ shown }) => shown.length)), { layers, pass } = state.net;
  const height = 60 + Math.max(picture, 130, 2.7 * r * rows), first = picture / 2 || r + 14;
  const gap = (width - first - r - 46) / (all.length - 1);
  const lines = make("g", { "aria-hidden": true });
  // One scale for all layers: what vanishes looks as if it did.
  const scales = Object.fromEntries(["x", "a", "delta", "grad_b"].map((name) => [name,
    largest(layers.flatMap((_, l) => seen(l, name) ?? []), name === "a" ? 1 : 1e-300)]));
  scales.gradient = largest(pass.layers.flatMap(({ grad_W }) => grad_W?.flat() ?? []));
  all.forEach((c, i) => {
    Object.assign(c, { r: c.side ? picture / 2 : r, X: first + i * gap, middle: 20 + height / 2 });
    c.Y = c.shown.map((_, row) => c.middle + (row - (c.shown.length - 1) / 2) * 2.7 * r);
    if (i && !c.isInput) lines.append(...drawEdges(all[i - 1], c, scales));
    if (i && c.isInput) parts.push(head(c.X - gap / 2, c.middle, "⋯"));
    parts.push(c.side ? drawPicture(c, scales) : drawColumn(c, scales));
  });
  const focused = document.activeElement?.dataset?.at;
  fill("network", make("svg", { role: "group", viewBox: `0 0 ${width} ${height}`,
    "aria-label": "Layers, from the input to the output" }, lines, parts));
  if (focused) document.querySelector(`[data-at="${focused}"]`)?.focus();
  fill("others", all.filter((c) => c.ranked && c.size > c.shown.length).map((c) => {
    const list = make("select", { change: () => select(c.own, Number(list.value)) },
      make("option", {}, `${c.shown.length} of ${c.size} shown`),
      c.ranked.map((j) => make("option", { value: j }, `${j + 1}`)));
    const name = c.isInput ? "Inputs, the largest" : `Layer ${c.l + 1}, the largest errors`;
    return make("label", {}, `${name} first: `, list);
  }));
}

function drawEdges(from, to, scales) {
  const [isActive, of] = edgesOf(to.l), { kind } = step(), { layers, lr } = state.net;
  const isGradient = isActive && ["bp4", "update"].includes(kind);
  const scale = !isGradient ? largest(layers[to.l].W.flat())
    : scales.gradient * (kind === "update" ? lr : 1);
  return to.shown.flatMap((j, row) => from.shown.flatMap((k, i) => {
    const isMine = state.l === to.l && state.j === j, v = of(j, k);
    const place = { x1: from.X + from.r, y1: from.Y[i], x2: to.X - to.r, y2: to.Y[row] };
    if (from.side) return make("line", { ...place, class: "bundle" });
    return [make("line", { ...place, class: classes("edge", v < 0 ? "neg" : "pos",
      isActive && "active", isMine && "mine", isMine && state.k === k && "chosen"),
      "stroke-width": v ? 0.7 + 5 * Math.min(1, Math.abs(v) / scale) : 0 }),
    make("line", { ...place, class: "hit", "data-weight": `${to.l},${j},${k}`,
      click: () => select(to.l, j, k) })];
  }));
}

function drawColumn(c, scales) {
  const { name, symbol = "", isActive } = shows(c), { label, name: called } = state.net.layers[c.l];
  const values = name && seen(c.l, name), s = !c.isInput && values && seen(c.l, "s"), { r } = c;
  const y = c.own === output() && target(), isError = name === "delta" || name === "grad_b";
  const isChosen = (j) => state.l === c.own && state.j === j, choose = (j) => select(c.own, j);
  const stop = c.shown.find(isChosen) ?? c.shown[0];
  const at = (row) => ({ transform: `translate(${c.X} ${c.Y[row]})` });
  const nodes = c.shown.map((j, row) => {
    const v = values?.[j], saturated = s && isSaturated(c.l, s[j]) && "saturated";
    const isFrom = sourceOf(state.l) === c.own && state.k === j && edgesOf(state.l)[0];
    const words = [`${c.isInput ? "input" : "neuron"} ${j + 1}`, values && `${symbol} ${number(v)}`,
      saturated, y && `wanted ${number(y[j])}`].filter(Boolean).join(", ");
    const body = make("circle", { r, class: `body ${v < 0 ? "neg" : isError ? "pos" : "act"}`,
      "fill-opacity": values ? 0.6 * Math.min(1, Math.abs(v) / scales[name]) : 0 });
    const ring = make("circle", { r: r + 3, class: "ring", pathLength: 1, "stroke-dasharray":
      `${s ? Math.min(1, Math.abs(s[j]) / steepest(c.l)) || 0 : 0} 1` });
    return make("g", { role: "option", "data-at": `${c.own},${j}`, tabindex: j === stop ? 0 : -1,
      ...at(row), "aria-label": words, "aria-selected": isChosen(j),
      class: classes("neuron", isActive && "active", isChosen(j) && "chosen", isFrom && "from",
        saturated), click: () => choose(j), keydown: (event) => move(event, choose,
        { ArrowUp: c.shown[row - 1], ArrowDown: c.shown[row + 1] }, c.size, c.own) },
    make("circle", { r: r + 3, class: "rim" }), ring, body);
  });
  const texts = c.shown.map((j, row) => make("g", { ...at(row), "aria-hidden": true },
    head(0, 4, values && short(values[j]), "value"), head(-r - 4, 3 - r, `${j + 1}`, "number"),
    head(r + 9, 4, y && `y ${short(y[j])}`, "note")));
  const heading = c.isInput ? "input" : `layer ${c.l + 1}`;
  const words = c.isInput ? heading : `${heading}, ${label}, ${called}`;
  return make("g", { role: "listbox", "aria-label": words },
    head(c.X, 16, heading), head(c.X, 34, symbol, "symbol"), nodes, texts);
}

function drawPicture(c, scales) {
  const x = seen(c.l, "x"), { side, r } = c, cell = (2 * r) / side, top = c.middle - r;
  const at = state.l === c.l ? state.k : Math.floor((c.size + side) / 2);
  const square = (k, attributes) => make("rect", { ...attributes, width: cell, height: cell,
    x: c.X - r + (k % side) * cell, y: top + Math.floor(k / side) * cell });
  const j = state.l === c.l ? state.j : important(c.l)[0], choose = (k) => select(c.l, j, k);
  const pixels = x.map((v, k) => square(k, { class: classes("pixel", v < 0 && "neg"),
    "fill-opacity": Math.abs(v) / scales.x, click: () => choose(k) }));
  const places = { ArrowUp: at - side, ArrowDown: at + side, ArrowLeft: at - 1, ArrowRight: at + 1 };
  const cursor = make("g", { role: "option", tabindex: 0, "data-at": "pixel", "aria-selected": true,
    "aria-label": `row ${Math.floor(at / side) + 1}, column ${(at % side) + 1}: ${number(x[at])}`,
    keydown: (event) => move(event, choose, places, c.size) }, square(at, { class: "cursor" }));
  return make("g", { role: "listbox", "aria-label": `input, a picture of ${side} × ${side}` },
    head(c.X, top - 10, "input"), make("g", { "aria-hidden": true }, pixels), cursor);
}

// Arrow keys within a column: where each of them leads, if anywhere.
function move(event, choose, places, size, own) {
  if (!(event.key in places)) return;
  event.preventDefault();
  event.stopPropagation();
  const to = places[event.key];
  if (!(to >= 0 && to < size)) return;
  choose(to);
  document.querySelector(`[data-at="${own},${to}"]`)?.focus();
}

// ----------------------------------------------------------------------------------- all around it
const PHASES = { forward: "Forward", cost: "Forward", bp1: "Backward", bp2: "Backward",
  bp3: "Gradients", bp4: "Gradients", update: "Update" };
const LINES = { bp4: "the gradients ∂C/∂W", update: "what the step adds, −η ∂C/∂W" };

function draw() {
  const { title, equation, text, kind } = step(), { net, l, j, k, example } = state;
  const { misses, count } = net.found, last = steps().length - 1;
  fill("phase", `${PHASES[kind]}, step ${state.step + 1} of ${last + 1}`);
  byId("phase").className = PHASES[kind].toLowerCase();
  const words = { title, explanation: text, equation: formula(equation), lines: LINES[kind] };
  for (const [id, content] of Object.entries(words)) fill(id, content ?? "the weights");
  fill("checked", !net.isRecorded ? "Changed: this page computed all numbers below."
    : !misses.length && "✓ One pass of a PyTorch model, recorded by torchbp. "
      + `This page computes the same ${count} numbers.`);
  fill("choice", l < 0 ? `Input ${j + 1}` : `Neuron ${j + 1} of layer ${l + 1}`,
    l >= 0 && `, weight from ${sourceOf(l) < 0 ? "input" : "neuron"} ${k + 1}`,
    net.n > 1 && (example === "mean" ? `, mean of ${net.n} examples` : `, example ${example + 1}`));
  Object.assign(byId("slider"), { max: last + 1, value: state.step + 1 });
  byId("slider").setAttribute("aria-valuetext", title);
  byId("back").ariaDisabled = state.step === 0; // not `disabled`, which would lose the focus
  byId("next").ariaDisabled = state.step === last;
  fill("written", story().map(({ isNow, left, sign, right }) => make("p", { class: classes("line",
    isNow && "now") }, formula(left), right.map((part, i) => make("span", { class:
    i === right.length - 1 ? "result" : "" }, i ? " = " : sign, formula(part))))));
  const z = l >= 0 && !isMean(l) && sigmaOf(l) && seen(l, "z")[j];
  fill("sigma", Number.isFinite(z) && drawSigma(l, z));
  drawNetwork();
  drawTable();
  drawCosts();
}

// σ around z, and its slope there.
function drawSigma(l, z) {
  const { of, prime } = sigmaOf(l), span = Math.max(6, 1.2 * Math.abs(z) || 0), [w, h] = [400, 170];
  const [low, top, a] = [of(-span), of(span), of(z)], slope = prime(a);
  const reach = Math.min(span / 3, (top - low) / (3 * slope));
  const X = (v) => (w * (v + span)) / (2 * span);
  const Y = (v) => h - 30 - ((h - 60) * (v - low)) / (top - low);
  const line = (name, points) => polyline(name, points.map(([u, v]) => [X(u), Y(v)]));
  const label = `σ(z) at z = ${number(z)}, slope σ' = ${number(slope)}`
    + (isSaturated(l, slope) ? ": saturated" : "");
  return [make("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": label },
    line("axis", [[-span, 0], [span, 0]]), line("axis", [[0, low], [0, top]]),
    head(w - 6, Y(0) + 14, "z", "number"), head(w / 2, Y(low) + 16, "z = 0", "symbol"),
    head(w / 2 - 6, Y(top), "σ(z)", "number"),
    line("sigma", range(81).map((i) => span * (i / 40 - 1)).map((v) => [v, of(v)])),
    line("tangent", [[z - reach, a - reach * slope], [z + reach, a + reach * slope]]),
    make("circle", { cx: X(z), cy: Y(a), r: 4, class: "point" })), make("figcaption", {}, label)];
}

function drawTable() {
  const { layers, pass, lr } = state.net;
  const lengths = pass.layers.map(({ grad_W }, l) => [seen(l, "delta"), grad_W?.flat()]
    .map((v) => v && norm(v)));
  const cell = (v, share, text = v === null || Number.isNaN(v) ? "—" : number(v)) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
    return make("td", {}, share >= 0 && make("span", { class: "scale" }, bar), text);
  };
  // The share of a logarithmic bar, which begins six powers of ten below the largest.
  const share = (i, v) => (v === null ? NaN
    : Math.max(0, 1 + Math.log10(v / largest(lengths.map((pair) => pair[i] ?? 0))) / 6));
  fill("layers", layers.map(({ W, label, name, trains }, l) => {
    const s = seen(l, "s"), slope = sum(s) / s.length, [delta, gradient = null] = lengths[l];
    const saturated = s.filter((v) => isSaturated(l, v)).length, next = lengths[l + 1]?.[0];
    return make("tr", { class: classes(l === step().l && "active") },
      make("th", { scope: "row" }, `${l + 1} ${name}`), cell(0, NaN, costOf(l)?.sigma ?? label),
      cell(slope, Math.abs(slope) / steepest(l)), cell(0, NaN, `${saturated} of ${s.length}`),
      cell(delta, share(0, delta)), cell(delta !== null && next ? delta / next : null),
      cell(gradient, share(1, gradient)),
      cell(gradient === null ? null : (trains[0] * lr * gradient) / norm(W.flat())));
  }));
}

function drawCosts() {
  const { runs, net } = state, [w, h] = [320, 150];
  const label = "The cost C after each step, divided by C at the start.";
  const shares = runs.map(({ C }) => C.map((v) => v / C[0]).filter(Number.isFinite));
  const count = largest(runs.map(({ C }) => C.length - 1), 0);
  const top = Math.min(5, largest(shares.flat(), 1)), text = (...of) => head(...of, "number");
  const X = (i) => 34 + ((w - 44) * i) / count;
  const Y = (v) => h - 20 - ((h - 30) * Math.min(v, top)) / top;
  fill("trained", `C = ${number(net.pass.C)}. Steps taken: ${runs[0].C.length - 1}.`);
  fill("costs", count && [
    make("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": label },
      polyline("axis", [[34, 8], [34, h - 20], [w - 10, h - 20]]),
      text(28, 14, short(top)), text(28, h - 20, "0"), text(w - 10, h - 4, `${count} steps`),
      shares.map((share, r) =>
        polyline(`run ${runs[r].hue}`, share.map((v, i) => [X(i), Y(v)])))),
    make("figcaption", {}, label, runs.filter(({ C }) => C.length > 1).map((run) =>
      make("span", { class: `key ${run.hue}` }, run.label)))]);
}

// ---------------------------------------------------------------------------------------- controls
function drawControls() {
  const { net } = state, { misses, count } = net.found, [first] = misses;
  const pressed = [...document.querySelectorAll("button")].indexOf(document.activeElement);
  fill("choices", DATA.networks.map(({ title }, i) => make("button", { click: () => open(i),
    "aria-pressed": i === state.which }, i ? `Lesson ${i}: ${title}` : "Recorded model")));
  fill("about", [net.title, net.isRecorded ? net.cost_name : `${net.cost} cost`,
    `${net.n} example${net.n > 1 ? "s" : ""}`, net.dtype, ...net.notes].join(" · "));
  const acts = net.acts?.map(([text, label, what]) =>
    make("li", {}, `${text} `, make("button", { click: () => act(what) }, label)));
  fill("lesson", net.text && [make("p", {}, net.text), make("ol", {}, acts)]);
  document.querySelectorAll("button")[pressed]?.focus(); // these are new ones in the same places
  fill("example", range(net.n).map((i) => make("option", { value: i },
    `${i + 1}`, net.labels && `, a ${net.labels[i]}`)),
  net.n > 1 && make("option", { value: "mean" }, "mean of all"));
  byId("example").value = state.example;
  byId("example").parentElement.hidden = net.n === 1;
  fill("all", steps().map(({ title, equation }, i) => make("li", {},
    make("button", { click: () => goToStep(i) }, title), " ", formula(equation))));
  fill("fixed", net.fixed);
  byId("controls").hidden = Boolean(net.fixed);
  fill("cost", Object.keys(net.steps).map((name) => make("option", {}, name)));
  byId("cost").value = net.cost;
  fill("warning", first && `${misses.length} of ${count} recorded numbers are not what this page `
    + `computes; the first is of ${first.equation} at layer ${first.l + 1}, `
    + `${first.name} was recorded as ${first.recorded}, expected ${first.expected}.`);
  drawKnobs();
}

// A slider for η and for each number that belongs to what is chosen.
function drawKnobs() {
  const { net, l, j, k, example } = state, i = l < 0 ? j : sourceOf(l) < 0 ? k : null;
  const list = [["learning rate η", net, "lr", 0, 10]], { W, b } = net.layers[l] ?? {};
  byId("weights").hidden = !W;
  fill("weight", W?.[j].map((_, from) =>
    make("option", { value: from }, index("W", l, j, from))));
  byId("weight").value = k;
  if (net.fixed) return;
  if (W) list.push([`weight ${index("W", l, j, k)}`, W[j], k, -4, 4]);
  if (b) list.push([`bias ${index("b", l, j)}`, b, j, -4, 4]);
  const { [example]: x } = net.X, { [example]: y } = net.Y; // none of the mean
  if (x && i !== null) list.push([`input x${low(i + 1)}`, x, i, 0, 1]);
  if (y && l === output()) list.push([`target y${low(j + 1)}`, y, j, 0, 1]);
  fill("knobs", list.map(([name, holder, key, least, most]) => {
    const v = holder[key], value = make("output", {}, number(v)), change = () => {
      holder[key] = slider.valueAsNumber;
      fill(value, number(holder[key]));
      changed();
    };
    const slider = make("input", { type: "range", step: "any", min: Math.min(least, 2 * v),
      max: Math.max(most, 2 * v), input: change });
    slider.value = v;
    return make("label", { class: "knob" }, make("span", {}, name), slider, value);
  }));
}

const buttons = { back: () => goToStep(state.step - 1), next: () => goToStep(state.step + 1),
  reset, one: () => train(1), hundred: () => train(100) };
for (const [id, press] of Object.entries(buttons)) byId(id).onclick = press;
byId("slider").oninput = (event) => goToStep(event.target.valueAsNumber - 1);
byId("example").onchange = ({ target: { value } }) => {
  state.example = value === "mean" ? value : Number(value);
  select(state.l, state.j, state.k);
};
byId("weight").onchange = ({ target: { value } }) => select(state.l, state.j, Number(value));
byId("cost").onchange = (event) => useCost(event.target.value);
document.addEventListener("keydown", ({ key, target: { tagName }, altKey, ctrlKey, metaKey }) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[key], isTaken = /INPUT|SELECT/.test(tagName);
  if (by && !isTaken && !altKey && !ctrlKey && !metaKey) goToStep(state.step + by);
});
addEventListener("resize", drawNetwork);

DATA.networks.forEach((network) => { network.found = check(load(network)); });
open(0);
if (Number(location.hash.slice(1))) goToStep(Number(location.hash.slice(1)) - 1);
