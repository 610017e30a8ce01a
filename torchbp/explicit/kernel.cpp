// Mini-batch SGD as compiled loops: feedforward, BP1-BP4 and the update, for thousands of
// mini-batches in one call. kernel.py beside this file builds and calls it.
//
// During a call W is stored transposed: W_k are the weights from input k to all neurons.
// Inputs are taken in groups of four. Each group of the first layer has a list of the rows
// of the batch in which it is not zero: a quarter of them in MNIST. All work on W follows
// these lists, group by group, so W is read once for a whole batch, and the part in use
// stays in registers.
//
// To transpose the first layer's W takes longer than the step of one small mini-batch. A
// call of one such mini-batch works on that W in place, zeros included: in the three
// products below, inputs and neurons change places.
//
// Skipping 0 · W is right only while W is finite. A call that meets a number that is not
// finite, in its parameters, in z or in δ, changes nothing and returns NOT_FINITE.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

// The interface, which kernel.py repeats.
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

int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows of whole vectors, padded with zeros; a view of them.
struct Matrix {
  float* at;
  int64_t rows, width, stride;
  float* row(int64_t r) const { return at + r * stride; }
};

Vector* vectors(float* p) { return reinterpret_cast<Vector*>(p); }
Unaligned* unaligned(float* p) { return reinterpret_cast<Unaligned*>(p); }

// The memory of a call: zeros, which begin at multiples of 64 bytes.
struct Memory {
  struct alignas(64) Line { char bytes[64]; };
  std::vector<std::vector<Line>> blocks;

  template <class T>
  T* zeros(int64_t n) {
    blocks.emplace_back(padded(n * sizeof(T), 64) / 64);
    return reinterpret_cast<T*>(blocks.back().data());
  }
  Matrix matrix(int64_t rows, int64_t columns) {
    const int64_t width = padded(columns, LANES);
    return {zeros<float>(padded(rows, GROUP) * width), rows, width, width};
  }
};

// A list of rows for each group of inputs, behind the number of these rows. The lists lie
// `stride` numbers apart; if that is 0, all groups have one list.
struct Lists {
  int32_t* at;
  int64_t stride;
  int32_t* of(int64_t k) const { return at + k / GROUP * stride; }
};

// A layer, and its buffers for batches of m rows.
struct Unit {
  Layer layer;
  bool is_in_place;
  Matrix theirs, W, b, a, delta, x;  // `theirs` is torch's W; x are the inputs
  Lists lists;                       // of the rows in which inputs are not zero

  Unit(Memory& memory, const Layer& l, int64_t m, const Unit* below, Lists all, bool in_place)
      : layer(l), is_in_place(in_place), theirs{l.W, l.n_out, l.n_in, l.W_row},
        W(in_place ? theirs : memory.matrix(l.n_in, l.n_out)), b(memory.matrix(1, l.n_out)),
        a(memory.matrix(m, l.n_out)), delta(memory.matrix(m, l.n_out)),
        x(below ? below->a : memory.matrix(m, l.n_in)), lists(all) {
    const int64_t stride = m + 1, groups = padded(l.n_in, GROUP) / GROUP;
    if (!below && !in_place) lists = {memory.zeros<int32_t>(groups * stride), stride};
  }
};

// ---------------------------------------------------------------- σ, σ' and the costs

// e^x for x <= 0, to about 2 units in the last place; e^-87 for x < -87.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;                         // NaN stays NaN
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23 + an integer, n
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693145752f - n * 1.42860677e-6f;  // x - n ln 2
  float p = 1.0f / 720;
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  union { float number; uint32_t bits; } power = {shifted};
  power.bits = (power.bits + 127) << 23;  // the lowest bits of `shifted` are n: 2^n
  return p * power.number;
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

// a = σ(z) in place.
void apply_sigma(Unit& u, int64_t rows) {
  float *const a = u.a.at, *const end = u.a.row(rows);
  const auto apply = [=](auto sigma) { std::transform(a, end, a, sigma); };
  if (u.layer.activation == SIGMOID) apply(sigmoid);
  if (u.layer.activation == TANH) apply(hyperbolic_tangent);
  if (u.layer.activation == RELU) apply([](float z) { return z < 0 ? 0 : z; });
}

