// Small kernels by name, with bytes in and bytes out: run by the shim's driver on the CPU, and by
// the conformance program on a GPU.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace programs {

struct Buffers {
  const void* in;
  void* out;
  int64_t in_bytes, out_bytes;
  int32_t variant;
  void* stream;
};

using Program = void (*)(const Buffers&);

inline std::map<std::string, Program>& all() {
  static std::map<std::string, Program> programs;
  return programs;
}

struct Register {
  Register(const char* name, Program program) { all()[name] = program; }
};

}  // namespace programs

using programs::Buffers;

#define KN_PROGRAM(name, ...) const programs::Register name##_program(#name, __VA_ARGS__)
