// The consensus of both saliencies, the choice, and whom each dropped token joins.
#pragma once

#include "context.h"

namespace cdrop::cuda {

// --- consensus ---------------------------------------------------------------------------------

template <class C>
CDROP_DEVICE bool by_places(const C& c) {
  return c.p.has_text && (c.p.select.fusion == Fusion::kRank || c.p.select.fusion == Fusion::kRrf);
}

// Places of the slice's tokens in both lists: how many tokens come before each.
template <class C>
CDROP_DEVICE void count_places(const C& c, const uint32_t* keys, uint32_t* places) {
  const int n = c.plan.tokens, items = 2 * c.count;
  if (items == 0) return;
  const int parts = kThreads / items > 0 ? kThreads / items : 1;
  for (int item = c.thread; item < items * parts; item += kThreads) {
    const int which = item % items, side = which / c.count, local = which % c.count;
    const uint32_t* list = keys + side * c.tokens;
    const int token = c.first + local, part = item / items;
    const int begin = static_cast<int>(int64_t{c.tokens} * part / parts);
    const int end = static_cast<int>(int64_t{c.tokens} * (part + 1) / parts);
    const int middle = token < begin ? begin : token < end ? token : end;
    const uint32_t own = list[token];
    uint32_t before = 0;
    for (int j = begin; j < middle; ++j) before += list[j] >= own;
    for (int j = middle; j < end; ++j) before += list[j] > own;
    c.g.atomic_add(places + side * n + local, before);
  }
}

template <class C>
CDROP_DEVICE float scaled(const C& c, float value, const double* by) {
  const float divide = static_cast<float>(by[0]), subtract = static_cast<float>(by[1]);
  return divide == 0.0f ? 0.0f : c.g.div_rn(value - subtract, divide);
}

// The fused score, rounded step by step as the definition does.
template <class C>
CDROP_DEVICE float fused(const C& c, uint32_t v_key, uint32_t t_key, uint32_t rv, uint32_t rt,
                         uint32_t valid_count, const double* statistics) {
  const float wv = c.p.select.visual_share, wt = c.p.select.textual_share;
  const float v = key_value(v_key), t = key_value(t_key);
  const float place_v = static_cast<float>(rv), place_t = static_cast<float>(rt);
  switch (c.p.select.fusion) {
    case Fusion::kRank:
      return c.g.div_rn(-c.g.add_rn(c.g.mul_rn(wv, place_v), c.g.mul_rn(wt, place_t)),
                        static_cast<float>(valid_count));
    case Fusion::kRrf:
      return c.g.add_rn(c.g.div_rn(wv, c.g.add_rn(60.0f, place_v)),
                        c.g.div_rn(wt, c.g.add_rn(60.0f, place_t)));
    case Fusion::kProduct:
      return c.g.add_rn(c.g.mul_rn(wv, c.g.log(v > 1e-30f ? v : 1e-30f)),
                        c.g.mul_rn(wt, c.g.log(t > 1e-30f ? t : 1e-30f)));
    case Fusion::kMax: {
      const float of_v = c.g.mul_rn(2.0f * wv, scaled(c, v, statistics));
      const float of_t = c.g.mul_rn(2.0f * wt, scaled(c, t, statistics + 2));
      if (of_v != of_v || of_t != of_t) return of_v + of_t;
      return of_v > of_t ? of_v : of_t;
    }
    case Fusion::kSum:
    case Fusion::kZscore: break;
  }
  return c.g.add_rn(c.g.mul_rn(wv, scaled(c, v, statistics)),
                    c.g.mul_rn(wt, scaled(c, t, statistics + 2)));
}

// Over the block, in one order; every thread gets the result.
template <class Operator, class C>
CDROP_DEVICE double reduce(const C& c, double value, Operator join) {
  double* scratch = shared<double>(c, c.plan.at.scratch);
  for (int by = 16; by > 0; by /= 2) value = join(value, c.g.shfl_xor(value, by));
  c.g.sync();  // whatever was there has been read
  if (c.lane == 0) scratch[c.warp] = value;
  c.g.sync();
  double all = scratch[0];
  for (int w = 1; w < kWarps; ++w) all = join(all, scratch[w]);
  return all;
}

// What a list is divided by, and what is subtracted before, in the order of the fusions: its sum
// and 0, its deviation and mean, its range and minimum. Over tokens that are numbers in both.
template <class C>
CDROP_DEVICE void scaling(const C& c, const uint32_t* list, const uint32_t* visual,
                          const uint32_t* textual, double* out) {
  double sum = 0.0, squares = 0.0;
  double low = c.g.infinity(), high = -low, count = 0.0;
  const auto counted = [&](int i) { return visual[i] > kNanKey && textual[i] > kNanKey; };
  for (int i = c.thread; i < c.tokens; i += kThreads) {
    if (!counted(i)) continue;
    const double v = key_value(list[i]);
    sum += v;
    count += 1.0;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  const auto plus = [](double a, double b) { return a + b; };
  sum = reduce(c, sum, plus);
  count = reduce(c, count, plus);
  const double mean = count > 0.0 ? sum / count : 0.0;
  if (c.p.select.fusion == Fusion::kSum) {
    out[0] = sum;
    out[1] = 0.0;
  } else if (c.p.select.fusion == Fusion::kMax) {
    low = reduce(c, low, [](double a, double b) { return a < b ? a : b; });
    high = reduce(c, high, [](double a, double b) { return a > b ? a : b; });
    out[0] = count > 0.0 ? static_cast<float>(high) - static_cast<float>(low) : 0.0;
    out[1] = low;
  } else {
    for (int i = c.thread; i < c.tokens; i += kThreads) {
      const double away = key_value(list[i]) - mean;
      if (counted(i)) squares += away * away;
    }
    squares = reduce(c, squares, plus);
    out[0] = count > 0.0 ? c.g.sqrt(squares / count) : 0.0;
    out[1] = mean;
  }
}

// The fused key of each token of the slice, from the scores of all tokens.
template <class C>
CDROP_DEVICE void fuse(const C& c) {
  const int n = c.plan.tokens, sides = c.p.has_text ? 2 : 1;
  uint32_t* keys = shared<uint32_t>(c, c.plan.at.keys);
  uint32_t* places = shared<uint32_t>(c, c.plan.at.places);
  uint32_t* valid_count = shared<uint32_t>(c, c.plan.at.histogram);
  if (c.thread == 0) *valid_count = 0;
  for (int i = c.thread; i < 2 * n; i += kThreads) places[i] = 0;
  c.g.sync();
  uint32_t mine = 0;
  for (int i = c.thread; i < c.tokens; i += kThreads) {
    const float* from = peer<float>(c, i / n, c.plan.at.saliency) + i % n;
    const bool is_valid = valid(c, i);
    mine += is_valid;
    for (int side = 0; side < sides; ++side) {
      keys[side * c.tokens + i] = is_valid ? order_key(from[side * n], kNanKey) : kInvalidKey;
    }
  }
  if (mine > 0) c.g.atomic_add(valid_count, mine);
  c.g.sync();
  if (by_places(c)) {
    count_places(c, keys, places);
    c.g.sync();
  }
  double statistics[4] = {1.0, 0.0, 1.0, 0.0};
  if (c.p.has_text && !by_places(c) && c.p.select.fusion != Fusion::kProduct) {
    scaling(c, keys, keys, keys + c.tokens, statistics);
    scaling(c, keys + c.tokens, keys, keys + c.tokens, statistics + 2);
  }
  uint64_t* out = peer<uint64_t>(c, c.rank, c.plan.at.fused);
  for (int i = c.thread; i < c.count; i += kThreads) {
    const int token = c.first + i;
    const uint32_t v = keys[token], t = c.p.has_text ? keys[c.tokens + token] : v;
    uint32_t key = v, tie = static_cast<uint32_t>(token);
    if (v != kInvalidKey && c.p.has_text) {
      key = v == kNanKey || t == kNanKey
                ? kNanKey
                : order_key(fused(c, v, t, places[i], places[n + i], *valid_count, statistics),
                            kNanKey);
      if (c.p.select.fusion == Fusion::kRank) tie = places[i];
    }
    out[i] = ranked_key(key, tie);
  }
}

// --- choice ------------------------------------------------------------------------------------

// Every block of the sample chooses for itself, which is cheaper than to be told. Leaves the slot
// of each token: of the kept ones, of contextual references, `kJoins` for the others.

// One warp: the digit in which the `left`-th key from above lies, how many keys have larger ones,
// and how many have it.
template <class C>
CDROP_DEVICE void find_digit(const C& c, const uint32_t* histogram, uint32_t left, uint64_t* out) {
  constexpr int kPer = kRadixBins / 32;
  const int last = kRadixBins - 1 - c.lane * kPer;  // lanes go from the top down
  uint32_t own = 0;
  for (int i = 0; i < kPer; ++i) own += histogram[last - i];
  uint32_t through = own;
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t v = c.g.shfl_up(through, by);
    if (c.lane >= by) through += v;
  }
  uint32_t above = through - own;
  if (above >= left || through < left) return;
  for (int i = 0; i < kPer; ++i) {
    const uint32_t here = histogram[last - i];
    if (above + here >= left) {
      out[0] = static_cast<uint64_t>(last - i);
      out[1] = above;
      out[2] = here;
      return;
    }
    above += here;
  }
}

// The smallest of the `wanted` largest keys, of which 0 is none; the others are distinct.
template <class C>
CDROP_DEVICE uint64_t smallest_chosen(const C& c, const uint64_t* keys, int64_t wanted) {
  uint64_t* scratch = shared<uint64_t>(c, c.plan.at.scratch);
  uint32_t* histogram = shared<uint32_t>(c, c.plan.at.histogram);
  uint64_t low = ~uint64_t{0}, high = 0, count = 0;
  for (int i = c.thread; i < c.tokens; i += kThreads) {
    if (keys[i] == 0) continue;
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
    ++count;
  }
  if (c.thread == 0) scratch[0] = ~uint64_t{0}, scratch[1] = 0, scratch[2] = 0;
  c.g.sync();
  for (int by = 16; by > 0; by /= 2) {
    const uint64_t l = c.g.shfl_xor(low, by), h = c.g.shfl_xor(high, by);
    low = l < low ? l : low;
    high = h > high ? h : high;
    count += c.g.shfl_xor(count, by);
  }
  if (c.lane == 0) {
    c.g.atomic_min(scratch, low);
    c.g.atomic_max(scratch + 1, high);
    c.g.atomic_add(scratch + 2, count);
  }
  c.g.sync();
  low = scratch[0], high = scratch[1], count = scratch[2];
  if (wanted <= 0) return ~uint64_t{0};
  if (static_cast<uint64_t>(wanted) >= count) return 1;

  RadixSearch search = start_search(low, high, static_cast<uint32_t>(wanted));
  for (bool done = false; !done;) {
    for (int i = c.thread; i < kRadixBins; i += kThreads) histogram[i] = 0;
    c.g.sync();
    for (int i = c.thread; i < c.tokens; i += kThreads) {
      if (keys[i] != 0 && search.open(keys[i])) {
        c.g.atomic_add(histogram + search.digit(keys[i]), uint32_t{1});
      }
    }
    c.g.sync();
    if (c.warp == 0) find_digit(c, histogram, search.left, scratch);
    c.g.sync();
    done = search.narrow(static_cast<uint32_t>(scratch[0]), static_cast<uint32_t>(scratch[1]),
                         static_cast<uint32_t>(scratch[2]));
  }
  return search.threshold();
}

// Slots in ascending order of their tokens, by prefix sums; contextual references by formula.
template <class C>
CDROP_DEVICE void number_slots(const C& c, uint16_t* slots) {
  int* own = shared<int>(c, c.plan.at.own);
  const int keep = static_cast<int>(c.p.merge.keep);
  const int contextual = static_cast<int>(c.p.merge.contextual);
  for (int s = c.thread; s < keep + contextual; s += kThreads) own[s] = -1;
  const int per = (c.tokens + kThreads - 1) / kThreads;
  const int begin = c.thread * per < c.tokens ? c.thread * per : c.tokens;
  const int end = begin + per < c.tokens ? begin + per : c.tokens;
  uint64_t mine = 0;  // kept tokens, and dropped ones in the upper half
  for (int i = begin; i < end; ++i) {
    if (slots[i] == kKept) mine += 1;
    if (slots[i] == kJoins) mine += uint64_t{1} << 32;
  }
  uint64_t all;
  const uint64_t ahead = before(c, mine, &all);
  int slot = static_cast<int>(ahead & 0xffffffffu);
  int64_t number = static_cast<int64_t>(ahead >> 32);
  const int64_t dropped = static_cast<int64_t>(all >> 32);
  for (int i = begin; i < end; ++i) {
    if (slots[i] == kKept) {
      own[slot] = i;
      slots[i] = static_cast<uint16_t>(slot++);
    } else if (slots[i] == kJoins) {
      const int which = contextual > 0 ? contextual_slot(number, dropped, contextual) : -1;
      ++number;
      if (which >= 0) {
        own[keep + which] = i;
        slots[i] = static_cast<uint16_t>(keep + which);
      }
    }
  }
  c.g.sync();
  if (c.rank == 0 && c.p.merge.out_index != nullptr) {
    int64_t* out = c.p.merge.out_index + c.b * (keep + contextual);
    for (int s = c.thread; s < keep + contextual; s += kThreads) out[s] = own[s];
  }
}

template <class C>
CDROP_DEVICE void choose(const C& c) {
  const int n = c.plan.tokens;
  uint64_t* keys = shared<uint64_t>(c, c.plan.at.keys);
  uint16_t* slots = shared<uint16_t>(c, c.plan.at.slots);
  for (int i = c.thread; i < c.tokens; i += kThreads) {
    keys[i] = peer<uint64_t>(c, i / n, c.plan.at.fused)[i % n];
  }
  c.g.sync();
  const uint64_t least = smallest_chosen(c, keys, c.p.select.keep - c.p.select.priority_keep);
  for (int i = c.thread; i < c.tokens; i += kThreads) {
    slots[i] = keys[i] == 0 ? kNoSlot : keys[i] >= least ? kKept : kJoins;
  }
  if (c.p.select.priority_keep > 0) {
    for (int i = c.thread; i < c.tokens; i += kThreads) {
      const uint32_t key = order_key(c.p.select.priority.at(c.b, i), kNanKey);
      keys[i] = slots[i] == kJoins ? ranked_key(key, static_cast<uint32_t>(i)) : 0;
    }
    c.g.sync();
    const uint64_t more = smallest_chosen(c, keys, c.p.select.priority_keep);
    for (int i = c.thread; i < c.tokens; i += kThreads) {
      if (keys[i] != 0 && keys[i] >= more) slots[i] = kKept;
    }
  }
  c.g.sync();
  number_slots(c, slots);
}

// --- assignment --------------------------------------------------------------------------------

template <class C>
CDROP_DEVICE float element(const C& c, const float* metric, int token, int f) {
  return token < c.count && f < static_cast<int>(c.p.merge.metric_width)
             ? metric[token * c.plan.metric_stride + f]
             : 0.0f;
}

// A cosine over the number of its target, the lower of which wins a tie; 0 without a target.
CDROP_DEVICE inline uint64_t candidate(float cosine, int target, const int* targets, int most) {
  if (target >= most || targets[target] < 0) return 0;
  cosine = cosine > 1.0f ? 1.0f : cosine < -1.0f ? -1.0f : cosine;
  const uint32_t key = order_key(cosine == cosine ? cosine : -2.0f, 0);
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(target));
}

