// Mini-batch SGD as compiled loops: feedforward, BP1-BP4 and the update for thousands of
// mini-batches in one call. torchbp/explicit/kernel.py builds and calls it.
//
// The layers' inputs are taken in groups of four. Most groups of an image are zero (three
// of four in MNIST), and each group has a list of the rows of the batch in which it is
// not. All work on W follows these lists, so that W is read once for a batch, and
// W's part for a group stays in registers or the nearest cache. W lies transposed for the
// length of a call: W[k] are the weights from input k, padded with zeros to whole vectors.
//
// Skipping 0 · W is right only while W is finite. A call that meets a number that is not,
// at its start or later, changes nothing and says so.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

// The widest vectors that the processor has; both GCC and Clang know them.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint8_t EightBytes __attribute__((vector_size(8), aligned(1), may_alias));
constexpr int GROUP = 4;   // inputs
constexpr int WIDEST = 8;  // vectors of a row that one loop handles: they stay in registers
constexpr int64_t SUMMED = 256;  // rows added one by one before the sum is added to others

enum Activation : int32_t { IDENTITY, SIGMOID, TANH, RELU };
enum Cost : int32_t { QUADRATIC, CROSS_ENTROPY, LOG_LIKELIHOOD };
enum Outcome { TRAINED, NOT_FINITE, OUT_OF_MEMORY };

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

// ---------------------------------------------------------------- a layer

int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Zeros that begin at a multiple of 64 bytes.
template <class T>
struct Zeros {
  std::vector<T> memory;
  T* first;
  explicit Zeros(int64_t n) : memory(n + 64 / sizeof(T)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    first = memory.data() + (64 - address % 64) % 64 / sizeof(T);
  }
};

// A layer at work, for batches of m rows.
struct Unit {
  Layer layer;
  int64_t width, groups;  // n_out, padded to whole vectors; groups of inputs
  Zeros<float> W_memory, b_memory, a_memory, delta_memory, x_memory;
  Zeros<int32_t> count_memory, list_memory;
  std::vector<double> error_sum;
  float *W, *b;      // (groups · GROUP, width), (width)
  float *a, *delta;  // (m, width)
  float* x;          // the inputs, (m, x_stride)
  int64_t x_stride, list_stride;
  int32_t *count, *list;  // in how many rows a group is not zero, and in which

  Unit(const Layer& l, int64_t m, const Unit* below)
      : layer(l), width(padded(l.n_out, LANES)), groups(padded(l.n_in, 2 * GROUP) / GROUP),
        W_memory(groups * GROUP * width), b_memory(width), a_memory(m * width),
        delta_memory(m * width), x_memory(below ? 0 : m * groups * GROUP),
        count_memory(groups), list_memory(below ? m : groups * (m + 1)),
        error_sum(width),
        W(W_memory.first), b(b_memory.first), a(a_memory.first), delta(delta_memory.first),
        x(below ? below->a : x_memory.first), x_stride(below ? below->width : groups * GROUP),
        list_stride(below ? 0 : m + 1), count(count_memory.first), list(list_memory.first) {
    if (below) groups = padded(l.n_in, GROUP) / GROUP;
    for (int64_t r = 0; below && r < m; ++r) list[r] = int32_t(r);  // all rows, always
  }

  // W from column `first` on, WIDEST vectors or what is left: rows one behind the other.
  Vector* block(int64_t first) const {
    return reinterpret_cast<Vector*>(W + first * groups * GROUP);
  }
};

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

// a = σ(z) in place for `rows` rows, whose padding stays 0.
void apply_sigma(int32_t activation, float* a, int64_t rows, int64_t width, int64_t n) {
  const int64_t count = rows * width;
  if (activation == SIGMOID)
    for (int64_t i = 0; i < count; ++i) a[i] = sigmoid(a[i]);
  else if (activation == TANH)
    for (int64_t i = 0; i < count; ++i) a[i] = hyperbolic_tangent(a[i]);
  else if (activation == RELU)
    for (int64_t i = 0; i < count; ++i) a[i] = a[i] < 0 ? 0 : a[i];
  if (activation == SIGMOID)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = n; j < width; ++j) a[r * width + j] = 0;
}

