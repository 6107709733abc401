// Runs the bodies of the CUDA kernels on the CPU: every thread of every block is a fiber, and
// blocks of a cluster or of a grid meet at the same barriers as on a device. Shows wrong indices,
// missing barriers that the order of threads decides (the order is a setting), and what nobody
// wrote (memory starts as NaN). Does not show what only hardware does: visibility between caches,
// instruction semantics beyond their definition, time.
#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cuda/select_merge_body.h"

namespace cdrop::emulated {
namespace {

using cuda::Eight;
using cuda::LaunchPlan;
using cuda::Path;

// --- fibers --------------------------------------------------------------------------------------

struct Barrier {
  int members = 0, arrived = 0, generation = 0;
  // Returns the generation to wait for the end of.
  int arrive() {
    const int now = generation;
    if (++arrived == members) arrived = 0, ++generation;
    return now;
  }
};

class Scheduler;
Scheduler* scheduler = nullptr;

class Scheduler {
 public:
  explicit Scheduler(int fibers) : fibers_(static_cast<size_t>(fibers)) {
    bytes_ = static_cast<size_t>(fibers) * kStack;
    stacks_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) throw std::runtime_error("no memory for the fibers");
  }
  ~Scheduler() { munmap(stacks_, bytes_); }

  // Runs `body(i)` for every fiber until all have returned, or one has thrown.
  void run(int64_t order_seed, std::function<void(int)> body) {
    scheduler = this;
    body_ = std::move(body);
    std::vector<int> order(fibers_.size());
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(static_cast<uint64_t>(order_seed));
    size_t left = fibers_.size();
    while (left > 0) {
      if (order_seed != 0) std::shuffle(order.begin(), order.end(), random);
      bool moved = false;
      for (const int i : order) {
        Fiber& fiber = fibers_[static_cast<size_t>(i)];
        if (fiber.done) continue;
        if (fiber.barrier != nullptr && fiber.barrier->generation == fiber.generation) continue;
        fiber.barrier = nullptr;
        resume(i);
        if (error_) std::rethrow_exception(error_);
        moved = true;
        left -= fiber.done;
      }
      if (!moved) throw std::runtime_error("deadlock: a barrier that not all threads reach");
    }
    scheduler = nullptr;
  }

  void wait(const Barrier& barrier, int generation) {
    if (barrier.generation != generation) return;
    Fiber& fiber = fibers_[static_cast<size_t>(current_)];
    fiber.barrier = &barrier;
    fiber.generation = generation;
    if (_setjmp(fiber.here) == 0) _longjmp(main_, 1);
  }

 private:
  static constexpr size_t kStack = 32768;
  struct Fiber {
    jmp_buf here;
    ucontext_t context;
    bool started = false, done = false;
    const Barrier* barrier = nullptr;
    int generation = 0;
  };

  void resume(int i) {
    current_ = i;
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    if (_setjmp(main_) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks_ + static_cast<size_t>(i) * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::enter, 0);
    setcontext(&fiber.context);
  }

  static void enter() {
    Scheduler* self = scheduler;
    const int i = self->current_;
    try {
      self->body_(i);
    } catch (...) {  // nothing may leave the stack of a fiber
      self->error_ = std::current_exception();
    }
    self->fibers_[static_cast<size_t>(i)].done = true;
    _longjmp(self->main_, 1);
  }

  std::vector<Fiber> fibers_;
  std::function<void(int)> body_;
  std::exception_ptr error_;
  char* stacks_ = nullptr;
  size_t bytes_ = 0;
  jmp_buf main_;
  int current_ = 0;
};

void meet(Barrier& barrier) { scheduler->wait(barrier, barrier.arrive()); }

// --- a warp, a block, a group of blocks ----------------------------------------------------------

struct Fragments {
  float a[16][16];  // [row, k]
  float b[8][16];   // [column, k]
  float* sums[32];
};

struct Warp {
  Barrier barrier{32};
  uint64_t values[2][32];
  Fragments fragments;
};

struct BlockMemory {
  Barrier barrier{cuda::kThreads};
  std::vector<Warp> warps = std::vector<Warp>(cuda::kWarps);
  std::vector<char> shared;
};

// The counterpart of the device's groups: see select_merge.cu.
class Group {
 public:
  // `sample`: the blocks of its sample, of which it is one.
  Group(int thread, int rank, int group, BlockMemory* sample, Barrier& meeting,
        const LaunchPlan& plan, char* workspace)
      : thread_(thread),
        rank_(rank),
        group_(group),
        sample_(sample),
        block_(sample[rank]),
        warp_(block_.warps[static_cast<size_t>(thread / 32)]),
        meeting_(meeting),
        plan_(plan),
        workspace_(workspace) {}

