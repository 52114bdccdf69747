// Global memory for tests: buffers that begin or end at an inaccessible page, so that an access
// outside of one is a report and not a wrong number somewhere else.
#pragma once
#include <cstddef>
#include <string>

namespace kn::simt {

// Which side touches the inaccessible page; the other one is checked when the buffer is freed.
enum class Flush { kFront, kEnd };

// 16-byte aligned (front: page-aligned). `name` appears in reports.
void* allocate_guarded(size_t bytes, Flush flush, const char* name);

// Throws Fault if bytes beside the buffer were written.
void free_guarded(void* p);

// "4 bytes behind the end of NAME (100 bytes)", or "" if the address is near no buffer.
std::string describe_near_buffer(const void* address);

}  // namespace kn::simt
