// What the ops demand of tensors, with the sentences of consensusdrop_kernels/_checks.py: a test
// holds the two to the same words. std::runtime_error becomes Python's RuntimeError as it is, while
// STD_TORCH_CHECK would put a function and a file's path in front of the sentence.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace cdrop::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

inline std::string number(double value) {
  if (std::isnan(value)) return "nan";
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%g", value);
  return buffer;
}

[[noreturn]] inline void refuse(const std::string& argument, const std::string& must,
                                const std::string& got) {
  throw std::runtime_error(argument + " must " + must + ", got " + got);
}

// The texts are made only when they are needed.
#define CDROP_CHECK(ok, argument, must, got) \
  do {                                       \
    if (!(ok)) refuse(argument, must, got);  \
  } while (false)

inline std::string shape(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return text("dtype number ", static_cast<int>(type));
  }
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_float(const Tensor& t, const char* name, int64_t rank,
                        const std::string& layout) {
  CDROP_CHECK(is_float(t.scalar_type()), name, "be float32, float16 or bfloat16",
              dtype_name(t.scalar_type()));
  CDROP_CHECK(t.dim() == rank, name, "be " + layout, shape(t));
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? text("cuda:", t.get_device_index()) : "another device";
}

inline void check_device(const Tensor& t, const char* name, const char* like, const Tensor& main) {
  const bool same =
      t.is_cpu() ? main.is_cpu()
                 : t.is_cuda() && main.is_cuda() && t.get_device_index() == main.get_device_index();
  CDROP_CHECK(same, name, text("be on the device of ", like, " (", device_name(main), ")"),
              device_name(t));
}

inline void check_like(const Tensor& t, const char* name, ScalarType dtype,
                       std::initializer_list<int64_t> want, const std::string& layout) {
  CDROP_CHECK(t.scalar_type() == dtype, name, "be " + dtype_name(dtype),
              dtype_name(t.scalar_type()));
  bool ok = t.dim() == static_cast<int64_t>(want.size());
  int64_t i = 0;
  for (const int64_t n : want) ok = ok && t.size(i++) == n;
  CDROP_CHECK(ok, name, "be " + layout, shape(t));
}

inline void check_unit_stride(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) <= 1 || t.numel() == 0) return;
  CDROP_CHECK(t.stride(last) == 1, name, "have a last stride of 1", std::to_string(t.stride(last)));
}

inline void check_number(double value, const char* name) {
  CDROP_CHECK(std::isfinite(value), name, "be finite", number(value));
}

inline void check_unit(double value, const char* name) {
  CDROP_CHECK(value >= 0.0 && value <= 1.0, name, "be in 0..1", number(value));
}

// Position of `value` in `choices`.
inline int check_choice(const std::string& value, const char* name,
                        std::initializer_list<const char*> choices) {
  std::string all;
  int at = 0;
  for (const char* choice : choices) {
    if (value == choice) return at;
    all += (at++ ? ", " : "") + std::string(choice);
  }
  refuse(name, "be one of " + all, "\"" + value + "\"");
}

// Of a tensor on the CPU: elsewhere a look at the values would wait for the device.
inline void check_weight_values(const MaybeTensor& w, const char* name) {
  if (!w || !w->is_cpu()) return;
  const float* data = static_cast<const float*>(w->const_data_ptr());
  const int64_t rows = w->dim() == 2 ? w->size(0) : 1, last = w->dim() - 1;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < w->size(last); ++j) {
      const float value = data[i * w->stride(0) + j * w->stride(last)];
      CDROP_CHECK(value >= 0.0f && !std::isinf(value), name, "be finite and >= 0", number(value));
    }
  }
}

}  // namespace cdrop::binding
