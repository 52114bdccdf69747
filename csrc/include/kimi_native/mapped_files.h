// Files mapped read-only: bringing their pages in, and surviving pages that cannot be read.
//
// A file that is truncated while it is mapped, or a disk that fails, is reported by the processor
// to whoever touches the page: as SIGBUS, which ends the process. A watched mapping is different:
// from the page that failed to its end it becomes zeros, the access goes on, and lost_from tells
// what happened. The caller must ask before it uses what was computed.
#pragma once
#include <cstdint>

namespace kn {

// Brings the pages of a mapping in and enters them in the page table, then touches each. Returns 0,
// or without having touched any an errno: EFAULT or EIO if a page cannot be read, ENOMEM if some of
// the range is not mapped, EINVAL if the system cannot do it (Linux before 5.14).
int populate_pages(const void* address, int64_t bytes);

// Watches a mapping until unwatch_mapping(number). Thread-safe.
// Throws std::invalid_argument unless address is that of a page and bytes is positive.
int64_t watch_mapping(const void* address, int64_t bytes);

// Must be called before the mapping is removed.
void unwatch_mapping(int64_t number);

// The first byte of a watched mapping from which on it was replaced by zeros, -1 if it is whole.
int64_t lost_from(int64_t number);

}  // namespace kn
