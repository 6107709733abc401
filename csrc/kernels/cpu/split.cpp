// adaptive_split_select: two sorted lists, their prefix sums, and one pass over all splits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "select.h"

namespace cdrop::cpu {
namespace {

// One score list of a sample, best first.
struct List {
  List(const Matrix<float>& scores, int64_t b, int64_t tokens) : score(tokens), order(tokens) {
    for (int64_t i = 0; i < tokens; ++i) score[i] = scores.at(b, i);
  }

  // The mass of the first 0, 1, ..., `count` tokens after the first `held`.
  void sum(int64_t held, int64_t count) {
    mass = Buffer<double>(count + 1);
    mass[0] = 0.0;
    for (int64_t c = 0; c < count; ++c) {
      const float value = score[order[held + c]];
      mass[c + 1] = mass[c] + (std::isnan(value) ? 0.0 : static_cast<double>(value));
    }
  }

  Buffer<float> score;
  Buffer<int32_t> order;
  Buffer<double> mass;
};

// The first k1 of the largest product.
int64_t best_split(const List& visual, const List& textual, int64_t rest) {
  int64_t best = 0;
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t k1 = 0; k1 <= rest; ++k1) {
    const double product = textual.mass[k1] * visual.mass[rest - k1];
    if (product > most) most = product, best = k1;
  }
  return best;
}

void split_sample(const SplitParams& p, int64_t b) {
  const int64_t n = p.tokens;
  List visual(p.visual, b, n), textual(p.textual, b, n);
  int64_t valid = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!p.valid || p.valid.at(b, i) != 0) visual.order[valid++] = static_cast<int32_t>(i);
  }
  std::copy_n(visual.order.get(), valid, textual.order.get());
  Sorter sorter(n);
  sorter.sort(visual.score.get(), visual.order.get(), valid);
  sorter.sort(textual.score.get(), textual.order.get(), valid);

  const int64_t budget = std::min(p.keep, valid);
  const auto held = static_cast<int64_t>(std::floor(p.reserve * static_cast<double>(budget)));
  const int64_t rest = budget - 2 * held;
  visual.sum(held, rest);
  textual.sum(held, rest);
  const int64_t k1 = best_split(visual, textual, rest);

  const Buffer<uint8_t> chosen(n);
  std::fill_n(chosen.get(), n, uint8_t{0});
  int64_t taken = 0;
  const auto take = [&](int32_t token) {
    taken += chosen[token] == 0;
    chosen[token] = 1;
  };
  for (int64_t r = 0; r < held + k1; ++r) take(textual.order[r]);
  for (int64_t r = 0; r < budget - held - k1; ++r) take(visual.order[r]);
  const List& heavier = textual.mass[k1] >= visual.mass[rest - k1] ? textual : visual;
  for (int64_t r = 0; taken < budget; ++r) take(heavier.order[r]);

  int64_t* index = p.index + b * p.keep;
  int64_t filled = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (chosen[i]) index[filled++] = i;
  }
  std::fill(index + filled, index + p.keep, int64_t{-1});
  p.split[b] = k1;
}

}  // namespace

void adaptive_split_select(const SplitParams& params, const Threads& threads) {
  for_each_task(threads, params.batch, 0, [&](int64_t b, float*) { split_sample(params, b); });
}

}  // namespace cdrop::cpu
