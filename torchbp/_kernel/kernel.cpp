// An epoch of mini-batch SGD as compiled loops: the four equations on one example at a
// time, their sums over a mini-batch, and the update. torchbp/explicit/kernel.py builds
// and calls it.
//
// W lies transposed for the length of a call, W[k] = the weights from input k to all
// neurons, padded with zeros to a multiple of LANES. So both passes through a layer read
// whole rows, and rows of inputs that are zero (four of five MNIST pixels) are skipped:
//
//     z      = b + Σ_k x_k W[k]        add_rows
//     grad_x_k   = W[k] · δ            add_products
//     grad_W[k] += x_k δ               add_outer
//
// Skipping 0 · W is right only while W is finite. A call that meets a number that is not,
// at its start or later, changes nothing and says so.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

constexpr int LANES = 16;    // floats in 64 bytes: a cache line, the widest vector
constexpr int WIDEST = 128;  // columns that one pass over a list handles

enum Activation : int32_t { IDENTITY, SIGMOID, TANH, RELU };
enum Cost : int32_t { QUADRATIC, CROSS_ENTROPY, LOG_LIKELIHOOD };

}  // namespace

extern "C" {

// A layer's parameters where torch has them: W (n_out, n_in) and b (n_out), or null.
struct Layer {
  float *W, *b;
  int64_t W_row, W_column, b_step;  // strides in floats
  int64_t n_in, n_out;
  int32_t activation, trains_W, trains_b;
};

// What is trained on: `order` names the rows of images and targets.
struct Examples {
  const void* images;   // uint8, read as x / 255, or float
  const void* targets;  // float rows, or int64 labels
  const int64_t* order;
  int64_t count, batch_size, image_stride, target_stride;  // strides in items
  int32_t images_are_bytes, targets_are_labels;
};
}

