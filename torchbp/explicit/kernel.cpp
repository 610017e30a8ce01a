// Mini-batch SGD as compiled loops: feedforward, BP1-BP4 and the update, for thousands of
// mini-batches in one call. kernel.py beside this file builds and calls it.
//
// Inputs are taken in groups of four. A bit for each row of the batch says whether a group
// of pixels is not zero in it; in MNIST a quarter of them are not. BP4 of the first layer
// omits the others, and feedforward those that are zero in five rows at once. For this the
// first W is stored transposed during a call: W_k are the weights from input k to all
// neurons. To transpose it takes longer than the step of one small mini-batch, so a call of
// one such mini-batch works on that W in place, zeros included, if its rows are whole vectors.
// Later layers keep torch's order. Sums stay in registers, in BP4 those of 60 rows.
//
// Skipping 0 · W is right only while W is finite. A call that meets a number that is not
// finite, in its parameters, in z or in δ, changes nothing and returns NOT_FINITE.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

constexpr int GROUP = 4;               // inputs that share a bit
constexpr int TILE = 5;                // rows of a batch (not less than GROUP), and
constexpr int WIDEST = REGISTERS / 8;  // vectors of each, whose sums fit into registers
constexpr int DOTS = 6;                // rows of W whose products with two x_r do too
constexpr int64_t WORD = 60;           // rows whose bits are in one word: whole tiles, below 64
constexpr int64_t AHEAD = 32;          // rows from the one in use to the one fetched
constexpr int64_t IN_PLACE = 32;       // most rows of a mini-batch that works on W in place

int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A view of rows. In our memory they are whole vectors, with zeros in the padding, and
// rows of zeros follow, enough for whole tiles and groups.
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
    // Rows at a distance of whole 512 bytes would share a few lines of the cache.
    const int64_t width = padded(columns, LANES), stride = width + (width % 128 ? 0 : LANES);
    return {zeros<float>((rows + TILE - 1) * stride), rows, width, stride};
  }
};

// A bit for each row of a batch and group of inputs: which products are needed. The words of
// the groups lie `step` apart; if that is 0, all groups have the same words.
struct Active {
  uint64_t* at;
  int64_t step, words;
  uint64_t& of(int64_t r, int64_t k) const { return at[k / GROUP * step + r / WORD]; }
};

// A layer, and its buffers for batches of m rows.
struct Unit {
  Layer layer;
  Active active;  // what the products with W need
  bool is_in_place, is_transposed;
  Matrix theirs, W, b, a, delta, x;  // `theirs` is torch's W; x are the inputs

