// Errors at an op's door: "op: what must hold (got ...)".
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace kn {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}

// Throws std::invalid_argument with the concatenated parts unless the condition holds.
#define KN_REQUIRE(condition, ...)                                          \
  do {                                                                      \
    if (!(condition)) throw std::invalid_argument(kn::concat(__VA_ARGS__)); \
  } while (0)

// a * b in 64 bits, refused when it overflows or a factor is negative: sizes come from files.
inline int64_t checked_mul(const char* op, int64_t a, int64_t b) {
  int64_t r = 0;
  KN_REQUIRE(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &r), op,
             ": sizes must be non-negative and fit in 64 bits (got ", a, " * ", b, ")");
  return r;
}

}  // namespace kn
