// Mini-batch SGD as compiled loops: feedforward, BP1-BP4 and the update, for thousands of
// mini-batches in one call. kernel.py beside this file builds and calls it.
//
// The inputs of a layer are taken in groups of four. Each group of the first layer has a
// list of the rows of the batch in which it is not zero: a quarter of them in MNIST. All
// work on W follows these lists, group by group, so W is read once for a whole batch, and
// the part in use stays in registers. During a call W is stored transposed: W_k are the
// weights from input k to all neurons, padded with zeros to whole vectors.
//
// To transpose the first layer's W takes longer than the step of one small mini-batch. A
// call of one such mini-batch works on that W in place, zeros included.
//
// Skipping 0 · W is right only while W is finite. A call that meets a number that is not
// finite, in its parameters or in δ, changes nothing and returns NOT_FINITE.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The interface, which kernel.py repeats.
extern "C" {
enum Activation : int32_t { IDENTITY, SIGMOID, TANH, RELU };
enum Cost : int32_t { QUADRATIC, CROSS_ENTROPY, LOG_LIKELIHOOD };
enum Outcome : int32_t { TRAINED, NOT_FINITE, OUT_OF_MEMORY };

struct Layer {
  float *W, *b;                        // (n_out, n_in), and (n_out) or null
  int64_t W_row, b_step, n_in, n_out;  // strides are in items, as below
  int32_t activation, trains_W, trains_b;
};

struct Examples {
  const void *images, *targets;  // uint8, read as x / 255, or float; int64 labels or float
  const int64_t* order;          // the examples, as rows of both
  int64_t count, batch_size, image_stride, target_stride;
  int32_t images_are_bytes, targets_are_labels;
};
}

