// What a block holds while it works on a sample, and the small functions that every phase needs.
#pragma once

#include "numbers.h"
#include "plan.h"

namespace cdrop::cuda {

constexpr uint16_t kNoSlot = 0xffffu;  // of a token that is in none
// While slots are given out: of a token that will be kept, and of one that will join.
constexpr uint16_t kKept = 0xfffdu, kJoins = 0xfffeu;

// `Group` is what a block knows of itself and of the others that share its sample: a cluster or a
// grid on the device (select_merge.cu), or an emulation of either on the CPU that the tests run.
template <class Group>
struct Context {
  Group& g;
  const SelectMergeParams& p;
  const LaunchPlan& plan;
  int thread, warp, lane, rank;
  int tokens;        // of the sample
  int first, count;  // the slice of this rank
  int first_prefix, prefix_count;
  int64_t b;  // the sample

  CDROP_DEVICE Context(Group& group, const SelectMergeParams& params, const LaunchPlan& launch,
                       int64_t sample)
      : g(group),
        p(params),
        plan(launch),
        thread(group.thread()),
        warp(thread / 32),
        lane(thread % 32),
        rank(group.rank()),
        tokens(static_cast<int>(params.merge.tokens)),
        first(rank * launch.tokens),
        count(part(tokens, first, launch.tokens)),
        first_prefix(rank * launch.prefix),
        prefix_count(part(static_cast<int>(params.visual.prefix), first_prefix, launch.prefix)),
        b(sample) {}

 private:
  CDROP_DEVICE static int part(int all, int first, int most) {
    const int left = all - first;
    return left < 0 ? 0 : left < most ? left : most;
  }
};

template <typename T, class C>
CDROP_DEVICE T* shared(const C& c, uint32_t offset) {
  return reinterpret_cast<T*>(c.g.shared() + offset);
}

// In the area of a block of the sample, this one or another.
template <typename T, class C>
CDROP_DEVICE T* peer(const C& c, int rank, uint32_t offset) {
  return reinterpret_cast<T*>(c.g.peer(rank) + offset);
}

template <class C>
CDROP_DEVICE bool valid(const C& c, int token) {
  return !c.p.select.valid || c.p.select.valid.at(c.b, token) != 0;
}

// Sum of the values of the threads before this one, and of all.
template <class C>
CDROP_DEVICE uint64_t before(const C& c, uint64_t value, uint64_t* all) {
  uint64_t* scratch = shared<uint64_t>(c, c.plan.at.scratch);
  uint64_t through = value;
  for (int by = 1; by < 32; by *= 2) {
    const uint64_t v = c.g.shfl_up(through, by);
    if (c.lane >= by) through += v;
  }
  c.g.sync();
  if (c.lane == 31) scratch[c.warp] = through;
  c.g.sync();
  uint64_t sum = 0, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < c.warp) sum += scratch[w];
    total += scratch[w];
  }
  *all = total;
  return sum + through - value;
}

}  // namespace cdrop::cuda
