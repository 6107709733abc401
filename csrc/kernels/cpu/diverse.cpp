// greedy_diverse_select: the whole greedy loop. Each step runs over blocks of tokens of all samples
// side by side; between steps every sample takes the best of its blocks. Features are read where
// they are, once a step; what is kept beside them is a few numbers per token, and for dpp its
// Cholesky rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "measure.h"
#include "parallel.h"

namespace cdrop::cpu {
namespace {

constexpr float kFloor = 1e-5f;  // DPP_FLOOR of the plain-torch definition

// The best of some tokens, the lower index of equals; NaN is worse than every number.
struct Pick {
  int64_t token = -1;
  double score = 0.0;
  void offer(int64_t other, double value) {
    if (token < 0 || value > score || (std::isnan(score) && !std::isnan(value))) {
      token = other;
      score = value;
    }
  }
};

class Greedy {
 public:
  Greedy(const DiverseParams& params, const Threads& threads)
      : p_(params),
        threads_(threads),
        dpp_(params.objective == Objective::kDpp),
        blocks_((params.tokens + kBlock - 1) / kBlock),
        room_(padded(params.width, kScratchPad)),
        power_(params.batch * params.tokens),
        worth_(params.batch * params.tokens),
        inverse_(params.batch * params.tokens),
        gain_(params.batch * params.tokens),
        open_(params.batch * params.tokens),
        score_(params.batch * params.tokens),
        rows_(dpp_ ? params.batch * params.keep * params.tokens : 0),
        of_last_(dpp_ ? params.batch * params.keep : 0),
        pick_(params.batch * blocks_),
        vector_(params.batch * room_),
        samples_(params.batch) {}

  void run() {
    for_each_task(threads_, p_.batch * blocks_, room_, [&](int64_t task, float* scratch) {
      open_block(task / blocks_, task % blocks_ * kBlock, scratch);
    });
    int64_t steps = 0;
    for (int64_t b = 0; b < p_.batch; ++b) steps = std::max(steps, count_sample(b));
    if (!dpp_ && !p_.relevance && steps > 0) {
      const int64_t parts = (p_.tokens + kStarts - 1) / kStarts;
      for_each_task(threads_, p_.batch * parts, kStarts * (room_ + kBlock),
                    [&](int64_t task, float* scratch) {
                      score_starts(task / parts, task % parts * kStarts, scratch);
                    });
    }
    const Threads alone;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t work = p_.batch * p_.tokens * (p_.width + (dpp_ ? step : 0));
      for_each_task(work < kShared ? alone : threads_, p_.batch * blocks_, kBlock,
                    [&](int64_t task, float* scratch) {
                      if (samples_[task / blocks_].wanted > step) offer_block(task, step, scratch);
                    });
      for (int64_t b = 0; b < p_.batch; ++b) {
        if (samples_[b].wanted > step) take_best(b, step);
      }
    }
    for (int64_t b = 0; b < p_.batch; ++b) write(b);
  }

 private:
  static constexpr int64_t kBlock = 64;        // tokens of a task
  static constexpr int64_t kStarts = 16;       // tokens whose likest is looked for together
  static constexpr int64_t kShared = 1 << 18;  // products of a step that is worth waking others for
  static_assert(kStarts % kDotQueries == 0);

  enum State : uint8_t { kShut, kOpen, kChosen };  // shut: invalid, or it can't be compared
  struct Sample {
    int64_t wanted;   // steps to take
    int64_t last;     // the token chosen last
    double residual;  // for dpp, what lay outside the span when it was chosen
  };

  bool valid(int64_t b, int64_t i) const { return !p_.valid || p_.valid.at(b, i) != 0; }