namespace {

// The processor's widest vectors, in a notation that GCC and Clang share.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES), may_alias));
typedef float Four __attribute__((vector_size(16), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int GROUP = 4;          // inputs
constexpr int WIDEST = 8;         // most vectors of a row that one loop holds in registers
constexpr int64_t SUMMED = 256;   // rows whose sum is made before it is added to others
constexpr int64_t IN_PLACE = 32;  // most rows of a mini-batch that works on W in place

Vector* vectors(float* p) { return reinterpret_cast<Vector*>(p); }
int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// n zeros that begin at a multiple of 64 bytes.
struct alignas(64) Line { char bytes[64]; };
template <class T>
struct Zeros {
  std::vector<Line> lines;
  explicit Zeros(int64_t n) : lines(padded(n * sizeof(T), 64) / 64) {}
  operator T*() { return reinterpret_cast<T*>(lines.data()); }
};

// The buffers of a layer for batches of m rows. After these rows, a and the images have one
// or two rows of zeros, to an even number.
struct Unit {
  Layer layer;
  bool is_in_place;                     // whether the loops work on W where it is
  int64_t width, groups;                // n_out, padded to whole vectors; groups of inputs
  Zeros<float> W, b, a, delta, images;  // W by `block`, a and delta (m, width)
  Zeros<double> error_sum;
  Zeros<int32_t> count, list;  // in how many rows a group is not zero, and in which
  float* x;                    // the inputs, (m, x_stride): images, or a of the layer below
  int64_t x_stride, list_stride;

  Unit(const Layer& l, int64_t m, Unit* below, bool in_place)
      : layer(l), is_in_place(in_place), width(padded(l.n_out, LANES)),
        groups(padded(l.n_in, GROUP) / GROUP), W(in_place ? 0 : groups * GROUP * width),
        b(width), a(padded(m + 1, 2) * width), delta(m * width),
        images(below ? 0 : padded(m + 1, 2) * padded(l.n_in, LANES)), error_sum(width),
        count(groups), list(below ? m : groups * (m + 1)), x(below ? below->a : images),
        x_stride(below ? below->width : padded(l.n_in, LANES)),
        list_stride(below ? 0 : m + 1) {
    for (int64_t r = 0; below && r < m; ++r) list[r] = int32_t(r);  // every group, every row
  }

  // The part of W that begins at column `first`: WIDEST vectors or fewer, row after row.
  float* block(int64_t first) { return W + first * groups * GROUP; }
};

// ---------------------------------------------------------------- σ, σ' and the costs

// e^x for x <= 0, to about 2 units in the last place; e^-87 for x < -87.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;                         // NaN stays NaN
  const float shifted = x * 1.44269504f + 12582912.0f;  // + 1.5 · 2^23: an integer, rounded
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693145752f - n * 1.42860677e-6f;  // x - n ln 2
  float p = 1.0f / 720;
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;  // the lowest bits of `shifted` are n; these are 2^n
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float z) {
  const float e = exponential(-std::fabs(z)), r = 1.0f / (1.0f + e);
  return z < 0 ? e * r : r;
}

inline float hyperbolic_tangent(float z) {
  const float e = exponential(-2.0f * std::fabs(z)), far = 1.0f - 2.0f * e / (1.0f + e);
  const float s = z * z;
  float p = -5.70498872745e-3f;  // tanh z = z + z³ p(z²) near 0, from Cephes
  for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = p * s + c;
  return std::fabs(z) < 0.625f ? z + z * s * p : z < 0 ? -far : far;
}

// a = σ(z) in place. The padding of a row stays 0.
void apply_sigma(Unit& u, int64_t rows) {
  float *const a = u.a, *const end = a + rows * u.width;
  if (u.layer.activation == TANH) std::transform(a, end, a, hyperbolic_tangent);
  if (u.layer.activation == RELU) std::transform(a, end, a, [](float z) { return z < 0 ? 0 : z; });
  if (u.layer.activation != SIGMOID) return;
  std::transform(a, end, a, sigmoid);
  for (float* row = a; row < end; row += u.width)
    std::fill(row + u.layer.n_out, row + u.width, 0.0f);
}

// δ = grad_a ⊙ σ'(z) in place, σ' in terms of a.
void multiply_by_slope(Unit& u, int64_t rows) {
  float *const delta = u.delta, *const end = delta + rows * u.width;
  const auto apply = [=, &u](auto product) { std::transform(delta, end, u.a + 0, delta, product); };
  if (u.layer.activation == SIGMOID) apply([](float d, float a) { return d * (a - a * a); });
  if (u.layer.activation == TANH) apply([](float d, float a) { return d * (1 - a * a); });
  if (u.layer.activation == RELU) apply([](float d, float a) { return a == 0 ? 0 : d; });
}

// Each cost writes ∇C_x for a row of outputs with target y, and returns C_x.

double quadratic(float* grad, const float* a, const float* y, int64_t K) {
  double C = 0;
  for (int64_t j = 0; j < K; ++j) grad[j] = a[j] - y[j], C += 0.5 * grad[j] * grad[j];
  return C;
}

// Both avoid the cancellation of σ(z) - y or softmax(z) - y where the outputs are near y.
double cross_entropy(float* grad, const float* z, const float* y, int64_t K) {
  double C = 0, product = 0;  // Σ ln (1 + e_j) = ln Π (1 + e_j), which is 1 + product
  for (int64_t j = 0; j < K; ++j) {
    const float e = exponential(-std::fabs(z[j])), r = 1.0f / (1.0f + e);
    grad[j] = z[j] < 0 ? (1 - y[j]) * (e * r) - y[j] * r : (1 - y[j]) * r - y[j] * (e * r);
    C += (z[j] < 0 ? 0.0f : z[j]) - y[j] * double(z[j]);
    product += e + product * e;
    if (product > 1e30) C += std::log1p(product), product = 0;
  }
  return C + std::log1p(product);
}

double log_likelihood(float* grad, const float* z, const float* y, int64_t K) {
  const int64_t top = std::max_element(z, z + K) - z;
  float rest = 0, sum_y = 0;
  for (int64_t j = 0; j < K; ++j) {
    grad[j] = exponential(z[j] - z[top]);
    rest += j == top ? 0 : grad[j];
    sum_y += y[j];
  }
  const double log_total = std::log1p(double(rest));
  double C = 0;
  for (int64_t j = 0; j < K; ++j) {
    const float p = grad[j] / (1 + rest), q = j == top ? rest / (1 + rest) : 1 - p;
    if (y[j] != 0) C -= y[j] * (double(z[j]) - z[top] - log_total);
    grad[j] = p * (sum_y - y[j]) - y[j] * q;
  }
  return C;
}

// ---------------------------------------------------------------- a layer's three products

// z_r += Σ_k x_rk W_k, for the N vectors of a row that begin at column `first`.
template <int N>
void add_inputs(Unit& u, int64_t first) {
  const int64_t width = u.width, x_stride = u.x_stride;
  float* const out = u.a + first;
  for (int64_t g = 0; g < u.groups; ++g) {
    const float* inputs = u.x + g * GROUP;
    const Vector* W = vectors(u.block(first)) + g * GROUP * N;
    const int32_t *row = u.list + g * u.list_stride, *end = row + u.count[g];
    for (; row < end; ++row) {
      const float* x = inputs + *row * x_stride;
      Vector* z = vectors(out + *row * width);
      Vector sum[N];
      for (int j = 0; j < N; ++j) sum[j] = z[j];
      for (int p = 0; p < GROUP; ++p)
        for (int j = 0; j < N; ++j) sum[j] += x[p] * W[p * N + j];
      for (int j = 0; j < N; ++j) z[j] = sum[j];
    }
  }
}

// W_k += decay W_k + rate Σ_r x_rk δ_r, for the same part of a row, SIZE inputs at once.
template <int N>
void add_gradient(Unit& u, int64_t first, float rate, float decay) {
  constexpr int SIZE = 4 * N < REGISTERS - 4 ? 4 : 2 * N < REGISTERS - 4 ? 2 : 1;
  const int64_t width = u.width, x_stride = u.x_stride;
  for (int64_t k = 0; k < u.groups * GROUP; k += SIZE) {
    const int64_t g = k / GROUP;
    const int32_t *row = u.list + g * u.list_stride, *end = row + u.count[g];
    if (row == end && decay == 0) continue;
    float *x = u.x + k, *delta = u.delta + first;
    const auto add_rows = [&](Vector(&sum)[SIZE][N]) {  // of SUMMED rows at most
      for (const int32_t* stop = row + std::min<int64_t>(end - row, SUMMED); row < stop; ++row) {
        const float* x_r = x + *row * x_stride;
        const Vector* delta_r = vectors(delta + *row * width);
        for (int p = 0; p < SIZE; ++p)
          for (int j = 0; j < N; ++j) sum[p][j] += x_r[p] * delta_r[j];  // BP4
      }
    };
    Vector sum[SIZE][N] = {};
    add_rows(sum);
    while (row < end) {
      Vector more[SIZE][N] = {};
      add_rows(more);
      for (int p = 0; p < SIZE; ++p)
        for (int j = 0; j < N; ++j) sum[p][j] += more[p][j];
    }
    Vector* W = vectors(u.block(first)) + k * N;
    for (int p = 0; p < SIZE; ++p)
      for (int j = 0; j < N; ++j) W[p * N + j] += decay * W[p * N + j] + rate * sum[p][j];
  }
}

inline float sum_of(const Vector& v) {
  const Four* part = reinterpret_cast<const Four*>(&v);
  Four s = part[0];
  for (int i = 1; i < LANES / 4; ++i) s += part[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// grad_rk += W_k · δ_r, for the same part of a row.
template <int N>
void add_errors(Unit& u, int64_t first, int64_t rows, float* grad, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    Vector delta[N];
    for (int j = 0; j < N; ++j) delta[j] = vectors(u.delta + r * u.width + first)[j];
    const Vector* W = vectors(u.block(first));
    for (int64_t k = 0; k < u.layer.n_in; ++k, W += N) {
      Vector sum = W[0] * delta[0];
      for (int j = 1; j < N; ++j) sum += W[j] * delta[j];
      grad[r * stride + k] += sum_of(sum);  // BP2
    }
  }
}

// A vector of n numbers from any address, and zeros where n < LANES.
inline Vector load(const float* p, int64_t n) {
  if (n >= LANES) return *reinterpret_cast<const Unaligned*>(p);
  Vector v = {};
  if (n > 0) std::memcpy(&v, p, n * sizeof(float));
  return v;
}

// Write the first n numbers of v.
inline void store(float* p, const Vector& v, int64_t n) {
  if (n >= LANES) *reinterpret_cast<Unaligned*>(p) = v;
  else if (n > 0) std::memcpy(p, &v, n * sizeof(float));
}

// z_r += W x_r with W in place, four rows of W and two of the batch at once. The row of
// zeros after the batch gets z = 0, or NaN where a weight is not finite: return its sum.
float add_inputs_in_place(Unit& u, int64_t rows) {
  const int64_t n_in = u.layer.n_in, n_out = u.layer.n_out;
  for (int64_t j = 0; j < n_out; j += 4) {
    const float* W[4];
    for (int p = 0; p < 4; ++p) W[p] = u.layer.W + std::min(j + p, n_out - 1) * u.layer.W_row;
    for (int64_t r = 0; r <= rows; r += 2) {
      float *const x = u.x + r * u.x_stride, *const next = x + u.x_stride;
      Vector sum[4][2] = {};
      const auto add = [&](int64_t k, int64_t n) {
        for (int p = 0; p < 4; ++p) {
          const Vector W_k = load(W[p] + k, n);
          sum[p][0] += W_k * *vectors(x + k);
          sum[p][1] += W_k * *vectors(next + k);
        }
      };
      int64_t k = 0;
      for (; k + LANES <= n_in; k += LANES) add(k, LANES);
      if (k < n_in) add(k, n_in - k);
      for (int q = 0; q < 2; ++q)
        for (int p = 0; p < 4 && j + p < n_out; ++p)
          u.a[(r + q) * u.width + j + p] += sum_of(sum[p][q]);
    }
  }
  float check = 0;
  for (int64_t j = 0; j < n_out; ++j) check += u.a[rows * u.width + j];
  return check;
}

// W += decay W + rate δᵀx with W in place, four rows of W and two vectors of each at once.
void add_gradient_in_place(Unit& u, int64_t rows, float rate, float decay) {
  const int64_t n_in = u.layer.n_in, n_out = u.layer.n_out;
  for (int64_t j = 0; j < n_out; j += 4)
    for (int64_t k = 0; k < n_in; k += 2 * LANES) {
      Vector sum[4][2] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const float* delta = u.delta + r * u.width + j;
        const Vector* x = vectors(u.x + r * u.x_stride + k);
        for (int p = 0; p < 4; ++p)
          for (int q = 0; q < 2; ++q) sum[p][q] += delta[p] * x[q];  // BP4
      }
      for (int p = 0; p < 4 && j + p < n_out; ++p)
        for (int q = 0; q < 2; ++q) {
          float* W = u.layer.W + (j + p) * u.layer.W_row + k + q * LANES;
          const int64_t n = n_in - k - q * LANES;
          const Vector before = load(W, n);
          store(W, before + decay * before + rate * sum[p][q], n);
        }
    }
}

struct Loops {
  void (*add_inputs)(Unit&, int64_t);
  void (*add_gradient)(Unit&, int64_t, float, float);
  void (*add_errors)(Unit&, int64_t, int64_t, float*, int64_t);
};
template <int N>
constexpr Loops loops_of = {add_inputs<N>, add_gradient<N>, add_errors<N>};
constexpr Loops LOOPS[WIDEST] = {loops_of<1>, loops_of<2>, loops_of<3>, loops_of<4>,
                                 loops_of<5>, loops_of<6>, loops_of<7>, loops_of<8>};

// Call visit(loops, first column) for each part of a row, with the loops for its width.
template <class Visit>
void for_each_part(Unit& u, Visit visit) {
  for (int64_t first = 0; first < u.width; first += WIDEST * LANES)
    visit(LOOPS[std::min<int64_t>((u.width - first) / LANES, WIDEST) - 1], first);
}

// ---------------------------------------------------------------- a mini-batch

// Copy the images of a mini-batch, and list the rows in which a group is not zero, without
// a branch, which would be mispredicted.
template <class Pixel>
void take_images(Unit& u, const Examples& set, int64_t begin, int64_t rows) {
  const float scale = set.images_are_bytes ? 1.0f / 255 : 1.0f;
  const Pixel* images = static_cast<const Pixel*>(set.images);
  const int64_t n = u.layer.n_in;
  int32_t *const __restrict__ count = u.count, *const __restrict__ list = u.list;
  std::memset(count, 0, u.groups * sizeof(int32_t));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = begin + r, later = std::min(i + 8, set.count - 1);
    for (int64_t k = 0; k < n; k += 64 / sizeof(Pixel))  // fetch a later image
      __builtin_prefetch(images + set.order[later] * set.image_stride + k);
    const Pixel* const __restrict__ image = images + set.order[i] * set.image_stride;
    float* const __restrict__ x = u.x + r * u.x_stride;
    for (int64_t k = 0; k < n; ++k) x[k] = scale * float(image[k]);
    if (u.is_in_place) continue;
    for (int64_t g = 0; g < u.groups; ++g) {
      uint64_t bits[2];
      std::memcpy(bits, x + g * GROUP, sizeof bits);
      list[g * u.list_stride + count[g]] = int32_t(r);
      count[g] += (bits[0] | bits[1]) != 0;
    }
  }
}

// Make z and a. Return 0, or NaN if a weight of a W in place is not finite.
float feed_forward(Unit& u, int64_t rows) {
  float check = 0;
  if (u.list_stride == 0) std::fill_n(+u.count, u.groups, int32_t(rows));
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(u.a + r * u.width, u.b, u.width * sizeof(float));
  if (u.is_in_place) check = add_inputs_in_place(u, rows);
  else for_each_part(u, [&](const Loops& l, int64_t first) { l.add_inputs(u, first); });
  apply_sigma(u, rows);
  return check;
}

// Make δ^L; return the sum of the costs.
double output_error(Unit& u, const Examples& set, int32_t cost, int64_t begin, int64_t rows,
                    float* one_hot) {
  constexpr decltype(&quadratic) of[] = {quadratic, cross_entropy, log_likelihood};
  double C = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = set.order[begin + r] * set.target_stride;
    const float* y = static_cast<const float*>(set.targets) + at;
    float* hot = one_hot;
    if (set.targets_are_labels) hot += static_cast<const int64_t*>(set.targets)[at], y = one_hot;
    *hot = 1;
    C += of[cost](u.delta + r * u.width, u.a + r * u.width, y, u.layer.n_out);
    *hot = 0;
  }
  multiply_by_slope(u, rows);  // BP1
  return C;
}

