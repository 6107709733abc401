// similarity_saliency as attention: one head, the text rows as queries and the visual tokens as
// keys, with the lengths divided out of the products.
#include "measure.h"
#include "parallel.h"
#include "saliency.h"

namespace cdrop::cpu {
namespace {

class Similarity {
 public:
  Similarity(const SimilarityParams& params, const Threads& threads)
      : p_(params),
        element_(params.text.dtype == DType::kFloat32 ? 4 : 2),
        visual_(params.batch * params.tokens),
        text_(params.batch * params.rows * params.width * element_),
        weight_(params.batch * params.rows),
        key_factor_(params.batch * params.tokens),
        row_factor_(params.batch * params.rows) {
    const int64_t blocks = (p_.tokens + kBlock - 1) / kBlock, room = padded(p_.width, kScratchPad);
    for_each_task(threads, p_.batch * blocks, room, [&](int64_t task, float* scratch) {
      measure_block(task / blocks, task % blocks * kBlock, scratch);
    });
    for_each_task(threads, p_.batch, room,
                  [&](int64_t b, float* scratch) { prepare_sample(b, scratch); });
  }

  SaliencyParams attention() const {
    SaliencyParams s;
    s.q = {text_.get(), p_.text.dtype, {p_.rows * p_.width, 0, p_.width}};
    s.k = {p_.visual.data, p_.visual.dtype, {p_.visual.stride[0], 0, p_.visual.stride[1]}};
    s.batch = p_.batch;
    s.query_heads = s.key_heads = 1;
    s.rows = p_.rows;
    s.keys = p_.tokens;
    s.width = p_.width;
    s.reduce = p_.reduce;
    s.key_valid = p_.visual_valid;
    s.query_weight = {weight_.get(), {p_.rows, 1}};
    s.key_factor = key_factor_.get();
    s.row_factor = row_factor_.get();
    return s;
  }

 private:
  static constexpr int64_t kBlock = 64;

  bool valid(int64_t b, int64_t token) const {
    return !p_.visual_valid || p_.visual_valid.at(b, token) != 0;
  }

  void measure_block(int64_t b, int64_t first, float* scratch) {
    for (int64_t i = first; i < std::min(first + kBlock, p_.tokens); ++i) {
      visual_[b * p_.tokens + i] =
          valid(b, i) ? measure(p_.visual, b, i, p_.width, scratch) : Measure{};
    }
  }

  // The exponent of the longest valid token that is finite.
  int longest(int64_t b) const {
    double most = 0.0;
    for (int64_t i = 0; i < p_.tokens; ++i) {
      const double length = visual_[b * p_.tokens + i].length();
      if (length > most) most = length;
    }
    return most > 0.0 ? std::ilogb(most) : 0;
  }

  // Rows are rescaled against the tokens, which stay where they are, so that no product overflows.
  void prepare_sample(int64_t b, float* scratch) {
    const int exponent = longest(b);
    const double unit = std::ldexp(1.0, exponent);
    for (int64_t i = 0; i < p_.tokens; ++i) {
      const double length = visual_[b * p_.tokens + i].length();
      const double factor = length == 0.0 ? 0.0 : unit / length;
      key_factor_[b * p_.tokens + i] = static_cast<float>(factor > 0x1p126 ? 0x1p126 : factor);
    }
    for (int64_t t = 0; t < p_.rows; ++t) {
      const Measure m = measure(p_.text, b, t, p_.width, scratch);
      // Half precision has no room for it, and no need.
      const bool half = p_.text.dtype == DType::kFloat16;
      const float power =
          half ? 1.0f : power_of_two(std::ilogb(m.power) - std::clamp(exponent, -120, 100));
      const double length = m.length() * power * unit;
      const int64_t at = b * p_.rows + t;
      row_factor_[at] = static_cast<float>(length == 0.0 ? 0.0 : 1.0 / (length * p_.temperature));
      weight_[at] = !p_.text_valid || p_.text_valid.at(b, t) != 0 ? 1.0f : 0.0f;
      simd().rescale(token_row(p_.text, b, t), p_.text.dtype, p_.width, power,
                     text_.get() + at * p_.width * element_);
    }
  }

  const SimilarityParams& p_;
  int64_t element_;
  Buffer<Measure> visual_;    // [B, N]
  Buffer<char> text_;         // [B, T, D]: the text rows, rescaled
  Buffer<float> weight_;      // [B, T]: 1 for valid rows
  Buffer<float> key_factor_;  // [B, N]: 1 / length, in units of the longest
  Buffer<float> row_factor_;  // [B, T]: 1 / (length * temperature), for the rescaled row
};

}  // namespace

void similarity_saliency(const SimilarityParams& params, float* out, const Threads& threads) {
  const Similarity similarity(params, threads);
  attention_saliency(similarity.attention(), out, threads);
}

}  // namespace cdrop::cpu
