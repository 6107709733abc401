// Numbers in integers of the same order, so that ties are decided and orders never depend on
// timing. For the host and the device.
#pragma once

#include <cstdint>

#include "../params.h"

namespace cdrop::cuda {

template <typename To, typename From>
CDROP_BOTH inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Larger for larger numbers; both zeros are one, NaN is `nan` (0x007fffff is the key of -infinity).
CDROP_BOTH inline uint32_t order_key(float value, uint32_t nan) {
  if (value != value) return nan;
  const uint32_t bits = bit_cast<uint32_t>(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The number of a key; undefined for that of NaN.
CDROP_BOTH inline float key_value(uint32_t key) {
  return bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Score keys: 0 for a token that may not be chosen, 1 for NaN, then the numbers.
constexpr uint32_t kInvalidKey = 0, kNanKey = 1;
// In maxima of logits NaN is above all.
constexpr uint32_t kNanOnTop = 0xffffffffu;

// A score key over a tie-breaker of which the smaller wins. Distinct if the tie-breakers are.
CDROP_BOTH inline uint64_t ranked_key(uint32_t key, uint32_t tie) {
  return key == kInvalidKey ? 0 : static_cast<uint64_t>(key) << 32 | (0xffffffffu - tie);
}

// Sums of numbers in 0..1 as integers, whose order of addition does not matter.
constexpr double kFixedPoint = 1099511627776.0;  // 2^40

CDROP_BOTH inline uint64_t to_fixed(float sum) {
  return static_cast<uint64_t>(static_cast<double>(sum) * kFixedPoint + 0.5);
}

CDROP_BOTH inline float from_fixed(uint64_t sum) {
  return static_cast<float>(static_cast<double>(sum) / kFixedPoint);
}

// --- selection by radix --------------------------------------------------------------------------

constexpr int kRadixBits = 8, kRadixBins = 1 << kRadixBits;

// Where the search for the `left`-th largest key stands: keys that agree with `prefix` above
// `shift` are still in question, of which `left` are wanted.
struct RadixSearch {
  uint64_t prefix = 0;  // of the keys in question, their bits above `shift`
  int shift = 64;
  uint32_t left = 0;

  // Whether a key is still in question, and the digit that the next pass counts.
  CDROP_BOTH bool open(uint64_t key) const { return shift >= 64 || key >> shift == prefix; }
  CDROP_BOTH int next_shift() const { return shift > kRadixBits ? shift - kRadixBits : 0; }
  CDROP_BOTH uint32_t digit(uint64_t key) const {
    const int low = next_shift();
    return static_cast<uint32_t>(key >> low) & ((1u << (shift - low)) - 1);
  }
  // Narrows to one digit, of which `above` keys have larger ones; true if all keys of it are
  // wanted.
  CDROP_BOTH bool narrow(uint32_t digit, uint32_t above, uint32_t count) {
    const int low = next_shift();
    prefix = (shift >= 64 ? 0 : prefix << (shift - low)) | digit;
    shift = low;
    left -= above;
    return left == count;
  }
  // The smallest key wanted, once `narrow` has said true.
  CDROP_BOTH uint64_t threshold() const { return prefix << shift; }
};

// The search over distinct keys that all lie in low..high, `low < high`: it starts at the first bit
// in which they differ.
CDROP_BOTH inline RadixSearch start_search(uint64_t low, uint64_t high, uint32_t wanted) {
  RadixSearch search;
  int bits = 64;
  while (bits > 1 && (low ^ high) >> (bits - 1) == 0) --bits;
  search.shift = bits;
  search.prefix = bits >= 64 ? 0 : high >> bits;
  search.left = wanted;
  return search;
}

// --- contextual slots ----------------------------------------------------------------------------

// The contextual slot whose reference is the dropped token of this number, -1 if it is none's:
// number `floor(c R / C)` of `dropped = R` is that of slot c, each its own where `R < C`.
CDROP_BOTH inline int contextual_slot(int64_t number, int64_t dropped, int64_t contextual) {
  if (dropped <= contextual) return static_cast<int>(number);
  const int64_t c = (number * contextual + dropped - 1) / dropped;
  return c < contextual && c * dropped / contextual == number ? static_cast<int>(c) : -1;
}

}  // namespace cdrop::cuda