  Unit(Memory& memory, const Layer& l, int64_t m, const Unit* below, bool in_place, Active needed)
      : layer(l), active(needed), is_in_place(in_place), is_transposed(!below && !in_place),
        theirs{l.W, l.n_out, l.n_in, l.W_row},
        W(in_place ? theirs : memory.matrix(is_transposed ? l.n_in : l.n_out,
                                            is_transposed ? l.n_out : l.n_in)),
        b(memory.matrix(1, l.n_out)), a(memory.matrix(m, l.n_out)),
        delta(memory.matrix(m, l.n_out)), x(below ? below->a : memory.matrix(m, l.n_in)) {}
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

// a = σ(z) in place. The padding stays zero.
void apply_sigma(Unit& u, int64_t rows) {
  float *const a = u.a.at, *const end = u.a.row(rows);
  const auto apply = [=](auto sigma) { std::transform(a, end, a, sigma); };
  if (u.layer.activation == SIGMOID) apply(sigmoid);
  if (u.layer.activation == TANH) apply(hyperbolic_tangent);
  if (u.layer.activation == RELU) apply([](float z) { return z < 0 ? 0 : z; });
  for (int64_t r = 0; r < rows; ++r)
    std::fill(u.a.row(r) + u.layer.n_out, u.a.row(r + 1), 0.0f);
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

// Call visit(N, first) for each part of a range: N vectors that begin at number `first`; or,
// if SIZE is 1, N numbers.
template <int N = WIDEST, int SIZE = LANES, class Visit>
void for_each_part(int64_t width, const Visit& visit, int64_t first = 0) {
  const std::integral_constant<int, N> n;
  for (; width - first >= N * SIZE; first += N * SIZE) visit(n, first);
  if constexpr (N > 1) for_each_part<N - 1, SIZE>(width, visit, first);
}

// out_r += Σ_p x_rp M_p, for the groups that some row of a tile needs.
template <int N>
void add_combinations(Matrix out, Matrix x, Matrix M, Active active, int64_t rows,
                      int64_t first) {
  for (int64_t r = 0; r < rows; r += TILE) {
    const uint64_t tile = ((uint64_t(1) << TILE) - 1) << r % WORD;
    Vector sum[TILE][N];
    for (int s = 0; s < TILE; ++s)
      for (int j = 0; j < N; ++j) sum[s][j] = vectors(out.row(r + s) + first)[j];
    for (int64_t k = 0; k < M.rows; k += GROUP) {
      if (!(active.of(r, k) & tile)) continue;
      for (int p = 0; p < GROUP; ++p) {
        const Vector* const M_p = vectors(M.row(k + p) + first);
        for (int s = 0; s < TILE; ++s)
          for (int j = 0; j < N; ++j) sum[s][j] += x.row(r + s)[k + p] * M_p[j];
      }
    }
    for (int s = 0; s < TILE; ++s)
      for (int j = 0; j < N; ++j) vectors(out.row(r + s) + first)[j] = sum[s][j];
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

// out_rp += M_p · x_r, for Q rows of M from p on, and two r at once: no sum waits for another.
template <int Q>
void add_dots(Matrix out, Matrix x, Matrix M, int64_t rows, int64_t p) {
  for (int64_t r = 0; r < rows; r += 2) {
    Vector sum[2][Q] = {};
    for (int64_t j = 0; j < M.width / LANES; ++j) {
      const Vector x_j[2] = {vectors(x.row(r))[j], vectors(x.row(r + 1))[j]};
      for (int q = 0; q < Q; ++q) {
        const Vector M_pj = unaligned(M.row(p + q))[j];
        for (int s = 0; s < 2; ++s) sum[s][q] += M_pj * x_j[s];
      }
    }
    for (int s = 0; s < 2; ++s)
      for (int q = 0; q < Q; ++q) out.row(r + s)[p + q] += sum_of(sum[s][q]);
  }
}

// M_p += decay M_p + rate Σ_r x_rp y_r, for the rows that a group needs. Each word's rows
// have a sum of their own, since a sum of fewer terms is rounded less.
template <int N>
void add_products(Matrix M, Matrix x, Matrix y, Active active, float rate, float decay,
                  int64_t first) {
  for (int64_t k = 0; k < M.rows; k += GROUP) {
    if (active.words == 1 && !active.of(0, k) && decay == 0) continue;
    const auto add_rows = [&](Vector(&sum)[GROUP][N], int64_t word) {
      for (uint64_t bits = active.of(word * WORD, k); bits; bits &= bits - 1) {
        const int64_t r = word * WORD + __builtin_ctzll(bits);
        const float* const x_r = x.row(r) + k;
        const Vector* const y_r = vectors(y.row(r) + first);
        for (int p = 0; p < GROUP; ++p)
          for (int j = 0; j < N; ++j) sum[p][j] += x_r[p] * y_r[j];
      }
    };
    Vector sum[GROUP][N] = {};
    add_rows(sum, 0);
    for (int64_t word = 1; word < active.words; ++word) {
      Vector more[GROUP][N] = {};
      add_rows(more, word);
      for (int p = 0; p < GROUP; ++p)
        for (int j = 0; j < N; ++j) sum[p][j] += more[p][j];
    }
    for (int p = 0; p < GROUP && k + p < M.rows; ++p) {
      Unaligned* const M_p = unaligned(M.row(k + p) + first);
      for (int j = 0; j < N; ++j) M_p[j] += decay * M_p[j] + rate * sum[p][j];
    }
  }
}

// ---------------------------------------------------------------- a mini-batch

// Copy the images of a mini-batch, and set the bits of the groups that are not zero.
template <class Pixel>
void take_images(Unit& u, const Examples& set, int64_t begin, int64_t rows) {
  typedef std::conditional_t<sizeof(Pixel) == 1, uint32_t, unsigned __int128> Bits;
  constexpr float scale = sizeof(Pixel) == 1 ? 1.0f / 255 : 1;
  const Pixel* const images = static_cast<const Pixel*>(set.images);
  const int64_t n = u.layer.n_in, step = u.active.step, whole = step ? n / GROUP : 0;
  std::fill_n(u.active.at, padded(n, GROUP) / GROUP * step, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t later = std::min(begin + r + AHEAD, set.count - 1);
    for (int64_t k = 0; k < n; k += 64 / sizeof(Pixel))
      __builtin_prefetch(images + set.order[later] * set.image_stride + k);
    const Pixel* const image = images + set.order[begin + r] * set.image_stride;
    std::transform(image, image + n, u.x.row(r), [=](Pixel p) { return scale * float(p); });
    uint64_t *const __restrict__ word = &u.active.of(r, 0), bit = uint64_t(1) << r % WORD;
    for (int64_t g = 0; g < whole; ++g) {
      Bits bits;
      std::memcpy(&bits, image + g * GROUP, sizeof bits);
      word[g * step] |= bits != 0 ? bit : 0;
    }
    if (n % GROUP) u.active.of(r, n) |= bit;  // the last group is always needed
  }
}

// out_r += Σ_p x_rp W_p
void combine(Matrix out, Matrix x, const Unit& u, int64_t rows) {
  for_each_part(u.W.width, [&](auto n, int64_t first) {
    add_combinations<n>(out, x, u.W, u.active, rows, first);
  });
}

// Make z and a. Return 0, or NaN if a z is not finite: a W in place has no other check.
float feed_forward(Unit& u, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(u.b.at, u.b.width, u.a.row(r));
  if (u.is_transposed) combine(u.a, u.x, u, rows);
  else
    for_each_part<DOTS, 1>(u.W.rows, [&](auto n, auto p) { add_dots<n>(u.a, u.x, u.W, rows, p); });
  const float check = zero_times(u.a);
  apply_sigma(u, rows);
  return check;
}

// Make δ^L; return the sum of the costs. Around `one`, which is 1, there are zeros: seen from
// `label` places before it, it is the target of a label.
double output_error(Unit& u, const Examples& set, int32_t cost, int64_t begin, int64_t rows,
                    const float* one) {
  constexpr decltype(&quadratic) of[] = {quadratic, cross_entropy, log_likelihood};
  const auto* const labels = static_cast<const int64_t*>(set.targets);
  const auto* const numbers = static_cast<const float*>(set.targets);
  double C = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = set.order[begin + r] * set.target_stride;
    const float* const y = set.targets_are_labels ? one - labels[i] : numbers + i;
    C += of[cost](u.delta.row(r), u.a.row(r), y, u.layer.n_out);
  }
  multiply_by_slope(u, rows);  // BP1
  return C;
}

// Make the δ of the layer below.
void propagate(const Unit& u, Unit& below, int64_t rows) {
  std::fill(below.delta.at, below.delta.row(rows), 0.0f);
  combine(below.delta, u.delta, u, rows);  // BP2
  multiply_by_slope(below, rows);          // BP2
}

// Update W, and b, which is the weight of an input that is always 1.
void update(Unit& u, Matrix ones, Active all, float rate, float decay) {
  const auto add = [&](Matrix M, Matrix x, Matrix y, Active active, float decay) {
    for_each_part(M.width, [&](auto n, int64_t first) {
      add_products<n>(M, x, y, active, rate, decay, first);
    });
  };
  const Matrix left = u.is_transposed ? u.x : u.delta, right = u.is_transposed ? u.delta : u.x;
  if (u.layer.trains_b) add(u.b, ones, u.delta, all, 0);         // BP3
  if (u.layer.trains_W) add(u.W, left, right, u.active, decay);  // BP4
}

// ---------------------------------------------------------------- a call

// to_ij = from_ij, or to_ji; sixteen rows at a time, which stay in the processor's cache.
void copy(Matrix from, Matrix to, int64_t rows, int64_t columns, bool transposed) {
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = row; i < std::min(row + 16, rows); ++i)
        (transposed ? to.row(j)[i] : to.row(i)[j]) = from.row(i)[j];
}

}  // namespace

// Update the parameters once for each mini-batch, and write the costs of the mini-batches.
// Unless this returns TRAINED, no parameter has changed.
extern "C" int32_t torchbp_train(const Layer* layers, int64_t depth, const Examples& set,
                                 int32_t cost, float lr, float weight_decay, float* costs) try {
  const int64_t m = set.batch_size;
  const bool in_place = set.count <= std::min(m, IN_PLACE) && layers[0].n_in % LANES == 0;
  Memory memory;
  const Matrix ones = memory.matrix(m, 1);
  std::fill(ones.at, ones.row(m), 1.0f);
  const int64_t words = padded(m, WORD) / WORD, groups = padded(layers[0].n_in, GROUP) / GROUP;
  const Active all = {memory.zeros<uint64_t>(words), 0, words};
  const Active pixels = {memory.zeros<uint64_t>(groups * words), words, words};
  std::vector<Unit> units;
  units.reserve(depth);
  float check = 0, rate = 0, decay = -lr * weight_decay;
  for (int64_t l = 0; l < depth; ++l) {
    Unit& u = units.emplace_back(memory, layers[l], m, l ? &units[l - 1] : nullptr,
                                 in_place && !l, in_place || l ? all : pixels);
    if (!u.is_in_place) copy(u.theirs, u.W, u.layer.n_out, u.layer.n_in, u.is_transposed);
    if (u.layer.b) copy({u.layer.b, u.layer.n_out, 1, u.layer.b_step}, u.b, u.layer.n_out, 1, true);
  }
  float* const one = memory.zeros<float>(2 * layers[depth - 1].n_out) + layers[depth - 1].n_out;
  *one = 1;
  const auto take = set.images_are_bytes ? take_images<uint8_t> : take_images<float>;
  for (int64_t begin = 0; begin < set.count; begin += m) {
    const int64_t rows = std::min(m, set.count - begin);
    for (int64_t word = 0; word < words; ++word)
      all.at[word] = (uint64_t(1) << std::clamp(rows - word * WORD, int64_t(0), WORD)) - 1;
    rate = -lr / float(rows);
    take(units[0], set, begin, rows);
    for (Unit& u : units) check += feed_forward(u, rows);
    const double C = output_error(units.back(), set, cost, begin, rows, one);
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
    else if (l.trains_W)
      copy(u.W, u.theirs, u.W.rows, u.is_transposed ? l.n_out : l.n_in, u.is_transposed);
    if (l.trains_b) copy(u.b, {l.b, l.n_out, 1, l.b_step}, 1, l.n_out, true);
  }
  return TRAINED;
} catch (...) {  // std::bad_alloc, or std::length_error
  return OUT_OF_MEMORY;
}
