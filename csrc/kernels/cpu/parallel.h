// Tasks of unequal size over the caller's thread pool.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace cdrop::cpu {

// Uninitialised memory for plain values, on a cache line's boundary.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Calls `body(task, scratch)` once for each task in [0, tasks): whoever is free takes the next,
// with `scratch_floats` floats of its own. Results must not depend on who ran what.
template <typename Body>
void for_each_task(const Threads& threads, int64_t tasks, int64_t scratch_floats,
                   const Body& body) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    const Buffer<float> scratch(scratch_floats);
    for (int64_t task = next++; task < tasks; task = next++) body(task, scratch.get());
  };
  const int64_t workers = threads.count < tasks ? threads.count : tasks;
  workers <= 1 ? work(0, 1) : threads.run(workers, work);
}

}  // namespace cdrop::cpu