  int thread() const { return thread_; }
  int rank() const { return rank_; }
  int group() const { return group_; }
  char* shared() const { return block_.shared.data(); }
  char* peer(int rank) const {
    if (rank < 0 || rank >= plan_.ranks) throw std::runtime_error("no such rank");
    if (plan_.path == Path::kCluster) return sample_[rank].shared.data() + plan_.at.peers;
    return workspace_ + (int64_t{group_} * plan_.ranks + rank) * plan_.at.peer_bytes;
  }

  void sync() const { meet(block_.barrier); }
  void sync_warp() const { meet(warp_.barrier); }
  void sync_group() {
    arrive();
    wait();
  }
  void arrive() {
    if (arrived_ >= 0) throw std::runtime_error("a second arrival before the wait for the first");
    arrived_ = meeting_.arrive();
  }
  void wait() {
    if (arrived_ < 0) throw std::runtime_error("a wait without an arrival");
    scheduler->wait(meeting_, arrived_);
    arrived_ = -1;
  }

  template <typename T>
  T shfl(T value, int lane) const {
    return exchange(value, [&](const uint64_t* from) { return from[lane]; });
  }
  template <typename T>
  T shfl_xor(T value, int mask) const {
    return exchange(value, [&](const uint64_t* from) { return from[(thread_ % 32) ^ mask]; });
  }
  template <typename T>
  T shfl_up(T value, int by) const {
    const int lane = thread_ % 32;
    return exchange(value,
                    [&](const uint64_t* from) { return from[lane >= by ? lane - by : lane]; });
  }
  uint32_t match_any(uint32_t value) const {
    return exchange(value, [&](const uint64_t* from) {
      uint32_t same = 0;
      for (int lane = 0; lane < 32; ++lane) same |= uint32_t{from[lane] == value} << lane;
      return uint64_t{same};
    });
  }
  uint32_t popcount(uint32_t value) const {
    return static_cast<uint32_t>(__builtin_popcount(value));
  }

  template <typename T>
  void atomic_max(T* at, T value) const {
    *at = std::max(*at, value);
  }
  template <typename T>
  void atomic_min(T* at, T value) const {
    *at = std::min(*at, value);
  }
  template <typename T>
  void atomic_add(T* at, T value) const {
    *at += value;
  }

  float exp2(float v) const { return std::exp2(v); }
  float log(float v) const { return std::log(v); }
  float div_rn(float a, float b) const { return a / b; }
  float mul_rn(float a, float b) const { return a * b; }
  float add_rn(float a, float b) const { return a + b; }
  float sqrt_rn(float v) const { return std::sqrt(v); }
  double sqrt(double v) const { return std::sqrt(v); }
  bool is_finite(float v) const { return std::isfinite(v); }
  float infinity() const { return std::numeric_limits<float>::infinity(); }
  float nan() const { return std::numeric_limits<float>::quiet_NaN(); }
  void prefetch(const void* at) const {
    // A load, so that an address outside every tensor is found by a sanitizer.
    static_cast<void>(*static_cast<const volatile char*>(at));
  }

  // mma.m16n8k16, twice: the fragments as the instruction's definition lays them out.
  template <typename T>
  void multiply(float (&sum)[4], const Eight<T>& up, const Eight<T>& low,
                const Eight<T>& key) const {
    if constexpr (std::is_same_v<T, float>) {
      for (int step = 0; step < 4; ++step) {
        const float a[4] = {up.at[2 * step], low.at[2 * step], up.at[2 * step + 1],
                            low.at[2 * step + 1]};
        const float b[2] = {key.at[2 * step], key.at[2 * step + 1]};
        multiply_exactly(sum, a, b);
      }
    } else {
      const int g = thread_ % 32 / 4, t = thread_ % 4;
      for (int step = 0; step < 2; ++step) {
        collective(sum, 16, [&](Fragments& f) {
          for (int half = 0; half < 2; ++half) {
            for (int e = 0; e < 2; ++e) {
              const int k = 2 * t + e + 8 * half, from = 4 * step + 2 * half + e;
              f.a[g][k] = cuda::to_float(up.at[from]);
              f.a[g + 8][k] = cuda::to_float(low.at[from]);
              f.b[g][k] = cuda::to_float(key.at[from]);
            }
          }
        });
      }
    }
  }