// δ = grad_a ⊙ σ'(z) in place, with σ' in terms of a.
void multiply_by_slope(int32_t activation, float* delta, const float* a, int64_t count) {
  if (activation == SIGMOID)
    for (int64_t i = 0; i < count; ++i) delta[i] *= a[i] - a[i] * a[i];  // BP1, BP2
  else if (activation == TANH)
    for (int64_t i = 0; i < count; ++i) delta[i] *= 1.0f - a[i] * a[i];  // BP1, BP2
  else if (activation == RELU)
    for (int64_t i = 0; i < count; ++i) delta[i] = a[i] == 0 ? 0 : delta[i];  // BP1, BP2
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

// ---------------------------------------------------------------- the three products

// z_r += Σ_k x_rk W_k, for the N vectors of a row that begin at column `first`.
template <int N>
void add_inputs(const Unit& u, int64_t first) {
  const int64_t width = u.width, x_stride = u.x_stride, list_stride = u.list_stride;
  float* const out = u.a + first;
  const Vector* W = u.block(first);
  const float* inputs = u.x;
  for (int64_t g = 0; g < u.groups; ++g, W += GROUP * N, inputs += GROUP) {
    const int32_t *row = u.list + g * list_stride, *end = row + u.count[g];
    for (; row < end; ++row) {
      const float* x = inputs + *row * x_stride;
      Vector* z = reinterpret_cast<Vector*>(out + *row * width);
      Vector sum[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[j] = z[j];
#pragma GCC unroll 4
      for (int p = 0; p < GROUP; ++p)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sum[j] += x[p] * W[p * N + j];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) z[j] = sum[j];
    }
  }
}

// sum_p += Σ_r x_rp δ_r over the rows that are listed.
template <int N, int AT_ONCE>
inline void add_outer(Vector (&sum)[AT_ONCE][N], const int32_t* row, const int32_t* end,
                      const float* x, int64_t x_stride, const float* delta, int64_t width) {
  for (; row < end; ++row) {
    const float* x_r = x + *row * x_stride;
    const Vector* delta_r = reinterpret_cast<const Vector*>(delta + *row * width);
#pragma GCC unroll 8
    for (int p = 0; p < AT_ONCE; ++p)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[p][j] += x_r[p] * delta_r[j];  // BP4
  }
}

// W_k += decay W_k + rate Σ_r x_rk δ_r, likewise.
template <int N>
void add_gradient(const Unit& u, int64_t first, float rate, float decay) {
  constexpr int ROOM = REGISTERS * 3 / 4;
  constexpr int AT_ONCE = GROUP * N <= ROOM ? GROUP : 4 * N <= ROOM ? 4 : 2 * N <= ROOM ? 2 : 1;
  const int64_t width = u.width, x_stride = u.x_stride;
  for (int64_t k = 0; k < u.groups * GROUP; k += AT_ONCE) {
    const int64_t g = k / GROUP;
    const int32_t *row = u.list + g * u.list_stride, *end = row + u.count[g];
    if (row == end && decay == 0) continue;
    const float *x = u.x + k, *delta = u.delta + first;
    const int32_t* pause = end - row > SUMMED ? row + SUMMED : end;
    Vector sum[AT_ONCE][N] = {};
    add_outer<N, AT_ONCE>(sum, row, pause, x, x_stride, delta, width);
    while (pause < end) {
      row = pause, pause = end - row > SUMMED ? row + SUMMED : end;
      Vector more[AT_ONCE][N] = {};
      add_outer<N, AT_ONCE>(more, row, pause, x, x_stride, delta, width);
      for (int p = 0; p < AT_ONCE; ++p)
        for (int j = 0; j < N; ++j) sum[p][j] += more[p][j];
    }
#pragma GCC unroll 8
    for (int p = 0; p < AT_ONCE; ++p) {
      Vector* W = u.block(first) + (k + p) * N;
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) W[j] += decay * W[j] + rate * sum[p][j];
    }
  }
}