// Make the δ of the layer below.
void propagate(Unit& u, Unit& below, int64_t rows) {
  std::memset(below.delta, 0, rows * below.width * sizeof(float));
  for_each_part(u, [&](const Loops& l, int64_t first) {
    l.add_errors(u, first, rows, below.delta, below.width);
  });
  multiply_by_slope(below, rows);  // BP2
}

// Update b, and W if it is not in place.
void update(Unit& u, int64_t rows, float lr, float weight_decay) {
  const float rate = -lr / float(rows), decay = -lr * weight_decay;
  if (u.layer.trains_W && !u.is_in_place)
    for_each_part(u, [&](const Loops& l, int64_t first) { l.add_gradient(u, first, rate, decay); });
  if (!u.layer.trains_b) return;
  double* const sum = u.error_sum;
  std::fill(sum, sum + u.width, 0.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < u.width; ++j) sum[j] += u.delta[r * u.width + j];  // BP3
  for (int64_t j = 0; j < u.width; ++j) u.b[j] += rate * float(sum[j]);
}

// ---------------------------------------------------------------- a call

// 0 if all numbers are finite, else NaN.
float zero_times(Zeros<float>& v) {
  Vector sum[2] = {};
  for (size_t i = 0; i < v.lines.size() * 16 / LANES; ++i) sum[i % 2] += 0.0f * vectors(v)[i];
  return sum_of(sum[0] + sum[1]);
}

