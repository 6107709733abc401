// Compiled with -ffp-contract=off: fused scores are rounded step by step, as in the plain-torch
// definition, so that ties are the same ties.
#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace cdrop::cpu {
namespace {

// Ascending in this key is descending in the score; NaN comes last, -0.0 equals 0.0.
uint32_t sort_key(float score) {
  if (std::isnan(score)) return 0xffffffffu;
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return (bits & 0x80000000u) ? bits : ~(bits | 0x80000000u);
}

struct Sample {
  const SelectParams& params;
  int64_t b;
  const float* visual;
  const float* textual;

  bool valid(int64_t i) const { return !params.valid || params.valid.at(b, i) != 0; }
  // Tokens that take part in sums, means and ranges.
  bool counted(int64_t i) const {
    return valid(i) && !std::isnan(visual[i]) && !std::isnan(textual[i]);
  }
};

// The statistics that turn one list into comparable numbers.
struct Scaling {
  float subtract = 0.0f, divide = 1.0f;
  float operator()(float v) const { return divide == 0.0f ? 0.0f : (v - subtract) / divide; }
};

Scaling scaling(const Sample& s, const float* a) {
  double sum = 0.0, squares = 0.0;
  float low = std::numeric_limits<float>::infinity(), high = -low;
  int64_t count = 0;
  for (int64_t i = 0; i < s.params.tokens; ++i) {
    if (!s.counted(i)) continue;
    sum += a[i];
    low = std::min(low, a[i]);
    high = std::max(high, a[i]);
    ++count;
  }
  if (s.params.fusion == Fusion::kSum) return {0.0f, static_cast<float>(sum)};
  if (s.params.fusion == Fusion::kMax) return {low, count ? high - low : 0.0f};
  const double mean = count ? sum / static_cast<double>(count) : 0.0;
  for (int64_t i = 0; i < s.params.tokens; ++i) {
    if (s.counted(i)) squares += (a[i] - mean) * (a[i] - mean);
  }
  const double variance = count ? squares / static_cast<double>(count) : 0.0;
  return {static_cast<float>(mean), static_cast<float>(std::sqrt(variance))};
}

void places(const int32_t* order, int64_t count, float* place) {
  for (int64_t r = 0; r < count; ++r) place[order[r]] = static_cast<float>(r);
}

// Fused scores from the two lists of ranks.
void fuse_ranks(const Sample& s, const float* rank_v, const float* rank_t, int64_t valid,
                float* score) {
  const float wv = s.params.visual_share, wt = s.params.textual_share;
  const float n = static_cast<float>(valid);
  for (int64_t i = 0; i < s.params.tokens; ++i) {
    if (!s.counted(i)) continue;
    if (s.params.fusion == Fusion::kRank) {
      score[i] = -(wv * rank_v[i] + wt * rank_t[i]) / n;
    } else {
      score[i] = wv / (60.0f + rank_v[i]) + wt / (60.0f + rank_t[i]);
    }
  }
}

// Fused scores from the values themselves.
void fuse_values(const Sample& s, float* score) {
  const float wv = s.params.visual_share, wt = s.params.textual_share;
  const Fusion fusion = s.params.fusion;
  Scaling of_v, of_t;
  if (fusion != Fusion::kProduct) of_v = scaling(s, s.visual), of_t = scaling(s, s.textual);
  for (int64_t i = 0; i < s.params.tokens; ++i) {
    if (!s.counted(i)) continue;
    const float v = s.visual[i], t = s.textual[i];
    if (fusion == Fusion::kProduct) {
      score[i] = wv * std::log(std::max(v, 1e-30f)) + wt * std::log(std::max(t, 1e-30f));
    } else if (fusion == Fusion::kMax) {
      const float a = 2.0f * wv * of_v(v), c = 2.0f * wt * of_t(t);
      score[i] = std::isnan(a) || std::isnan(c) ? a + c : std::max(a, c);
    } else {
      score[i] = wv * of_v(v) + wt * of_t(t);
    }
  }
}

}  // namespace

