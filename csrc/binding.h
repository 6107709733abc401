// Between tensors and what the kernels take: pointers, strides, threads. Shared by the binding's
// files (torch_binding.cpp and binding_*.cpp), which with checks.h are all that knows torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"
#include "kernels/cpu/kernels.h"

namespace cdrop::binding {

inline cpu::Threads threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            torch::stable::parallel_for(0, n, 1, body);
          }};
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

inline Rows rows_of(const Tensor& t) {
  Rows rows;
  rows.data = t.const_data_ptr();
  rows.dtype = dtype_of(t);
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows.stride[i] = t.stride(i);
  return rows;
}

template <typename T>
Matrix<T> matrix_of(const MaybeTensor& t) {
  Matrix<T> m;
  if (!t) return m;
  m.data = static_cast<const T*>(t->const_data_ptr());
  // A matrix without elements is still there.
  static const T kNothing{};
  if (m.data == nullptr) m.data = &kNothing;
  m.stride[0] = t->dim() == 2 ? t->stride(0) : 0;
  m.stride[1] = t->stride(t->dim() - 1);
  return m;
}

// Tokens and metrics may have any strides; only a last one other than 1 costs a copy.
inline Tensor with_unit_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor output(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}

inline std::string batch_by(int64_t batch, const char* name, int64_t count) {
  return text("[B=", batch, ", ", name, "=", count, "]");
}

// An optional mask or score of the tokens, `[B, N]` like the main input.
template <typename T>
Matrix<T> token_matrix(const MaybeTensor& t, const char* name, ScalarType dtype, int64_t batch,
                       int64_t tokens, const char* like, const Tensor& main,
                       const char* count_name = "N") {
  if (!t) return {};
  check_like(*t, name, dtype, {batch, tokens}, batch_by(batch, count_name, tokens));
  check_device(*t, name, like, main);
  return matrix_of<T>(t);
}

}  // namespace cdrop::binding