// Copy W from torch's memory (INTO_OURS) or back, in tiles of 4 x 4 that it transposes.
template <bool INTO_OURS>
void copy_weights(Unit& u) {
  const int64_t n_in = u.layer.n_in, n_out = u.layer.n_out, stride = u.layer.W_row;
  for (int64_t j = 0; j < n_out; j += 4) {
    const int64_t first = j - j % (WIDEST * LANES);
    const int64_t step = std::min<int64_t>(u.width - first, WIDEST * LANES);
    for (int64_t k = 0; k < n_in; k += 4) {
      float* __restrict__ theirs = u.layer.W + j * stride + k;
      float* __restrict__ ours = u.block(first) + k * step + j - first;
      const auto copy = [=](int64_t rows, int64_t columns) {
        float tile[4][4];
        for (int p = 0; p < rows; ++p)
          for (int q = 0; q < columns; ++q)
            tile[q][p] = INTO_OURS ? theirs[p * stride + q] : ours[q * step + p];
        for (int q = 0; q < columns; ++q)
          for (int p = 0; p < rows; ++p)
            (INTO_OURS ? ours[q * step + p] : theirs[p * stride + q]) = tile[q][p];
      };
      const int64_t rows = std::min<int64_t>(n_out - j, 4), columns = std::min<int64_t>(n_in - k, 4);
      rows == 4 && columns == 4 ? copy(4, 4) : copy(rows, columns);  // constants make vectors
    }
  }
}

}  // namespace