  // mma.m16n8k8 in float32: what the three TF32 products come to, but for 2^-22.
  void multiply_exactly(float (&sum)[4], const float (&a)[4], const float (&b)[2]) const {
    const int g = thread_ % 32 / 4, t = thread_ % 4;
    collective(sum, 8, [&](Fragments& f) {
      f.a[g][t] = a[0], f.a[g + 8][t] = a[1], f.a[g][t + 4] = a[2], f.a[g + 8][t + 4] = a[3];
      f.b[g][t] = b[0], f.b[g][t + 4] = b[1];
    });
  }

 private:
  int thread_, rank_, group_;
  BlockMemory* sample_;
  BlockMemory& block_;
  Warp& warp_;
  Barrier& meeting_;
  const LaunchPlan& plan_;
  char* workspace_;
  int arrived_ = -1;  // the generation to wait for the end of

  template <typename T, class Pick>
  T exchange(T value, Pick pick) const {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    uint64_t* buffer = warp_.values[warp_.barrier.generation % 2];
    buffer[thread_ % 32] = bits;
    meet(warp_.barrier);
    const uint64_t got = pick(buffer);
    T out;
    std::memcpy(&out, &got, sizeof(out));
    return out;
  }

  template <class Put>
  void collective(float (&sum)[4], int depth, Put put) const {
    Fragments& f = warp_.fragments;
    put(f);
    f.sums[thread_ % 32] = sum;
    const bool last = warp_.barrier.arrived == 31;
    if (last) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
          double total = f.sums[lane][i];
          for (int k = 0; k < depth; ++k) {
            total += static_cast<double>(f.a[row][k]) * static_cast<double>(f.b[column][k]);
          }
          f.sums[lane][i] = static_cast<float>(total);
        }
      }
    }
    meet(warp_.barrier);
  }
};

// --- a launch ------------------------------------------------------------------------------------

struct ClusterGroup : Group {
  using Group::Group;
  static constexpr bool kAreasEnd = true;
};

struct GridGroup : Group {
  using Group::Group;
  static constexpr bool kAreasEnd = false;
};

constexpr size_t kGuard = 4096;

void fill(std::vector<char>& memory, size_t bytes) { memory.assign(bytes + kGuard, '\xff'); }

void check_guard(const std::vector<char>& memory, const char* what) {
  if (std::any_of(memory.end() - kGuard, memory.end(), [](char c) { return c != '\xff'; })) {
    throw std::runtime_error(std::string("a write past the end of ") + what);
  }
}

// Blocks `first_block..` that are on the device at once: a grid, or one cluster.
void run_blocks(const SelectMergeParams& params, const LaunchPlan& plan, int first_block, int count,
                int64_t first_sample, std::vector<char>& workspace, int64_t order) {
  std::vector<BlockMemory> memory(static_cast<size_t>(count));
  for (BlockMemory& block : memory) fill(block.shared, static_cast<size_t>(plan.shared_bytes));
  Barrier meeting;
  meeting.members = count * cuda::kThreads;
  Scheduler fibers(count * cuda::kThreads);
  fibers.run(order, [&](int fiber) {
    const int at = fiber / cuda::kThreads, block = first_block + at;
    const auto run = [&]<class Blocks>(Blocks group) {
      cuda::select_merge_body(group, params, plan, first_sample);
    };
    BlockMemory* sample = memory.data() + at - block % plan.ranks;
    const int thread = fiber % cuda::kThreads, rank = block % plan.ranks;
    if (plan.path == Path::kCluster) {
      run(ClusterGroup(thread, rank, block / plan.ranks, sample, meeting, plan, workspace.data()));
    } else {
      run(GridGroup(thread, rank, block / plan.ranks, sample, meeting, plan, workspace.data()));
    }
  });
  for (const BlockMemory& block : memory) check_guard(block.shared, "shared memory");
}

// As launch_select_merge does: a cluster a sample, or a grid for each round of samples.
void launch(const SelectMergeParams& params, const LaunchPlan& plan, int64_t order) {
  std::vector<char> workspace;
  fill(workspace, static_cast<size_t>(plan.workspace_bytes));
  if (plan.path == Path::kCluster) {
    for (int i = 0; i < plan.groups; ++i) {
      run_blocks(params, plan, i * plan.ranks, plan.ranks, 0, workspace, order);
    }
  } else {
    for (int64_t first = 0; first < params.merge.batch; first += plan.groups) {
      run_blocks(params, plan, 0, plan.groups * plan.ranks, first, workspace, order);
    }
  }
  check_guard(workspace, "the workspace");
}

}  // namespace
}  // namespace cdrop::emulated

void cdrop_emulated_launch(const cdrop::SelectMergeParams& params,
                           const cdrop::cuda::LaunchPlan& plan, int64_t order) {
  cdrop::emulated::launch(params, plan, order);
}