// δ = grad_a ⊙ σ'(z) in place, σ' in terms of a.
void multiply_by_slope(Unit& u, int64_t rows) {
  float *const a = u.a.at, *const delta = u.delta.at, *const end = u.delta.row(rows);
  const auto apply = [=](auto product) { std::transform(delta, end, a, delta, product); };
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
  double C = 0, log_total = std::log1p(double(rest));
  for (int64_t j = 0; j < K; ++j) {
    const float p = grad[j] / (1 + rest), q = j == top ? rest / (1 + rest) : 1 - p;
    if (y[j] != 0) C -= y[j] * (double(z[j]) - z[top] - log_total);
    grad[j] = p * (sum_y - y[j]) - y[j] * q;
  }
  return C;
}

// ---------------------------------------------------------------- three products

// Call visit(N, first) for each part of a row: N vectors that begin at column `first`.
template <int N = WIDEST, class Visit>
void for_each_part(int64_t width, const Visit& visit, int64_t first = 0) {
  for (; width - first >= N * LANES; first += N * LANES)
    visit(std::integral_constant<int, N>(), first);
  if constexpr (N > 1) for_each_part<N - 1>(width, visit, first);
}

// out_r += Σ_p x_rp M_p, for the rows r in the lists.
template <int N>
void add_combinations(Matrix out, Matrix x, Matrix M, Lists lists, int64_t first) {
  for (int64_t k = 0; k < M.rows; k += GROUP) {
    float* const M_k = M.row(k) + first;
    const int32_t *row = lists.of(k), *const last = row + *row;
    while (row < last) {
      const int64_t r = *++row;
      const float* x_r = x.row(r) + k;
      Vector *out_r = vectors(out.row(r) + first), sum[N];
      for (int j = 0; j < N; ++j) sum[j] = out_r[j];
      for (int p = 0; p < GROUP; ++p)
        for (int j = 0; j < N; ++j) sum[j] += x_r[p] * vectors(M_k + p * M.stride)[j];
      for (int j = 0; j < N; ++j) out_r[j] = sum[j];
    }
  }
}

