#include <cooperative_groups.h>

#include <mutex>

#include "nvtx.h"
#include "select_merge.h"
#include "select_merge_body.h"

namespace cg = cooperative_groups;

namespace cdrop::cuda {
namespace {

// What a block knows of itself, and the instructions that the body is written in.
class Block {
 public:
  __device__ explicit Block(char* shared) : shared_(shared) {}
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ char* shared() const { return shared_; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }

  template <typename T>
  __device__ T shfl(T value, int lane) const {
    return __shfl_sync(0xffffffffu, value, lane);
  }
  template <typename T>
  __device__ T shfl_xor(T value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
  // unsigned long long: what the intrinsics know 64 bits by.
  __device__ uint64_t shfl_xor(uint64_t value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(value), mask);
  }
  template <typename T>
  __device__ T shfl_up(T value, int by) const {
    return __shfl_up_sync(0xffffffffu, value, by);
  }
  __device__ uint64_t shfl_up(uint64_t value, int by) const {
    return __shfl_up_sync(0xffffffffu, static_cast<unsigned long long>(value), by);
  }
  __device__ uint32_t match_any(uint32_t value) const {
    return __match_any_sync(0xffffffffu, value);
  }
  __device__ uint32_t popcount(uint32_t value) const {
    return static_cast<uint32_t>(__popc(value));
  }

  // Also on the shared memory of other blocks of the cluster.
  __device__ void atomic_max(uint32_t* at, uint32_t value) const { atomicMax(at, value); }
  __device__ void atomic_add(uint32_t* at, uint32_t value) const { atomicAdd(at, value); }
  __device__ void atomic_max(uint64_t* at, uint64_t value) const {
    atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
  }
  __device__ void atomic_min(uint64_t* at, uint64_t value) const {
    atomicMin(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
  }
  __device__ void atomic_add(uint64_t* at, uint64_t value) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
  }

  __device__ float exp2(float v) const { return exp2f(v); }
  __device__ float log(float v) const { return logf(v); }
  __device__ float div_rn(float a, float b) const { return __fdiv_rn(a, b); }
  __device__ float mul_rn(float a, float b) const { return __fmul_rn(a, b); }
  __device__ float add_rn(float a, float b) const { return __fadd_rn(a, b); }
  __device__ float sqrt_rn(float v) const { return __fsqrt_rn(v); }
  __device__ double sqrt(double v) const { return __dsqrt_rn(v); }
  __device__ bool is_finite(float v) const { return isfinite(v); }
  __device__ float infinity() const { return __int_as_float(0x7f800000); }
  __device__ float nan() const { return __int_as_float(0x7fc00000); }
  __device__ void prefetch(const void* at) const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
  }