inline float sum_of(const Vector& v) {
  const Four* quarter = reinterpret_cast<const Four*>(&v);
  Four s = quarter[0];
  for (int i = 1; i < LANES / 4; ++i) s += quarter[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// grad_rk += W_k · δ_r, likewise; `grad` has rows of `stride`.
template <int N>
void add_errors(const Unit& u, int64_t first, int64_t rows, float* grad, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    Vector delta[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
      delta[j] = reinterpret_cast<const Vector*>(u.delta + r * u.width + first)[j];
    const Vector* W = u.block(first);
    for (int64_t k = 0; k < u.layer.n_in; ++k, W += N) {
      Vector sum = W[0] * delta[0];
#pragma GCC unroll 8
      for (int j = 1; j < N; ++j) sum += W[j] * delta[j];
      grad[r * stride + k] += sum_of(sum);
    }
  }
}

struct Loops {
  void (*add_inputs)(const Unit&, int64_t);
  void (*add_gradient)(const Unit&, int64_t, float, float);
  void (*add_errors)(const Unit&, int64_t, int64_t, float*, int64_t);
};

template <int N>
constexpr Loops loops_of = {add_inputs<N>, add_gradient<N>, add_errors<N>};

constexpr Loops LOOPS[WIDEST] = {loops_of<1>, loops_of<2>, loops_of<3>, loops_of<4>,
                                 loops_of<5>, loops_of<6>, loops_of<7>, loops_of<8>};

template <class Visit>
void for_each_block(int64_t width, Visit visit) {
  for (int64_t first = 0; first < width; first += WIDEST * LANES) {
    const int64_t vectors = (width - first) / LANES;
    visit(LOOPS[vectors < WIDEST ? vectors - 1 : WIDEST - 1], first);
  }
}

// ---------------------------------------------------------------- inputs

// Two groups, eight bytes, of row r of the first layer's inputs.
inline void take_bytes(Unit& u, int32_t r, int64_t g, const uint8_t* bytes) {
  const EightBytes pixels = *reinterpret_cast<const EightBytes*>(bytes);
  Eight* x = reinterpret_cast<Eight*>(u.x + r * u.x_stride + g * GROUP);
  *x = __builtin_convertvector(pixels, Eight) * (1.0f / 255);
  for (int half = 0; half < 2; ++half) {
    uint32_t four;
    std::memcpy(&four, bytes + 4 * half, 4);
    int32_t& count = u.count[g + half];
    u.list[(g + half) * u.list_stride + count] = r;
    count += four != 0;
  }
}

void list_bytes(Unit& u, int32_t r, const uint8_t* image, int32_t* found) {
  const int64_t n = u.layer.n_in;
  int64_t count = 0;
  for (int64_t k = 0; k + 8 <= n; k += 8) {  // no branch, which would be guessed wrong
    uint64_t eight;
    std::memcpy(&eight, image + k, 8);
    found[count] = int32_t(k);
    count += eight != 0;
  }
  for (int64_t i = 0; i < count; ++i) take_bytes(u, r, found[i] / GROUP, image + found[i]);
  if (n % 8) {
    uint8_t rest[8] = {};
    std::memcpy(rest, image + n / 8 * 8, n % 8);
    take_bytes(u, r, n / 8 * 8 / GROUP, rest);
  }
}

void list_floats(Unit& u, int32_t r, const float* image) {
  float* x = u.x + r * u.x_stride;
  std::memcpy(x, image, u.layer.n_in * sizeof(float));
  for (int64_t g = 0; g < u.groups; ++g) {
    const float* four = x + g * GROUP;
    u.list[g * u.list_stride + u.count[g]] = r;
    u.count[g] += four[0] != 0 || four[1] != 0 || four[2] != 0 || four[3] != 0;
  }
}

void take_inputs(Unit& u, const Examples& set, int64_t begin, int64_t rows, int32_t* found) {
  std::memset(u.count, 0, u.groups * sizeof(int32_t));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = begin + r, at = set.order[i] * set.image_stride;
    if (!set.images_are_bytes) {
      list_floats(u, int32_t(r), static_cast<const float*>(set.images) + at);
      continue;
    }
    const uint8_t* images = static_cast<const uint8_t*>(set.images);
    const int64_t later = i + 8 < set.count ? i + 8 : i;  // what memory is slow to bring
    for (int64_t k = 0; k < u.layer.n_in; k += 64)
      __builtin_prefetch(images + set.order[later] * set.image_stride + k);
    list_bytes(u, int32_t(r), images + at, found);
  }
}

// ---------------------------------------------------------------- the algorithm

void feed_forward(Unit& u, int64_t rows) {
  for (int64_t g = 0; u.list_stride == 0 && g < u.groups; ++g) u.count[g] = int32_t(rows);
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(u.a + r * u.width, u.b, u.width * sizeof(float));
  for_each_block(u.width, [&](const Loops& l, int64_t first) { l.add_inputs(u, first); });
  apply_sigma(u.layer.activation, u.a, rows, u.width, u.layer.n_out);
}

// δ^L and the sum of the costs.
double output_error(Unit& u, const Examples& set, int32_t cost, int64_t begin, int64_t rows,
                    float* y) {
  const int64_t K = u.layer.n_out;
  double C = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = set.order[begin + r] * set.target_stride;
    int64_t label = 0;
    const float* target = y;
    if (set.targets_are_labels)
      y[label = static_cast<const int64_t*>(set.targets)[at]] = 1;
    else
      target = static_cast<const float*>(set.targets) + at;
    float *grad = u.delta + r * u.width, *outputs = u.a + r * u.width;
    C += cost == QUADRATIC       ? quadratic(grad, outputs, target, K)
         : cost == CROSS_ENTROPY ? cross_entropy(grad, outputs, target, K)
                                 : log_likelihood(grad, outputs, target, K);
    y[label] = 0;
  }
  multiply_by_slope(u.layer.activation, u.delta, u.a, rows * u.width);  // BP1
  return C;
}

// δ of the layer below.
void propagate(const Unit& u, Unit& below, int64_t rows) {
  std::memset(below.delta, 0, rows * below.width * sizeof(float));
  for_each_block(u.width, [&](const Loops& l, int64_t first) {
    l.add_errors(u, first, rows, below.delta, below.width);  // BP2
  });
  multiply_by_slope(below.layer.activation, below.delta, below.a, rows * below.width);
}