// Update the parameters once for each mini-batch, and write the costs of the mini-batches.
// Unless this returns TRAINED, no parameter has changed.
extern "C" int32_t torchbp_train(const Layer* layers, int64_t depth, const Examples* examples,
                                 int32_t cost, float lr, float weight_decay, float* costs) try {
  const Examples& set = *examples;
  std::vector<Unit> units;
  units.reserve(depth);
  float check = 0;
  const bool in_place = set.count <= std::min(set.batch_size, IN_PLACE);
  for (int64_t l = 0; l < depth; ++l) {
    units.emplace_back(layers[l], set.batch_size, l ? &units[l - 1] : nullptr, !l && in_place);
    Unit& u = units[l];
    if (!u.is_in_place) copy_weights<true>(u);
    for (int64_t j = 0; u.layer.b && j < u.layer.n_out; ++j)
      u.b[j] = u.layer.b[j * u.layer.b_step];
    check += zero_times(u.W) + zero_times(u.b);
  }
  if (!(check == 0)) return NOT_FINITE;
  Zeros<float> one_hot(units.back().width);
  const auto take = set.images_are_bytes ? take_images<uint8_t> : take_images<float>;
  for (int64_t begin = 0; begin < set.count; begin += set.batch_size) {
    const int64_t rows = std::min(set.batch_size, set.count - begin);
    take(units[0], set, begin, rows);
    for (Unit& u : units) check += feed_forward(u, rows);
    const double C = output_error(units.back(), set, cost, begin, rows, one_hot);
    for (int64_t l = depth - 1; l >= 0; --l) {
      if (l) propagate(units[l], units[l - 1], rows);
      check += zero_times(units[l].delta);
      update(units[l], rows, lr, weight_decay);
    }
    *costs++ = float(C / double(rows));
  }
  for (Unit& u : units) check += zero_times(u.W) + zero_times(u.b);
  if (!(check == 0)) return NOT_FINITE;
  for (Unit& u : units) {
    const Layer& l = u.layer;
    if (l.trains_W && u.is_in_place)
      add_gradient_in_place(u, set.count, -lr / float(set.count), -lr * weight_decay);
    else if (l.trains_W) copy_weights<false>(u);
    for (int64_t j = 0; l.trains_b && j < l.n_out; ++j) l.b[j * l.b_step] = u.b[j];
  }
  return TRAINED;
} catch (...) {  // std::bad_alloc, or std::length_error
  return OUT_OF_MEMORY;
}