  // Measure the tokens; those that can be compared are open. Scores are those of the first step.
  void open_block(int64_t b, int64_t first, float* scratch) {
    for (int64_t i = first; i < std::min(first + kBlock, p_.tokens); ++i) {
      const int64_t at = b * p_.tokens + i;
      const Measure m =
          valid(b, i) ? measure(p_.features, b, i, p_.width, scratch) : Measure{1.0f, NAN};
      power_[at] = m.power;
      inverse_[at] = m.square == 0.0f ? 0.0 : 1.0 / std::sqrt(static_cast<double>(m.square));
      worth_[at] = p_.relevance ? p_.relevance.at(b, i) : 1.0f;
      open_[at] = std::isnan(m.square) || (dpp_ && std::isnan(worth_[at])) ? kShut : kOpen;
      score_[at] = dpp_ ? (m.square > 0.0f ? 1.0 : 0.0) : worth_[at];
      const double worth = worth_[at];
      gain_[at] = open_[at] == kOpen ? worth * worth : -1.0;
    }
  }

  int64_t count_sample(int64_t b) {
    const uint8_t* open = &open_[b * p_.tokens];
    int64_t all = 0, comparable = 0;
    for (int64_t i = 0; i < p_.tokens; ++i) {
      all += valid(b, i);
      comparable += open[i] == kOpen;
    }
    // Where all are kept there is nothing to compare.
    samples_[b] = {all <= p_.keep ? 0 : std::min(p_.keep, comparable), -1, 0.0};
    return samples_[b].wanted;
  }

  float cosine(int64_t a, int64_t b, float product) const {
    return static_cast<float>(std::clamp(product * (inverse_[a] * inverse_[b]), -1.0, 1.0));
  }

  // Products of `queries` vectors with tokens `first` to `first + count` of a sample.
  void dots(int64_t b, int64_t first, int64_t count, const float* q, int64_t queries,
            float* out) const {
    simd().dots({token_row(p_.features, b, first), p_.features.dtype, p_.features.stride[1],
                 p_.width, count, &power_[b * p_.tokens + first], q, queries, out, kBlock});
  }

  // For maxmin without relevance: minus the cosine with the token likest to each of a few.
  void score_starts(int64_t b, int64_t first, float* scratch) {
    const int64_t base = b * p_.tokens, count = std::min(kStarts, p_.tokens - first);
    if (samples_[b].wanted == 0) return;
    float* product = scratch + kStarts * room_;
    float most[kStarts];
    for (int64_t s = 0; s < kStarts; ++s) {
      const int64_t i = first + std::min(s, count - 1);
      simd().widen(token_row(p_.features, b, i), p_.features.dtype, p_.width, power_[base + i],
                   scratch + s * room_);
      most[s] = -2.0f;
    }
    for (int64_t from = 0; from < p_.tokens; from += kBlock) {
      const int64_t here = std::min(kBlock, p_.tokens - from);
      dots(b, from, here, scratch, kStarts, product);
      for (int64_t s = 0; s < count; ++s) {
        for (int64_t j = 0; j < here; ++j) {
          if (from + j == first + s || open_[base + from + j] != kOpen) continue;
          const float c = cosine(base + first + s, base + from + j, product[s * kBlock + j]);
          most[s] = std::max(most[s], c);
        }
      }
    }
    for (int64_t s = 0; s < count; ++s) score_[base + first + s] = -most[s];
  }

  // Take account of the token chosen last, and offer the best that is open in a block.
  void offer_block(int64_t task, int64_t step, float* cosines) {
    const int64_t b = task / blocks_, first = task % blocks_ * kBlock;
    const int64_t base = b * p_.tokens, count = std::min(kBlock, p_.tokens - first);
    if (step > 0) dots(b, first, count, &vector_[b * room_], 1, cosines);
    if (dpp_) {
      pick_[task] = best_gain(b, first, count, step, cosines);
      return;
    }
    for (int64_t j = 0; step > 0 && j < count; ++j) {
      cosines[j] = cosine(base + samples_[b].last, base + first + j, cosines[j]);
    }
    if (step > 0) keep_nearest(base + first, count, step, cosines);
    Pick pick;
    for (int64_t i = first; i < first + count; ++i) {
      if (open_[base + i] == kOpen) pick.offer(i, score_[base + i]);
    }
    pick_[task] = pick;
  }