CDROP_DEVICE inline uint64_t better(uint64_t a, uint64_t b) { return a > b ? a : b; }

// The best of the four lanes that hold one token's products.
template <class C>
CDROP_DEVICE void offer(const C& c, uint64_t* best, int token, uint64_t key) {
  key = better(key, c.g.shfl_xor(key, 1));
  key = better(key, c.g.shfl_xor(key, 2));
  if (c.lane % 4 == 0 && token < c.count && key != 0) c.g.atomic_max(best + token, key);
}

// Each dropped token of the slice joins the target of the largest cosine: products of unit
// vectors on tensor cores, in three parts that together keep 22 bits, and a running maximum.
template <class C>
CDROP_DEVICE void nearest(const C& c) {
  const int keep = static_cast<int>(c.p.merge.keep);
  const int contextual = static_cast<int>(c.p.merge.contextual);
  const int from = contextual > 0 ? keep : 0, most = contextual > 0 ? contextual : keep;
  const int stride = c.plan.metric_stride, n = c.plan.tokens, g = c.lane / 4, t = c.lane % 4;
  const int steps = (stride - 4) / 8;
  const int* targets = shared<int>(c, c.plan.at.own) + from;
  const uint16_t* slots = shared<uint16_t>(c, c.plan.at.slots);
  float* stage = shared<float>(c, c.plan.at.stage);
  uint64_t* best = shared<uint64_t>(c, c.plan.at.best);
  const float* metric = peer<float>(c, c.rank, c.plan.at.metric);
  for (int i = c.thread; i < n; i += kThreads) best[i] = 0;

  const int tiles = (c.count + 15) / 16;
  for (int base = 0; base < most && c.count > 0; base += c.plan.stage_targets) {
    const int here = most - base < c.plan.stage_targets ? most - base : c.plan.stage_targets;
    const int padded = (here + 7) / 8 * 8;
    c.g.sync();  // the last tile has been read
    for (int i = c.thread; i < padded * (stride / 4); i += kThreads) {
      const int target = i / (stride / 4), word = i % (stride / 4) * 4;
      const int token = target < here ? targets[base + target] : -1;
      for (int e = 0; e < 4; ++e) {
        const bool there = token >= 0 && word + e < static_cast<int>(c.p.merge.metric_width);
        stage[target * stride + word + e] =
            there ? peer<float>(c, token / n, c.plan.at.metric)[token % n * stride + word + e]
                  : 0.0f;
      }
    }
    c.g.sync();
    for (int item = c.warp; item < tiles * (padded / 8); item += kWarps) {
      const int tile = item % tiles, eight = item / tiles * 8;
      const int upper = tile * 16 + g, lower = upper + 8;
      float sum[4] = {};
      for (int step = 0; step < steps; ++step) {
        const int f = 8 * step + t;
        const float a[4] = {element(c, metric, upper, f), element(c, metric, lower, f),
                            element(c, metric, upper, f + 4), element(c, metric, lower, f + 4)};
        const float b[2] = {stage[(eight + g) * stride + f], stage[(eight + g) * stride + f + 4]};
        c.g.multiply_exactly(sum, a, b);
      }
      const int left = base + eight + 2 * t;
      offer(c, best, upper,
            better(candidate(sum[0], left, targets, most),
                   candidate(sum[1], left + 1, targets, most)));
      offer(c, best, lower,
            better(candidate(sum[2], left, targets, most),
                   candidate(sum[3], left + 1, targets, most)));
    }
  }
  c.g.sync();
  const float threshold = c.p.merge.threshold > -1.0f ? c.p.merge.threshold : -1.0f;
  int* out = peer<int>(c, c.rank, c.plan.at.slots_out);
  for (int i = c.thread; i < c.count; i += kThreads) {
    const uint16_t slot = slots[c.first + i];
    int assigned = slot == kNoSlot ? -1 : slot;
    if (slot == kJoins) {
      const uint64_t found = best[i];
      const float cosine = key_value(static_cast<uint32_t>(found >> 32));
      const bool joins = found != 0 && (contextual > 0 || cosine >= threshold);
      const int target = static_cast<int>(0xffffffffu - static_cast<uint32_t>(found));
      assigned = joins ? from + target : -1;
    }
    out[i] = assigned;
    c.p.merge.out_assign[c.b * c.tokens + c.first + i] = assigned;
  }
}

}  // namespace cdrop::cuda