  // sum[16 rows, 8 keys] += rows x keys over 32 elements, of which lane `4 g + t` brings elements
  // `8 t .. 8 t + 7` of rows g and g + 8 and of key g, as they lie in memory. A product does not
  // care for the order of its terms, so each two pairs of them are fed as the instruction wants.
  __device__ void multiply(float (&sum)[4], const Eight<BFloat16>& up, const Eight<BFloat16>& low,
                           const Eight<BFloat16>& key) const {
    for (int step = 0; step < 2; ++step) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(pair(up, 2 * step)), "r"(pair(low, 2 * step)), "r"(pair(up, 2 * step + 1)),
            "r"(pair(low, 2 * step + 1)), "r"(pair(key, 2 * step)), "r"(pair(key, 2 * step + 1)));
    }
  }
  __device__ void multiply(float (&sum)[4], const Eight<Half>& up, const Eight<Half>& low,
                           const Eight<Half>& key) const {
    for (int step = 0; step < 2; ++step) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(pair(up, 2 * step)), "r"(pair(low, 2 * step)), "r"(pair(up, 2 * step + 1)),
            "r"(pair(low, 2 * step + 1)), "r"(pair(key, 2 * step)), "r"(pair(key, 2 * step + 1)));
    }
  }
  __device__ void multiply(float (&sum)[4], const Eight<float>& up, const Eight<float>& low,
                           const Eight<float>& key) const {
    for (int step = 0; step < 4; ++step) {
      const float a[4] = {up.at[2 * step], low.at[2 * step], up.at[2 * step + 1],
                          low.at[2 * step + 1]};
      const float b[2] = {key.at[2 * step], key.at[2 * step + 1]};
      multiply_exactly(sum, a, b);
    }
  }

  // sum[16 rows, 8 columns] += a x b over 8 elements in float32: each factor is a TF32 number and
  // the rest of it, and of the four products only that of the two rests is left out.
  __device__ void multiply_exactly(float (&sum)[4], const float (&a)[4],
                                   const float (&b)[2]) const {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    for (int i = 0; i < 4; ++i) split(a[i], &a_high[i], &a_low[i]);
    for (int i = 0; i < 2; ++i) split(b[i], &b_high[i], &b_low[i]);
    multiply_tf32(sum, a_low, b_high);
    multiply_tf32(sum, a_high, b_low);
    multiply_tf32(sum, a_high, b_high);
  }

 private:
  char* shared_;

  template <typename T>
  __device__ static uint32_t pair(const Eight<T>& from, int i) {
    return static_cast<uint32_t>(from.at[2 * i].bits) |
           static_cast<uint32_t>(from.at[2 * i + 1].bits) << 16;
  }
  __device__ static void split(float v, uint32_t* high, uint32_t* low) {
    *high = __float_as_uint(v) & 0xffffe000u;
    *low = isfinite(v) ? __float_as_uint(v - __uint_as_float(*high)) & 0xffffe000u : 0;
  }
  __device__ static void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

#if __CUDA_ARCH__ >= 900  // older devices have no clusters
// The blocks of a cluster share a sample; what they tell each other stays in shared memory.
class ClusterGroup : public Block {
 public:
  static constexpr bool kAreasEnd = true;  // with the block whose shared memory they are in
  __device__ ClusterGroup(char* shared, const LaunchPlan& plan)
      : Block(shared), area_(shared + plan.at.peers), ranks_(plan.ranks) {}
  __device__ int rank() const { return static_cast<int>(blockIdx.x) % ranks_; }
  __device__ int group() const { return static_cast<int>(blockIdx.x) / ranks_; }
  __device__ char* peer(int rank) const {
    return cg::this_cluster().map_shared_rank(area_, static_cast<unsigned>(rank));
  }
  // The device adds 32 bits anywhere in a cluster by itself. For 64 there is a loop of
  // compare-and-swap, on a block's own shared memory alone: so the lower half tells its carry.
  using Block::atomic_add;
  __device__ void atomic_add(uint64_t* at, uint64_t value) const {
    uint32_t* halves = reinterpret_cast<uint32_t*>(at);
    const uint32_t low = static_cast<uint32_t>(value);
    const uint32_t carry = atomicAdd(halves, low) + low < low ? 1 : 0;
    atomicAdd(halves + 1, static_cast<uint32_t>(value >> 32) + carry);
  }
  __device__ void sync_group() const { cg::this_cluster().sync(); }
  __device__ void arrive() const { cg::this_cluster().barrier_arrive(); }
  __device__ void wait() const { cg::this_cluster().barrier_wait(); }

 private:
  char* area_;
  int ranks_;
};
#endif