namespace {

int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// ---------------------------------------------------------------- rows and lists

// The inputs of a layer that are not zero: x_k, and where row k of W begins.
struct List {
  uint32_t* offset;
  float* value;
  int64_t count;
};

// out[0..N) += Σ_i value_i M[offset_i ..]. Two sums, so that additions need not wait for
// one another.
template <int N>
void add_rows(float* __restrict__ out, const float* __restrict__ M, const List& list) {
  float even[N] = {}, odd[N] = {};
  int64_t i = 0;
  for (; i + 2 <= list.count; i += 2) {
    const float *p = M + list.offset[i], *q = M + list.offset[i + 1];
    const float v = list.value[i], w = list.value[i + 1];
    for (int j = 0; j < N; ++j) even[j] += v * p[j];
    for (int j = 0; j < N; ++j) odd[j] += w * q[j];
  }
  if (i < list.count) {
    const float* p = M + list.offset[i];
    for (int j = 0; j < N; ++j) even[j] += list.value[i] * p[j];
  }
  for (int j = 0; j < N; ++j) out[j] += even[j] + odd[j];
}

// M[offset_i ..] += value_i v[0..N)
template <int N>
void add_outer(float* __restrict__ M, const List& list, const float* __restrict__ v) {
  float u[N];
  for (int j = 0; j < N; ++j) u[j] = v[j];
  for (int64_t i = 0; i < list.count; ++i) {
    float* p = M + list.offset[i];
    const float x = list.value[i];
    for (int j = 0; j < N; ++j) p[j] += x * u[j];
  }
}

// out[k] += M[k][0..N) · v for `count` rows of M
template <int N>
void add_products(float* __restrict__ out, const float* __restrict__ M, int64_t stride,
                  int64_t count, const float* __restrict__ v) {
  for (int64_t k = 0; k < count; ++k) {
    const float* p = M + k * stride;
    float s[LANES];
    for (int i = 0; i < LANES; ++i) s[i] = p[i] * v[i];
    for (int j = LANES; j < N; j += LANES)
      for (int i = 0; i < LANES; ++i) s[i] += p[j + i] * v[j + i];
    for (int half = LANES / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    out[k] += s[0];
  }
}

struct Loops {
  void (*add_rows)(float*, const float*, const List&);
  void (*add_outer)(float*, const List&, const float*);
  void (*add_products)(float*, const float*, int64_t, int64_t, const float*);
};

template <int N>
constexpr Loops loops_of = {add_rows<N>, add_outer<N>, add_products<N>};

// The loops for rows of `width`, a multiple of LANES up to WIDEST.
const Loops& loops_for(int64_t width) {
  static constexpr Loops table[] = {loops_of<16>, loops_of<32>, loops_of<48>, loops_of<64>,
                                    loops_of<80>, loops_of<96>, loops_of<112>, loops_of<128>};
  return table[width / LANES - 1];
}

// ---------------------------------------------------------------- σ and σ'

// e^x for x <= 0, within 2 units in the last place.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;  // NaN stays NaN
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to integers
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;  // 2^n: the low bits of `shifted` are n
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float z) {
  const float e = exponential(-std::fabs(z)), r = 1.0f / (1.0f + e);
  return z < 0 ? e * r : r;
}

inline float hyperbolic_tangent(float z) {
  const float e = exponential(-2.0f * std::fabs(z));
  const float s = z * z;
  float p = -5.70498872745e-3f;  // tanh z = z + z³ P(z²) near 0
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = z + z * s * p, far = 1.0f - 2.0f * e / (1.0f + e);
  return std::fabs(z) < 0.625f ? near : (z < 0 ? -far : far);
}

void apply_sigma(int32_t activation, float* a, int64_t width, int64_t n) {
  if (activation == SIGMOID)
    for (int64_t j = 0; j < width; ++j) a[j] = sigmoid(a[j]);
  else if (activation == TANH)
    for (int64_t j = 0; j < width; ++j) a[j] = hyperbolic_tangent(a[j]);
  else if (activation == RELU)
    for (int64_t j = 0; j < width; ++j) a[j] = a[j] < 0 ? 0 : a[j];
  for (int64_t j = n; j < width; ++j) a[j] = 0;
}

void gate(int32_t activation, float* delta, const float* a, int64_t width) {
  if (activation == SIGMOID)
    for (int64_t j = 0; j < width; ++j) delta[j] *= a[j] - a[j] * a[j];
  else if (activation == TANH)
    for (int64_t j = 0; j < width; ++j) delta[j] *= 1.0f - a[j] * a[j];
  else if (activation == RELU)
    for (int64_t j = 0; j < width; ++j) delta[j] = a[j] == 0 ? 0 : delta[j];
}

// ---------------------------------------------------------------- costs

// Each writes ∇C_x of outputs v and targets y, and returns C_x.

double quadratic(float* grad, const float* v, const float* y, int64_t K) {
  double C = 0;
  for (int64_t j = 0; j < K; ++j) {
    grad[j] = v[j] - y[j];
    C += 0.5 * grad[j] * grad[j];
  }
  return C;
}

double cross_entropy(float* grad, const float* z, const float* y, int64_t K) {
  double C = 0, product = 0;  // ln Π (1 + e_j) = Σ ln (1 + e_j), with one logarithm
  for (int64_t j = 0; j < K; ++j) {
    const float e = exponential(-std::fabs(z[j])), r = 1.0f / (1.0f + e);
    const float above = z[j] < 0 ? e * r : r, below = z[j] < 0 ? r : e * r;
    grad[j] = (1 - y[j]) * above - y[j] * below;  // σ(z) - y, without loss near y
    C += (z[j] < 0 ? 0.0f : z[j]) - y[j] * double(z[j]);
    product += e + product * e;
    if (product > 1e30) C += std::log1p(product), product = 0;
  }
  return C + std::log1p(product);
}

double log_likelihood(float* grad, const float* z, const float* y, int64_t K) {
  int64_t top = 0;
  for (int64_t j = 1; j < K; ++j) top = z[j] > z[top] ? j : top;
  for (int64_t j = 0; j < K; ++j) grad[j] = exponential(z[j] - z[top]);
  float rest = 0, sum_y = 0;
  for (int64_t j = 0; j < K; ++j) {
    if (j != top) rest += grad[j];
    sum_y += y[j];
  }
  const double log_total = std::log1p(double(rest));
  const float total = 1.0f + rest;
  double C = 0;
  for (int64_t j = 0; j < K; ++j) {
    const float p = grad[j] / total, q = j == top ? rest / total : 1.0f - p;
    if (y[j] != 0) C -= y[j] * (double(z[j]) - z[top] - log_total);
    grad[j] = p * (sum_y - y[j]) - y[j] * q;
  }
  return C;
}

// ---------------------------------------------------------------- a layer at work

struct Unit {
  Layer layer;
  int64_t width;                        // n_out, padded
  float *W, *grad_W, *b, *grad_b;       // W (n_in, width)
  float *a, *delta;                     // (width)
  List inputs;
  uint8_t* touched;                     // groups of 8 rows that have a gradient
};

template <class Visit>
void for_each_block(int64_t width, Visit visit) {
  for (int64_t j = 0; j < width; j += WIDEST) {
    const int64_t n = width - j < WIDEST ? width - j : WIDEST;
    visit(j, loops_for(n));
  }
}

void list_bytes(Unit& u, const uint8_t* x) {
  const int64_t n = u.layer.n_in;
  uint32_t* found = u.inputs.offset;
  int64_t count = 0, k = 0;
  for (; k + 8 <= n; k += 8) {
    uint64_t eight;
    std::memcpy(&eight, x + k, 8);
    if (!eight) continue;
    u.touched[k / 8] = 1;
    for (int i = 0; i < 8; ++i) {
      found[count] = uint32_t(k + i) << 8 | x[k + i];
      count += x[k + i] != 0;
    }
  }
  for (; k < n; ++k) {
    u.touched[k / 8] = 1;
    found[count] = uint32_t(k) << 8 | x[k];
    count += x[k] != 0;
  }
  const uint32_t width = uint32_t(u.width);
  for (int64_t i = 0; i < count; ++i) {
    u.inputs.value[i] = float(int32_t(found[i] & 255)) * (1.0f / 255);
    found[i] = (found[i] >> 8) * width;
  }
  u.inputs.count = count;
}

void list_floats(Unit& u, const float* x) {
  const uint32_t width = uint32_t(u.width);
  int64_t count = 0;
  for (int64_t k = 0; k < u.layer.n_in; ++k) {
    u.inputs.offset[count] = uint32_t(k) * width;
    u.inputs.value[count] = x[k];
    u.touched[k / 8] |= x[k] != 0;
    count += x[k] != 0;
  }
  u.inputs.count = count;
}

void feed_forward(Unit& u) {
  std::memcpy(u.a, u.b, u.width * sizeof(float));
  for_each_block(u.width, [&](int64_t j, const Loops& loops) {
    loops.add_rows(u.a + j, u.W + j, u.inputs);
  });
  apply_sigma(u.layer.activation, u.a, u.width, u.layer.n_out);
}

void accumulate(Unit& u) {
  if (u.layer.trains_b)
    for (int64_t j = 0; j < u.width; ++j) u.grad_b[j] += u.delta[j];  // BP3
  if (u.layer.trains_W)
    for_each_block(u.width, [&](int64_t j, const Loops& loops) {
      loops.add_outer(u.grad_W + j, u.inputs, u.delta + j);  // BP4
    });
}

void propagate(const Unit& u, Unit& below) {
  std::memset(below.delta, 0, below.width * sizeof(float));
  for_each_block(u.width, [&](int64_t j, const Loops& loops) {
    loops.add_products(below.delta, u.W + j, u.width, u.layer.n_in, u.delta + j);  // BP2
  });
  gate(below.layer.activation, below.delta, below.a, below.width);  // BP2
}

void update(Unit& u, float rate, float decay) {
  for (int64_t j = 0; j < u.width; ++j) u.b[j] += rate * u.grad_b[j], u.grad_b[j] = 0;
  if (!u.layer.trains_W) return;
  for (int64_t k = 0; k < u.layer.n_in; k += 8) {
    if (!u.touched[k / 8] && !decay) continue;
    u.touched[k / 8] = 0;
    const int64_t end = k + 8 < u.layer.n_in ? k + 8 : u.layer.n_in;
    float *__restrict__ W = u.W, *__restrict__ G = u.grad_W;
    for (int64_t i = k * u.width; i < end * u.width; ++i) {
      W[i] += decay * W[i] + rate * G[i];
      G[i] = 0;
    }
  }
}

// Memory from one block, each piece at a multiple of 64 bytes.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

void place(Unit& u, const Layer& layer, Arena& arena) {
  u.layer = layer;
  u.width = padded(layer.n_out);
  u.W = arena.take<float>(layer.n_in * u.width);
  u.grad_W = arena.take<float>(layer.n_in * u.width);
  for (float** p : {&u.b, &u.grad_b, &u.a, &u.delta}) *p = arena.take<float>(u.width);
  u.inputs.offset = arena.take<uint32_t>(layer.n_in + 8);
  u.inputs.value = arena.take<float>(layer.n_in + 8);
  u.touched = arena.take<uint8_t>(layer.n_in / 8 + 1);
}

// Copy the parameters in, transposed; whether all are finite.
bool load(Unit& u) {
  const Layer& l = u.layer;
  float check = 0;
  std::memset(u.W, 0, l.n_in * u.width * sizeof(float));
  std::memset(u.grad_W, 0, l.n_in * u.width * sizeof(float));
  for (float* p : {u.b, u.grad_b, u.delta}) std::memset(p, 0, u.width * sizeof(float));
  std::memset(u.touched, 0, l.n_in / 8 + 1);
  for (int64_t k = 0; k < l.n_in; ++k)
    for (int64_t j = 0; j < l.n_out; ++j) {
      const float w = l.W[j * l.W_row + k * l.W_column];
      u.W[k * u.width + j] = w;
      check += 0 * w;
    }
  for (int64_t j = 0; l.b && j < l.n_out; ++j) u.b[j] = l.b[j * l.b_step];
  for (int64_t j = 0; j < l.n_out; ++j) check += 0 * u.b[j];
  return check == 0;
}

bool is_finite(const Unit& u) {
  float check = 0;
  for (int64_t i = 0; i < u.layer.n_in * u.width; ++i) check += 0 * u.W[i];
  for (int64_t j = 0; j < u.width; ++j) check += 0 * u.b[j];
  return check == 0;
}

void store(const Unit& u) {
  const Layer& l = u.layer;
  if (l.trains_W)
    for (int64_t k = 0; k < l.n_in; ++k)
      for (int64_t j = 0; j < l.n_out; ++j)
        l.W[j * l.W_row + k * l.W_column] = u.W[k * u.width + j];
  if (l.trains_b)
    for (int64_t j = 0; j < l.n_out; ++j) l.b[j * l.b_step] = u.b[j];
}

}  // namespace

