// Every slot becomes the mean of its tokens. A block owns a slice of the columns.
#pragma once

#include "context.h"

namespace cdrop::cuda {

template <class C>
CDROP_DEVICE void collect_slots(const C& c) {
  const int n = c.plan.tokens;
  uint16_t* slots = shared<uint16_t>(c, c.plan.at.slots);
  c.g.sync();
  for (int i = c.thread; i < c.tokens; i += kThreads) {
    const int slot = peer<int>(c, i / n, c.plan.at.slots_out)[i % n];
    slots[i] = slot < 0 ? kNoSlot : static_cast<uint16_t>(slot);
  }
  c.g.sync();
}

// Each warp goes over its stretch of tokens in order and counts them up by slot; `visit` gets the
// number that a token has among those of its slot.
template <class Visit, class C>
CDROP_DEVICE void walk_slots(const C& c, int all, uint16_t* counters, Visit visit) {
  const uint16_t* slots = shared<uint16_t>(c, c.plan.at.slots);
  const int stretch = (c.tokens + 32 * kWarps - 1) / (32 * kWarps) * 32;
  const int begin = c.warp * stretch;
  const int end = begin + stretch < c.tokens ? begin + stretch : c.tokens;
  uint16_t* mine = counters + c.warp * all;
  for (int base = begin; base < end; base += 32) {
    const int token = base + c.lane;
    const uint32_t slot = token < end ? slots[token] : kNoSlot;
    const uint32_t same = c.g.match_any(slot);
    const uint32_t ahead = c.g.popcount(same & ((1u << c.lane) - 1));
    uint32_t counted = 0;
    if (slot != kNoSlot) {
      counted = mine[slot];
      visit(static_cast<int>(slot), counted + ahead, token);
    }
    c.g.sync_warp();
    if (slot != kNoSlot && ahead == 0) {
      mine[slot] = static_cast<uint16_t>(counted + c.g.popcount(same));
    }
    c.g.sync_warp();
  }
}

// A stable counting sort: tokens in the order of (slot, token), and where each slot begins.
template <class C>
CDROP_DEVICE void sort_by_slot(const C& c) {
  const int all = static_cast<int>(c.p.merge.keep + c.p.merge.contextual);
  uint16_t* counters = shared<uint16_t>(c, c.plan.at.counters);  // [warp, slot]
  uint32_t* starts = shared<uint32_t>(c, c.plan.at.starts);
  for (int i = c.thread; i < kWarps * all; i += kThreads) counters[i] = 0;
  c.g.sync();
  walk_slots(c, all, counters, [](int, uint32_t, int) {});
  c.g.sync();
  const int per = (all + kThreads - 1) / kThreads;
  const int begin = c.thread * per < all ? c.thread * per : all;
  const int end = begin + per < all ? begin + per : all;
  uint64_t mine = 0;
  for (int s = begin; s < end; ++s) {
    uint32_t run = 0;
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t here = counters[w * all + s];
      counters[w * all + s] = static_cast<uint16_t>(run);
      run += here;
    }
    starts[s] = run;
    mine += run;
  }
  uint64_t total;
  uint32_t at = static_cast<uint32_t>(before(c, mine, &total));
  for (int s = begin; s < end; ++s) {
    const uint32_t run = starts[s];
    starts[s] = at;
    at += run;
  }
  if (c.thread == 0) starts[all] = static_cast<uint32_t>(total);
  c.g.sync();
  uint16_t* order = shared<uint16_t>(c, c.plan.at.order);
  walk_slots(c, all, counters, [&](int slot, uint32_t place, int token) {
    order[starts[slot] + place] = static_cast<uint16_t>(token);
  });
  if (c.rank == 0) {
    float* out = c.p.merge.out_size + c.b * all;
    for (int s = c.thread; s < all; s += kThreads) {
      out[s] = static_cast<float>(starts[s + 1] - starts[s]);
    }
  }
  c.g.sync();
}