  // For dpp: a block's part of the Cholesky row of the token chosen last, and the best gain then.
  Pick best_gain(int64_t b, int64_t first, int64_t count, int64_t step, const float* products) {
    const int64_t at = b * p_.tokens + first;
    if (step > 0) {
      const Sample& sample = samples_[b];
      float* rows = &rows_[b * p_.keep * p_.tokens + first];
      simd().cholesky_row({products, &inverse_[at], inverse_[b * p_.tokens + sample.last], rows,
                           p_.tokens, &of_last_[b * p_.keep], step - 1, std::sqrt(sample.residual),
                           count, rows + (step - 1) * p_.tokens, &score_[at]});
    }
    const BestGain best = simd().best_gain({&gain_[at], &score_[at], kFloor, count});
    return {best.at < 0 ? -1 : first + best.at, best.gain};
  }

  void keep_nearest(int64_t at, int64_t count, int64_t step, const float* cosines) {
    for (int64_t j = 0; j < count; ++j) {
      const double here = -static_cast<double>(cosines[j]);
      score_[at + j] = step == 1 ? here : std::min(score_[at + j], here);
    }
  }

  // Choose the best token that the blocks of a sample offered.
  void take_best(int64_t b, int64_t step) {
    Pick best;
    for (int64_t k = 0; k < blocks_; ++k) {
      const Pick& pick = pick_[b * blocks_ + k];
      if (pick.token >= 0) best.offer(pick.token, pick.score);
    }
    Sample& sample = samples_[b];
    if (dpp_ && !(best.score > 0.0)) {
      sample.wanted = 0;  // none has a gain, and none will have
      return;
    }
    const int64_t at = b * p_.tokens + best.token;
    sample.last = best.token;
    sample.residual = score_[at];
    open_[at] = kChosen;
    gain_[at] = -1.0;
    for (int64_t s = 0; dpp_ && s < step; ++s) {
      of_last_[b * p_.keep + s] = rows_[(b * p_.keep + s) * p_.tokens + best.token];
    }
    simd().widen(token_row(p_.features, b, best.token), p_.features.dtype, p_.width, power_[at],
                 &vector_[b * room_]);
  }

  // The chosen, filled up with those that had no gain by worth, then with what can't be compared.
  void write(int64_t b) {
    const int64_t n = p_.tokens;
    const auto state = [&](int64_t i) { return open_[b * n + i]; };
    std::vector<int64_t> chosen, left, last;
    for (int64_t i = 0; i < n; ++i) {
      if (!valid(b, i)) continue;
      (state(i) == kChosen ? chosen : state(i) == kOpen ? left : last).push_back(i);
    }
    std::stable_sort(left.begin(), left.end(),
                     [&](int64_t i, int64_t j) { return worth_[b * n + i] > worth_[b * n + j]; });
    left.insert(left.end(), last.begin(), last.end());
    const int64_t more = p_.keep - static_cast<int64_t>(chosen.size());
    for (int64_t r = 0; r < more && r < static_cast<int64_t>(left.size()); ++r) {
      chosen.push_back(left[r]);
    }
    std::sort(chosen.begin(), chosen.end());
    chosen.resize(p_.keep, -1);
    std::copy(chosen.begin(), chosen.end(), p_.index + b * p_.keep);
  }

  const DiverseParams& p_;
  const Threads& threads_;
  bool dpp_;
  int64_t blocks_, room_;
  Buffer<float> power_, worth_;  // [B, N]: scale of each token as measured; relevance or 1
  Buffer<double> inverse_;       // [B, N]: one over the length of each token so scaled, or 0
  Buffer<double> gain_;          // [B, N]: for dpp, the relevance squared, -1 where it is not open
  Buffer<uint8_t> open_;         // [B, N]: a State
  Buffer<double> score_;         // [B, N]: minus the largest cosine, or for dpp the residual
  Buffer<float> rows_;           // [B, K, N]: for dpp, Cholesky rows of the cosines
  Buffer<double> of_last_;       // [B, K]: those rows at the token chosen last
  Buffer<Pick> pick_;            // [B, blocks]
  Buffer<float> vector_;         // [B, F]: the token chosen last, scaled
  Buffer<Sample> samples_;       // [B]
};

}  // namespace

void greedy_diverse_select(const DiverseParams& params, const Threads& threads) {
  Greedy(params, threads).run();
}

}  // namespace cdrop::cpu