inline float sum_of(Vector v) {
  Four s = {};
  for (int i = 0; i < LANES / 4; ++i) s += reinterpret_cast<const Four*>(&v)[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// 0 if all numbers of a matrix in our memory are finite, else NaN.
float zero_times(Matrix M) {
  Vector sum[GROUP] = {}, *const end = vectors(M.row(padded(M.rows, GROUP)));
  for (Vector* v = vectors(M.at); v < end; v += GROUP)
    for (int p = 0; p < GROUP; ++p) sum[p] += 0.0f * v[p];
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// out_rp += M_p · x_r
template <int N>
void add_dots(Matrix out, Matrix x, Matrix M, int64_t rows, int64_t first) {
  for (int64_t r = 0; r < rows; ++r) {
    Vector x_r[N];
    for (int j = 0; j < N; ++j) x_r[j] = vectors(x.row(r) + first)[j];
    for (int64_t p = 0; p < M.rows; ++p) {
      const Unaligned* M_p = unaligned(M.row(p) + first);
      Vector sum = M_p[0] * x_r[0];
      for (int j = 1; j < N; ++j) sum += M_p[j] * x_r[j];
      out.row(r)[p] += sum_of(sum);
    }
  }
}

// M_p += decay M_p + rate Σ_r x_rp y_r, for SIZE rows of M at once.
template <int N>
void add_products(Matrix M, Matrix x, Matrix y, Lists lists, float rate, float decay,
                  int64_t first) {
  constexpr int SIZE = 4 * N < REGISTERS - 4 ? 4 : 2 * N < REGISTERS - 4 ? 2 : 1;
  for (int64_t k = 0; k < M.rows; k += SIZE) {
    const int32_t *row = lists.of(k), *const last = row + *row;
    if (row == last && decay == 0) continue;
    const auto add_rows = [&](Vector(&sum)[SIZE][N]) {  // SUMMED at most
      for (const int32_t* const stop = std::min(row + SUMMED, last); row < stop;) {
        const int64_t r = *++row;
        const float* x_r = x.row(r) + k;
        const Vector* y_r = vectors(y.row(r) + first);
        for (int p = 0; p < SIZE; ++p)
          for (int j = 0; j < N; ++j) sum[p][j] += x_r[p] * y_r[j];
      }
    };
    Vector sum[SIZE][N] = {};
    add_rows(sum);
    while (row < last) {
      Vector more[SIZE][N] = {};
      add_rows(more);
      for (int p = 0; p < SIZE; ++p)
        for (int j = 0; j < N; ++j) sum[p][j] += more[p][j];
    }
    for (int p = 0; p < SIZE && k + p < M.rows; ++p) {
      Unaligned* M_p = unaligned(M.row(k + p) + first);
      for (int j = 0; j < N; ++j) M_p[j] += decay * M_p[j] + rate * sum[p][j];
    }
  }
}

// ---------------------------------------------------------------- a mini-batch

// Copy the images of a mini-batch, and list the rows in which a group is not zero, without
// a branch, which would be mispredicted.
template <class Pixel>
void take_images(Unit& u, const Examples& set, int64_t begin, int64_t rows) {
  const Pixel* const images = static_cast<const Pixel*>(set.images);
  const float scale = set.images_are_bytes ? 1.0f / 255 : 1.0f;
  const int64_t n = u.layer.n_in, stride = u.lists.stride;
  int32_t *const first = u.lists.at, *const end = u.lists.of(padded(n, GROUP));
  for (int32_t* list = first; list < end; list += stride) *list = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = begin + r, later = std::min(i + 8, set.count - 1);
    for (int64_t k = 0; k < n; k += 64 / sizeof(Pixel))  // fetch a later image
      __builtin_prefetch(images + set.order[later] * set.image_stride + k);
    const Pixel* const __restrict__ image = images + set.order[i] * set.image_stride;
    float *const __restrict__ x = u.x.row(r), *group = x;
    for (int64_t k = 0; k < n; ++k) x[k] = scale * float(image[k]);
    for (int32_t* list = first; list < end; list += stride, group += GROUP) {
      uint64_t bits[2];
      std::memcpy(bits, group, sizeof bits);
      const int32_t count = *list;
      list[count + 1] = int32_t(r);
      *list = count + ((bits[0] | bits[1]) != 0);
    }
  }
}

// Make z and a. Return 0, or NaN if a z is not finite, as with a W in place that is not.
float feed_forward(Unit& u, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(u.b.at, u.b.width, u.a.row(r));
  for_each_part(u.W.width, [&](auto n, int64_t first) {
    u.is_in_place ? add_dots<n>(u.a, u.x, u.W, rows, first)
                  : add_combinations<n>(u.a, u.x, u.W, u.lists, first);
  });
  const float check = zero_times(u.a);
  apply_sigma(u, rows);
  return check;
}

// Make δ^L; return the sum of the costs.
double output_error(Unit& u, const Examples& set, int32_t cost, int64_t begin, int64_t rows,
                    float* one_hot) {
  constexpr decltype(&quadratic) of[] = {quadratic, cross_entropy, log_likelihood};
  const auto* const labels = static_cast<const int64_t*>(set.targets);
  const auto* const numbers = static_cast<const float*>(set.targets);
  double C = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = set.order[begin + r] * set.target_stride;
    float* const hot = one_hot + (set.targets_are_labels ? labels[at] : 0);
    const float* const y = set.targets_are_labels ? one_hot : numbers + at;
    *hot = 1;
    C += of[cost](u.delta.row(r), u.a.row(r), y, u.layer.n_out);
    *hot = 0;
  }
  multiply_by_slope(u, rows);  // BP1
  return C;
}

// Make the δ of the layer below.
void propagate(const Unit& u, Unit& below, int64_t rows) {
  std::fill(below.delta.at, below.delta.row(rows), 0.0f);
  for_each_part(u.W.width, [&](auto n, int64_t first) {
    add_dots<n>(below.delta, u.delta, u.W, rows, first);  // BP2
  });
  multiply_by_slope(below, rows);  // BP2
}

// Update W, and b, which is the weight of an input that is always 1.
void update(Unit& u, Matrix ones, Lists all, float rate, float decay) {
  const Matrix left = u.is_in_place ? u.delta : u.x, right = u.is_in_place ? u.x : u.delta;
  if (u.layer.trains_b)
    for_each_part(u.b.width, [&](auto n, int64_t first) {
      add_products<n>(u.b, ones, u.delta, all, rate, 0, first);  // BP3
    });
  if (u.layer.trains_W)
    for_each_part(u.W.width, [&](auto n, int64_t first) {
      add_products<n>(u.W, left, right, u.lists, rate, decay, first);  // BP4
    });
}

// ---------------------------------------------------------------- a call

// to_ji = from_ij, in squares, which stay in the processor's cache.
void transpose(Matrix from, Matrix to, int64_t rows, int64_t columns) {
  constexpr int64_t SQUARE = 16;
  for (int64_t column = 0; column < columns; column += SQUARE)
    for (int64_t row = 0; row < rows; row += SQUARE)
      for (int64_t j = column; j < std::min(column + SQUARE, columns); ++j)
        for (int64_t i = row; i < std::min(row + SQUARE, rows); ++i)
          to.row(j)[i] = from.row(i)[j];
}

}  // namespace

