// A pointer into shared memory that behaves like T* and is watched: bounds, alignment, races, bank
// conflicts. On a GPU the same code has a T* (cuda/device.cuh).
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "simt/thread.h"

namespace kn::simt {

// The running thread's access to n bytes at p; the return address tells accesses apart.
void touch_read(const void* p, size_t bytes, size_t alignment);
void touch_write(void* p, size_t bytes, size_t alignment);

// The start of a block's shared memory.
struct SharedBytes {
  char* data;
};

template <typename T>
class SharedPtr {
  static_assert(sizeof(T) % 2 == 0 || sizeof(T) == 1);
  using Value = std::remove_const_t<T>;

 public:
  class Ref {
   public:
    explicit Ref(T* p) : p_(p) {}
    Ref(const Ref&) = default;
    operator Value() const {
      check<Value>();
      touch_read(p_, sizeof(T), alignof(T));
      return *p_;
    }
    const Ref& operator=(const Value& v) const {
      check<Value>();
      touch_write(p_, sizeof(T), alignof(T));
      *p_ = v;
      return *this;
    }
    const Ref& operator=(const Ref& other) const { return *this = Value(other); }
    const Ref& operator+=(const Value& v) const { return *this = Value(*this) + v; }
    const Ref& operator*=(const Value& v) const { return *this = Value(*this) * v; }

   private:
    // Races are seen at a granularity of two bytes.
    template <typename U>
    static void check() {
      static_assert(sizeof(U) >= 2, "access shared memory by at least two bytes");
    }
    T* p_;
  };

  SharedPtr() = default;
  explicit SharedPtr(T* p) : p_(p) {}
  Ref operator[](int64_t i) const { return Ref(p_ + i); }
  Ref operator*() const { return Ref(p_); }
  SharedPtr operator+(int64_t n) const { return SharedPtr(p_ + n); }
  SharedPtr operator-(int64_t n) const { return SharedPtr(p_ - n); }
  SharedPtr& operator+=(int64_t n) { return *this = *this + n; }
  T* raw() const { return p_; }  // unwatched
  operator SharedPtr<const T>() const { return SharedPtr<const T>(p_); }

  // For the wrappers of ptx.cuh, which check what they access themselves.
  operator const void*() const { return p_; }
  template <typename U = T, typename = std::enable_if_t<!std::is_const_v<U>>>
  operator void*() const {
    return p_;
  }

 private:
  T* p_ = nullptr;
};

}  // namespace kn::simt