template <typename T, class C>
CDROP_DEVICE const T* row_of(const C& c, int token) {
  return static_cast<const T*>(c.p.merge.x.data) + c.b * c.p.merge.x.stride[0] +
         token * c.p.merge.x.stride[1];
}
template <typename T, class C>
CDROP_DEVICE T* out_row(const C& c, int slot) {
  const int64_t all = c.p.merge.keep + c.p.merge.contextual;
  return static_cast<T*>(c.p.merge.out_tokens) + (c.b * all + slot) * c.p.merge.width;
}

// Elements `start..start + 7` of a row, zero past its end. `kWide`: rows are read 16 bytes at a
// time, and their width is a multiple of eight.
template <bool kWide, typename T>
CDROP_DEVICE Eight<T> load_eight(const T* row, int start, int width) {
  if constexpr (kWide) return load_wide(row + start);
  Eight<T> out{};
  for (int e = 0; e < 8; ++e) {
    if (start + e < width) out.at[e] = row[start + e];
  }
  return out;
}

template <bool kWide, typename T>
CDROP_DEVICE void store_eight(T* row, int start, int width, const Eight<T>& value) {
  if constexpr (kWide) {
    *reinterpret_cast<Eight<T>*>(row + start) = value;
  } else {
    for (int e = 0; e < 8; ++e) {
      if (start + e < width) row[start + e] = value.at[e];
    }
  }
}

// Whether a slot is its own token, bit for bit.
template <class C>
CDROP_DEVICE bool alone(const C& c, uint32_t length) {
  return length == 1 || c.p.merge.blend == 0.0f;
}

template <typename T, bool kWide, class C>
CDROP_DEVICE void write_mean(const C& c, int slot, uint32_t length, int start, const float* sum) {
  const float by = 1.0f + c.p.merge.blend * static_cast<float>(length - 1);
  Eight<T> out;
  for (int e = 0; e < 8; ++e) from_float(c.g.div_rn(sum[e], by), &out.at[e]);
  store_eight<kWide>(out_row<T>(c, slot), start, static_cast<int>(c.p.merge.width), out);
}

template <typename T, bool kWide, class C>
CDROP_DEVICE void piece_sums(const C& c, int column, int columns) {
  const int all = static_cast<int>(c.p.merge.keep + c.p.merge.contextual);
  const uint16_t* slots = shared<uint16_t>(c, c.plan.at.slots);
  const uint16_t* order = shared<uint16_t>(c, c.plan.at.order);
  const uint32_t* starts = shared<uint32_t>(c, c.plan.at.starts);
  const int* own = shared<int>(c, c.plan.at.own);
  float* fragments = shared<float>(c, c.plan.at.fragments);
  const uint32_t total = starts[all], length = static_cast<uint32_t>(c.plan.segment);
  constexpr uint32_t kAhead = kWide ? (sizeof(T) == 4 ? 2 : 4) : 1;
  const int eights = (columns + 7) / 8;
  const int pieces = static_cast<int>((total + length - 1) / length);
  const int width = static_cast<int>(c.p.merge.width);
  CDROP_ROLL
  for (int item = c.thread; item < pieces * eights; item += kThreads) {
    const uint32_t piece = static_cast<uint32_t>(item / eights);
    const int eight = item % eights * 8;
    const uint32_t first = piece * length;
    const uint32_t last = first + length < total ? first + length : total;
    CDROP_ROLL
    for (uint32_t at = first; at < last;) {
      const int slot = slots[order[at]];
      const uint32_t list = starts[slot], list_end = starts[slot + 1];
      const uint32_t stop = list_end < last ? list_end : last;
      if (alone(c, list_end - list)) {
        at = stop;
        continue;
      }
      float sum[8] = {};
      const int own_token = own[slot];
      while (at < stop) {
        // Several rows are on their way before the first is added.
        Eight<T> rows[kAhead];
        CDROP_UNROLL
        for (uint32_t i = 0; i < kAhead; ++i) {
          if (at + i >= stop) break;
          rows[i] = load_eight<kWide>(row_of<T>(c, order[at + i]), column + eight, width);
        }
        CDROP_UNROLL
        for (uint32_t i = 0; i < kAhead; ++i) {
          if (at + i >= stop) break;
          const float by = order[at + i] == own_token ? 1.0f : c.p.merge.blend;
          for (int e = 0; e < 8; ++e) sum[e] += by * to_float(rows[i].at[e]);
        }
        at += kAhead;
      }
      at = stop;
      if (list >= first && list_end <= last) {
        write_mean<T, kWide>(c, slot, list_end - list, column + eight, sum);
      } else {  // at `[piece, 0]` where the list began earlier, else at `[piece, 1]`
        const uint32_t which = 2 * piece + (list >= first);
        for (int e = 0; e < 8; ++e) {
          fragments[which * c.plan.block_columns + eight + e] = sum[e];
        }
      }
    }
  }
}