// Update the parameters once for each mini-batch, and write the costs of the mini-batches.
// Unless this returns TRAINED, no parameter has changed.
extern "C" int32_t torchbp_train(const Layer* layers, int64_t depth, const Examples* examples,
                                 int32_t cost, float lr, float weight_decay, float* costs) try {
  const Examples& set = *examples;
  const int64_t m = set.batch_size;
  const bool in_place = set.count <= std::min(m, IN_PLACE) && layers[0].n_in % LANES == 0;
  Memory memory;
  const Matrix ones = memory.matrix(m, 1);
  std::fill(ones.at, ones.row(m), 1.0f);
  int32_t* const list = memory.zeros<int32_t>(m + 1);
  std::iota(list, list + m + 1, -1);
  const Lists all = {list, 0};
  std::vector<Unit> units;
  units.reserve(depth);
  float check = 0, rate = 0, decay = -lr * weight_decay;
  for (int64_t l = 0; l < depth; ++l) {
    units.emplace_back(memory, layers[l], m, l ? &units[l - 1] : nullptr, all, in_place && !l);
    Unit& u = units[l];
    if (!u.is_in_place) transpose(u.theirs, u.W, u.layer.n_out, u.layer.n_in);
    for (int64_t j = 0; u.layer.b && j < u.layer.n_out; ++j)
      u.b.at[j] = u.layer.b[j * u.layer.b_step];
    check += zero_times(u.b) + (u.is_in_place ? 0 : zero_times(u.W));
  }
  if (!(check == 0)) return NOT_FINITE;
  float* const one_hot = memory.zeros<float>(layers[depth - 1].n_out);
  const auto take = set.images_are_bytes ? take_images<uint8_t> : take_images<float>;
  for (int64_t begin = 0; begin < set.count; begin += m) {
    const int64_t rows = std::min(m, set.count - begin);
    *list = int32_t(rows);
    rate = -lr / float(rows);
    take(units[0], set, begin, rows);
    for (Unit& u : units) check += feed_forward(u, rows);
    const double C = output_error(units.back(), set, cost, begin, rows, one_hot);
    for (int64_t l = depth - 1; l >= 0; --l) {
      if (l) propagate(units[l], units[l - 1], rows);
      check += zero_times(units[l].delta);
      if (!units[l].is_in_place) update(units[l], ones, all, rate, decay);
    }
    *costs++ = float(C / double(rows));
  }
  for (Unit& u : units) check += zero_times(u.b) + (u.is_in_place ? 0 : zero_times(u.W));
  if (!(check == 0)) return NOT_FINITE;
  for (Unit& u : units) {
    const Layer& l = u.layer;
    if (u.is_in_place) update(u, ones, all, rate, decay);
    else if (l.trains_W) transpose(u.W, u.theirs, l.n_in, l.n_out);
    for (int64_t j = 0; l.trains_b && j < l.n_out; ++j) l.b[j * l.b_step] = u.b.at[j];
  }
  return TRAINED;
} catch (...) {  // std::bad_alloc, or std::length_error
  return OUT_OF_MEMORY;
}