// All blocks of the grid are on the device at once and meet through memory.
class GridGroup : public Block {
 public:
  static constexpr bool kAreasEnd = false;
  __device__ GridGroup(char* shared, char* workspace, const LaunchPlan& plan)
      : Block(shared), workspace_(workspace), peer_bytes_(plan.at.peer_bytes), ranks_(plan.ranks) {}
  __device__ int rank() const { return static_cast<int>(blockIdx.x) % ranks_; }
  __device__ int group() const { return static_cast<int>(blockIdx.x) / ranks_; }
  __device__ char* peer(int rank) const {
    return workspace_ + (int64_t{group()} * ranks_ + rank) * peer_bytes_;
  }
  __device__ void sync_group() const { cg::this_grid().sync(); }
  __device__ void arrive() { token_ = cg::this_grid().barrier_arrive(); }
  __device__ void wait() { cg::this_grid().barrier_wait(std::move(token_)); }

 private:
  char* workspace_;
  int64_t peer_bytes_;
  int ranks_;
  cg::grid_group::arrival_token token_{};
};

extern __shared__ __align__(128) char dynamic_shared[];

__global__ void __launch_bounds__(kThreads, 1)
    select_merge_cluster(const __grid_constant__ SelectMergeParams params,
                         const __grid_constant__ LaunchPlan plan, int64_t first_sample) {
#if __CUDA_ARCH__ >= 900
  ClusterGroup group(dynamic_shared, plan);
  select_merge_body(group, params, plan, first_sample);
#endif
}

__global__ void __launch_bounds__(kThreads, 1)
    select_merge_grid(const __grid_constant__ SelectMergeParams params,
                      const __grid_constant__ LaunchPlan plan, int64_t first_sample,
                      char* workspace) {
  GridGroup group(dynamic_shared, workspace, plan);
  select_merge_body(group, params, plan, first_sample);
}

Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // told here; later calls must not find it
  return {cudaGetErrorString(error)};
}

const void* kernel_of(Path path) {
  return path == Path::kCluster ? reinterpret_cast<const void*>(select_merge_cluster)
                                : reinterpret_cast<const void*>(select_merge_grid);
}

cudaError_t read_limits(int device, DeviceLimits* out) {
  int major = 0, minor = 0, shared = 0;
  const auto get = [device](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  cudaError_t error = get(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = get(&minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = get(&out->processors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = get(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  out->capability = 10 * major + minor;
  out->shared_bytes = shared;
  for (const Path path : {Path::kCluster, Path::kGrid}) {
    if (error != cudaSuccess) return error;
    error =
        cudaFuncSetAttribute(kernel_of(path), cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
  if (error != cudaSuccess || out->capability < 90) return error;
  error = cudaFuncSetAttribute(kernel_of(Path::kCluster),
                               cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = 16;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  int most = 1;
  error = cudaOccupancyMaxPotentialClusterSize(&most, kernel_of(Path::kCluster), &config);
  out->max_cluster = most < 16 ? most : 16;
  return error;
}

}  // namespace

Status device_limits(DeviceLimits* out) {
  constexpr int kDevices = 64;
  static DeviceLimits known[kDevices];
  static std::mutex mutex;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return status_of(error);
  }
  if (device >= kDevices) return {"there are more than 64 devices"};
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[device].capability == 0) {
    DeviceLimits found;
    if (const cudaError_t error = read_limits(device, &found); error != cudaSuccess) {
      return status_of(error);
    }
    known[device] = found;
  }
  *out = known[device];
  return {};
}

Status launch_select_merge(const SelectMergeParams& params, const LaunchPlan& plan, void* workspace,
                           cudaStream_t stream) {
  const nvtx::Range range("select_merge");
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(plan.groups) * static_cast<unsigned>(plan.ranks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (plan.path == Path::kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(plan.ranks), 1, 1};
    return status_of(cudaLaunchKernelEx(&config, select_merge_cluster, params, plan, int64_t{0}));
  }
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  for (int64_t first = 0; first < params.merge.batch; first += plan.groups) {
    const cudaError_t error = cudaLaunchKernelEx(&config, select_merge_grid, params, plan, first,
                                                 static_cast<char*>(workspace));
    if (error != cudaSuccess) return status_of(error);
  }
  return {};
}

}  // namespace cdrop::cuda