void Sorter::sort(const float* score, int32_t* order, int64_t count) {
  constexpr int kBits = 11, kPasses = 3;
  constexpr uint32_t kBins = 1u << kBits;
  uint32_t starts[kPasses][kBins] = {};
  for (int64_t r = 0; r < count; ++r) {
    const uint32_t key = sort_key(score[order[r]]);
    pairs_[r] = {key, order[r]};
    for (int pass = 0; pass < kPasses; ++pass) ++starts[pass][key >> (pass * kBits) & (kBins - 1)];
  }
  Pair *from = pairs_.get(), *to = other_.get();
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t at = 0;
    for (uint32_t& start : starts[pass]) at += std::exchange(start, at);
    for (int64_t r = 0; r < count; ++r) {
      to[starts[pass][from[r].key >> (pass * kBits) & (kBins - 1)]++] = from[r];
    }
    std::swap(from, to);
  }
  for (int64_t r = 0; r < count; ++r) order[r] = from[r].token;
}

void select_sample(const SelectParams& params, int64_t b, const float* visual, const float* textual,
                   int64_t* index, float* score) {
  const int64_t n = params.tokens;
  const Sample sample{params, b, visual, textual};
  const Buffer<int32_t> order(n), other(n);
  const Buffer<float> fused(n), rank_v(n), rank_t(n);
  Sorter sorter(n);
  int64_t valid = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (sample.valid(i)) order[valid++] = static_cast<int32_t>(i);
  }
  const float* by = visual;
  if (textual != nullptr) {
    std::fill_n(fused.get(), n, std::numeric_limits<float>::quiet_NaN());
    const bool by_rank = params.fusion == Fusion::kRank || params.fusion == Fusion::kRrf;
    if (by_rank) {
      std::copy_n(order.get(), valid, other.get());
      sorter.sort(textual, other.get(), valid);
      places(other.get(), valid, rank_t.get());
      std::copy_n(order.get(), valid, other.get());
      sorter.sort(visual, other.get(), valid);
      places(other.get(), valid, rank_v.get());
      fuse_ranks(sample, rank_v.get(), rank_t.get(), valid, fused.get());
      // The sort is stable: left in the order of `visual`, equal scores go to the smaller rank.
      if (params.fusion == Fusion::kRank) std::copy_n(other.get(), valid, order.get());
    } else {
      fuse_values(sample, fused.get());
    }
    by = fused.get();
  }
  sorter.sort(by, order.get(), valid);

  const Buffer<uint8_t> chosen(n);
  std::fill_n(chosen.get(), n, uint8_t{0});
  const int64_t first = std::min(params.keep - params.priority_keep, valid);
  for (int64_t r = 0; r < first; ++r) chosen[order[r]] = 1;
  if (params.priority_keep > 0) {
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      rank_v[i] = params.priority.at(b, i);
      if (sample.valid(i) && !chosen[i]) other[left++] = static_cast<int32_t>(i);
    }
    sorter.sort(rank_v.get(), other.get(), left);
    const int64_t more = std::min(params.priority_keep, left);
    for (int64_t r = 0; r < more; ++r) chosen[other[r]] = 1;
  }
  int64_t filled = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (chosen[i]) index[filled++] = i;
  }
  std::fill(index + filled, index + params.keep, int64_t{-1});
  if (score == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    score[i] = sample.valid(i) ? by[i] : -std::numeric_limits<float>::infinity();
  }
}

void relevance_of_places(const SelectParams& params, int64_t b, double diversity, float* score) {
  const int64_t n = params.tokens;
  const Buffer<int32_t> order(n);
  int64_t valid = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!params.valid || params.valid.at(b, i) != 0) order[valid++] = static_cast<int32_t>(i);
  }
  Sorter(n).sort(score, order.get(), valid);
  const double rate = 1.0 - 1.0 / diversity;
  std::fill_n(score, n, 0.0f);
  for (int64_t r = 0; r < valid; ++r) {
    const double before = static_cast<double>(r) / static_cast<double>(valid);
    score[order[r]] = static_cast<float>(std::exp(rate * before));
  }
}

void consensus_select(const SelectParams& params, const Threads& threads) {
  const int64_t n = params.tokens;
  const auto gather = [n](const Matrix<float>& from, int64_t b, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from.at(b, i);
  };
  for_each_task(threads, params.batch, 2 * n, [&](int64_t b, float* scratch) {
    gather(params.visual, b, scratch);
    if (params.textual) gather(params.textual, b, scratch + n);
    select_sample(params, b, scratch, params.textual ? scratch + n : nullptr,
                  params.index + b * params.keep, params.score + b * n);
  });
}

}  // namespace cdrop::cpu