// Slots that no piece could finish: lists over several pieces, tokens alone, and empty slots.
template <typename T, bool kWide, class C>
CDROP_DEVICE void whole_lists(const C& c, int column, int columns) {
  const int all = static_cast<int>(c.p.merge.keep + c.p.merge.contextual);
  const uint32_t* starts = shared<uint32_t>(c, c.plan.at.starts);
  const int* own = shared<int>(c, c.plan.at.own);
  const float* fragments = shared<float>(c, c.plan.at.fragments);
  const uint32_t length = static_cast<uint32_t>(c.plan.segment);
  const int eights = (columns + 7) / 8;
  const int width = static_cast<int>(c.p.merge.width);
  CDROP_ROLL
  for (int item = c.thread; item < all * eights; item += kThreads) {
    const int slot = item / eights, start = column + item % eights * 8;
    const uint32_t list = starts[slot], list_end = starts[slot + 1];
    if (list == list_end || alone(c, list_end - list)) {
      Eight<T> copy{};
      if (list < list_end) copy = load_eight<kWide>(row_of<T>(c, own[slot]), start, width);
      store_eight<kWide>(out_row<T>(c, slot), start, width, copy);
      continue;
    }
    const uint32_t first = list / length, last = (list_end - 1) / length;
    if (first == last) continue;
    float sum[8] = {};
    for (uint32_t piece = first; piece <= last; ++piece) {
      const float* from =
          fragments + (2 * piece + (piece == first)) * c.plan.block_columns + item % eights * 8;
      for (int e = 0; e < 8; ++e) sum[e] += from[e];
    }
    write_mean<T, kWide>(c, slot, list_end - list, start, sum);
  }
}

// The sorted tokens are cut into equal pieces, whatever the lengths of the lists: a thread adds
// up eight columns of one piece. Lists that end in another piece are put together afterwards, in
// order.
template <typename T, bool kWide, class C>
CDROP_DEVICE void means(const C& c) {
  const int begin = c.rank * c.plan.columns, width = static_cast<int>(c.p.merge.width);
  const int end = begin + c.plan.columns < width ? begin + c.plan.columns : width;
  for (int column = begin; column < end; column += c.plan.block_columns) {
    const int here = end - column < c.plan.block_columns ? end - column : c.plan.block_columns;
    piece_sums<T, kWide>(c, column, here);
    c.g.sync();
    whole_lists<T, kWide>(c, column, here);
    c.g.sync();
  }
}

template <typename T, class C>
CDROP_DEVICE void means_of_dtype(const C& c) {
  const MergeParams& m = c.p.merge;
  const int64_t out_strides[3] = {m.width, 0, 0};
  if (m.width % 8 == 0 && sixteen_aligned<T>(m.x.data, m.x.stride) &&
      sixteen_aligned<T>(m.out_tokens, out_strides)) {
    means<T, true>(c);
  } else {
    means<T, false>(c);
  }
}

template <class C>
CDROP_DEVICE void merge(const C& c) {
  sort_by_slot(c);
  switch (c.p.merge.x.dtype) {
    case DType::kFloat32: return means_of_dtype<float>(c);
    case DType::kFloat16: return means_of_dtype<Half>(c);
    case DType::kBFloat16: return means_of_dtype<BFloat16>(c);
  }
}

}  // namespace cdrop::cuda