void update(Unit& u, int64_t rows, float lr, float weight_decay) {
  const float rate = -lr / float(rows);
  if (u.layer.trains_W)
    for_each_block(u.width, [&](const Loops& l, int64_t first) {
      l.add_gradient(u, first, rate, -lr * weight_decay);
    });
  if (!u.layer.trains_b) return;
  const int64_t width = u.width;
  double* sum = u.error_sum.data();
  std::memset(sum, 0, width * sizeof(double));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < width; ++j) sum[j] += u.delta[r * width + j];  // BP3
  for (int64_t j = 0; j < width; ++j) u.b[j] += rate * float(sum[j]);
}

// 0 if all are finite, else NaN; `count` is a multiple of LANES.
float zero_times(const float* v, int64_t count) {
  const Vector *next = reinterpret_cast<const Vector*>(v), *end = next + count / LANES;
  Vector sum[4] = {};
  for (; next + 4 <= end; next += 4)
    for (int i = 0; i < 4; ++i) sum[i] += 0.0f * next[i];
  for (; next < end; ++next) sum[0] += 0.0f * *next;
  return sum_of(sum[0] + sum[1] + (sum[2] + sum[3]));
}

// Visit every weight: torch's, and ours in the transposed blocks; some rows at a time,
// so that neither side leaves the nearest cache.
template <class Visit>
void for_each_weight(const Unit& u, Visit visit) {
  const Layer& l = u.layer;
  for (int64_t first = 0; first < l.n_out; first += WIDEST * LANES) {
    const int64_t left = u.width - first, N = left < WIDEST * LANES ? left : WIDEST * LANES;
    const int64_t columns = l.n_out - first < N ? l.n_out - first : N;
    float* block = u.W + first * u.groups * GROUP;
    for (int64_t k = 0; k < l.n_in; k += 16) {
      const int64_t end = k + 16 < l.n_in ? k + 16 : l.n_in;
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = k; i < end; ++i)
          visit(l.W[(first + j) * l.W_row + i * l.W_column], block[i * N + j]);
    }
  }
}

// Copy the parameters in; 0 if all are finite, else NaN.
float load(Unit& u) {
  const Layer& l = u.layer;
  for_each_weight(u, [](float torchs, float& ours) { ours = torchs; });
  for (int64_t j = 0; l.b && j < l.n_out; ++j) u.b[j] = l.b[j * l.b_step];
  return zero_times(u.W, u.groups * GROUP * u.width) + zero_times(u.b, u.width);
}

void store(const Unit& u) {
  const Layer& l = u.layer;
  if (l.trains_W) for_each_weight(u, [](float& torchs, float ours) { torchs = ours; });
  for (int64_t j = 0; l.trains_b && j < l.n_out; ++j) l.b[j * l.b_step] = u.b[j];
}

int train(const Layer* layers, int64_t depth, const Examples& set, int32_t cost, float lr,
          float weight_decay, float* costs) {
  std::vector<Unit> units;
  units.reserve(depth);
  float check = 0;
  for (int64_t l = 0; l < depth; ++l) {
    units.emplace_back(layers[l], set.batch_size, l ? &units[l - 1] : nullptr);
    check += load(units[l]);
  }
  if (!(check == 0)) return NOT_FINITE;
  Unit& last = units.back();
  Zeros<float> y(last.width);
  Zeros<int32_t> found(units[0].groups);
  for (int64_t begin = 0; begin < set.count; begin += set.batch_size) {
    const int64_t left = set.count - begin;
    const int64_t rows = left < set.batch_size ? left : set.batch_size;
    take_inputs(units[0], set, begin, rows, found.first);
    for (Unit& u : units) feed_forward(u, rows);
    const double C = output_error(last, set, cost, begin, rows, y.first);
    for (int64_t l = depth - 1; l >= 0; --l) {
      if (l) propagate(units[l], units[l - 1], rows);
      check += zero_times(units[l].delta, rows * units[l].width);
      update(units[l], rows, lr, weight_decay);
    }
    *costs++ = float(C / double(rows));
  }
  for (const Unit& u : units)
    check += zero_times(u.W, u.groups * GROUP * u.width) + zero_times(u.b, u.width);
  if (!(check == 0)) return NOT_FINITE;
  for (const Unit& u : units) store(u);
  return TRAINED;
}

}  // namespace

// One update of the layers' parameters for each mini-batch; their costs. Whatever is
// returned but TRAINED, no parameter has changed.
extern "C" int torchbp_train(const Layer* layers, int64_t depth, const Examples* set,
                             int32_t cost, float lr, float weight_decay, float* costs) {
  try {
    return train(layers, depth, *set, cost, lr, weight_decay, costs);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}
