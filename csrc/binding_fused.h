// What select_merge and its parts check and prepare, wherever they run: shared by the CPU's
// binding, the GPU's, and the emulation of the GPU's kernels that the tests build.
#pragma once

#include <tuple>

#include "binding.h"

namespace cdrop::binding {

// What the arguments of attention_saliency are called by the op that takes them.
struct SaliencyNames {
  const char *q = "q", *k = "k", *scale = "scale", *lse = "lse", *weight = "query_weight",
             *reduce = "reduce";
};

SaliencyParams check_saliency(const Tensor& q, const Tensor& k, std::optional<double> scale,
                              const MaybeTensor& lse, const MaybeTensor& key_valid,
                              const MaybeTensor& weight, int64_t prefix, bool causal,
                              const std::string& reduce, const SaliencyNames& say = {});

SelectParams check_selection(int64_t batch, int64_t tokens, const Tensor& main, const char* like,
                             int64_t keep, double alpha, const std::string& fusion,
                             const MaybeTensor& valid, const MaybeTensor& priority,
                             int64_t priority_keep);

void check_metric(const Tensor& x, const Tensor& metric);

void check_merge_options(int64_t contextual, double threshold, double blend);

// The sizes and options of a merge; pointers of its outputs are filled in by the caller.
MergeParams merge_params(const Tensor& x, int64_t keep, int64_t contextual, double threshold,
                         double blend, const MaybeTensor& valid);

void set_metric(MergeParams* p, const Tensor& metric);

struct MergeOutputs {
  Tensor tokens, assign, size;
};

MergeOutputs merge_outputs(const Tensor& x, MergeParams* p);

// A checked call of select_merge: parameters, what they point into, and the outputs.
struct FusedCall {
  SelectMergeParams params;
  Tensor x, metric;  // as the kernels read them
  MergeOutputs out;
  Tensor index;

  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const {
    return {out.tokens, index, out.assign, out.size};
  }
};

FusedCall prepare_select_merge(const Tensor& x, const Tensor& q_vis, const Tensor& k_vis,
                               const MaybeTensor& q_txt, const MaybeTensor& k_txt, int64_t keep,
                               int64_t contextual, double alpha, const std::string& fusion,
                               int64_t prefix, std::optional<double> scale_vis,
                               std::optional<double> scale_txt, const MaybeTensor& lse_vis,
                               const MaybeTensor& lse_txt, const MaybeTensor& txt_weight,
                               const std::string& txt_reduce, const MaybeTensor& metric,
                               const MaybeTensor& valid, const MaybeTensor& priority,
                               int64_t priority_keep, double threshold, double blend,
                               double diversity);

}  // namespace cdrop::binding
