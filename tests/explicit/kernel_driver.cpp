// Calls the C interface of kernel.cpp without torch, for AddressSanitizer and UBSan: all
// arrays are exactly as large as they must be, so that any access beside them is found.
// Prints the number of calls; exits with 1 if a result is not what it must be.

#include <cmath>
#include <cstdio>
#include <random>

#include "kernel.cpp"  // of the package that is tested

namespace {

std::mt19937 generator(1);

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

std::vector<float> numbers(int64_t n, float scale = 1) {
  std::vector<float> v(n);
  for (float& x : v) x = scale * uniform();
  return v;
}

struct Network {
  std::vector<std::vector<float>> W, b;
  std::vector<Layer> layers;

  Network(const std::vector<int64_t>& sizes, int32_t activation, int32_t output, int variant) {
    for (size_t l = 0; l + 1 < sizes.size(); ++l) {
      const int64_t n_in = sizes[l], n_out = sizes[l + 1];
      const bool has_bias = !(variant & 2);
      W.push_back(numbers(n_in * n_out, 1 / std::sqrt(float(n_in))));
      b.push_back(numbers(has_bias ? n_out : 0));
      const bool is_frozen = (variant & 4) && l == 0;
      layers.push_back({W[l].data(), has_bias ? b[l].data() : nullptr,
                        n_in, 1, n_in, n_out,
                        l + 2 == sizes.size() ? output : activation, !is_frozen, has_bias});
    }
  }
};

int calls = 0, failures = 0;

void check(bool is_right, const char* what, const std::vector<int64_t>& sizes, int variant) {
  if (is_right) return;
  ++failures;
  std::printf("%s: wrong for sizes", what);
  for (int64_t n : sizes) std::printf(" %d", int(n));
  std::printf(", variant %d\n", variant);
}

void train_one(const std::vector<int64_t>& sizes, int64_t m, int64_t count, int variant) {
  const int32_t cost = variant % 3, activation = variant % 4;
  const int32_t output = cost == QUADRATIC ? activation : int32_t(IDENTITY);
  Network network(sizes, activation, output, variant / 2);
  const int64_t n = count + 3, n_in = sizes.front(), K = sizes.back();
  std::vector<uint8_t> bytes(n * n_in);
  for (uint8_t& x : bytes) x = generator() % 4 ? 0 : generator() % 256;
  std::vector<float> floats = numbers(n * n_in), rows = numbers(n * K);
  std::vector<int64_t> labels(n), order(count);
  for (int64_t& label : labels) label = generator() % K;
  for (int64_t& row : order) row = generator() % n;
  const bool are_bytes = variant % 2, are_labels = variant % 5 < 3;
  const Examples set = {
      are_bytes ? static_cast<const void*>(bytes.data()) : floats.data(),
      are_labels ? static_cast<const void*>(labels.data()) : rows.data(),
      order.data(), count, m, n_in, are_labels ? 1 : K, are_bytes, are_labels};
  std::vector<float> costs((count + m - 1) / m);
  const auto call = [&] {
    ++calls;
    return torchbp_train(network.layers.data(), int64_t(network.layers.size()), set, cost,
                         0.1f, variant % 7 ? 0.0f : 0.01f, costs.data());
  };
  check(call() == TRAINED, "outcome", sizes, variant);
  for (float C : costs) check(std::isfinite(C), "cost", sizes, variant);
  const auto before = network.W;
  network.W[0][0] = INFINITY;
  check(call() == NOT_FINITE, "infinite weight", sizes, variant);
  network.W[0][0] = before[0][0];
  check(network.W == before, "parameters after a refusal", sizes, variant);
}

}  // namespace

int main() {
  const int64_t widths[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 96, 112, 127,
                            128, 129, 257};
  int variant = 0;
  for (int64_t n : widths) {
    train_one({n, n}, 3, 7, variant++);
    train_one({13, n, 3}, 4, 9, variant++);
    train_one({n, 5, n, 2}, 1, 2, variant++);
    train_one({n, 6}, 5, 5, variant++);  // single mini-batches: some work on W in place
    train_one({n, n}, 4, 4, variant++);
    train_one({n, n, 3}, 8, 3, variant++);
  }
  for (int i = 0; i < 210; ++i) train_one({19, 18, 5, 4}, 1 + i % 11, 12, variant++);
  train_one({9, 4, 2}, 600, 700, variant++);  // sums of more rows than are added singly
  train_one({1, 1}, 1, 1, variant++);
  for (int64_t m = 31; m < 36; ++m) train_one({32, 6, 2}, m, m, variant++);
  train_one({4000, 2}, 2, 3, variant++);
  train_one({3, 2000, 2}, 2, 3, variant++);
  std::printf("%d calls\n", calls);
  return failures != 0;
}