extern "C" int64_t torchbp_memory(const Layer* layers, int64_t depth) {
  Arena arena{nullptr};
  Unit u;
  for (int64_t l = 0; l < depth; ++l) place(u, layers[l], arena);
  arena.take<Unit>(depth);
  arena.take<float>(2 * u.width);
  return arena.next - static_cast<char*>(nullptr);
}

extern "C" int torchbp_train(const Layer* layers, int64_t depth, const Examples* set,
                             int32_t cost, float lr, float weight_decay, float* costs,
                             void* memory) {
  Arena arena{static_cast<char*>(memory)};
  Unit* units = arena.take<Unit>(depth);
  bool finite = true;
  for (int64_t l = 0; l < depth; ++l) {
    place(units[l], layers[l], arena);
    finite = load(units[l]) && finite;
  }
  if (!finite) return 1;
  Unit &first = units[0], &last = units[depth - 1];
  const int64_t K = last.layer.n_out;
  float* y = arena.take<float>(last.width);
  std::memset(y, 0, last.width * sizeof(float));
  float check = 0;
  for (int64_t begin = 0, batch = 0; begin < set->count; begin += set->batch_size, ++batch) {
    const int64_t end =
        begin + set->batch_size < set->count ? begin + set->batch_size : set->count;
    double C = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = set->order[i];
      if (set->images_are_bytes) {
        const uint8_t* images = static_cast<const uint8_t*>(set->images);
        const int64_t ahead = set->order[i + 4 < set->count ? i + 4 : i];
        for (int64_t k = 0; k < first.layer.n_in; k += 64)
          __builtin_prefetch(images + ahead * set->image_stride + k);
        list_bytes(first, images + row * set->image_stride);
      } else {
        list_floats(first, static_cast<const float*>(set->images) + row * set->image_stride);
      }
      feed_forward(first);
      for (int64_t l = 1; l < depth; ++l) {
        list_floats(units[l], units[l - 1].a);
        feed_forward(units[l]);
      }
      const float* target = y;
      int64_t label = 0;
      if (set->targets_are_labels) {
        label = static_cast<const int64_t*>(set->targets)[row * set->target_stride];
        y[label] = 1;
      } else {
        target = static_cast<const float*>(set->targets) + row * set->target_stride;
      }
      float* delta = last.delta;
      C += cost == QUADRATIC       ? quadratic(delta, last.a, target, K)
           : cost == CROSS_ENTROPY ? cross_entropy(delta, last.a, target, K)
                                   : log_likelihood(delta, last.a, target, K);
      y[label] = 0;
      gate(last.layer.activation, delta, last.a, last.width);  // BP1
      for (int64_t l = depth - 1; l >= 0; --l) {
        accumulate(units[l]);
        if (l) propagate(units[l], units[l - 1]);
        for (int64_t j = 0; j < units[l].width; ++j) check += 0 * units[l].delta[j];
      }
    }
    const float rate = -lr / float(end - begin);
    for (int64_t l = 0; l < depth; ++l) update(units[l], rate, -lr * weight_decay);
    costs[batch] = float(C / double(end - begin));
  }
  for (int64_t l = 0; l < depth; ++l) finite = finite && is_finite(units[l]);
  if (!finite || !(check == 0)) return 1;
  for (int64_t l = 0; l < depth; ++l) store(units[l]);
  return 0;
}
