// SPDX-License-Identifier: Apache-2.0
// For C++ tests of the CUDA kernels. The same files run in two ways: emulated on the host, under AddressSanitizer and ThreadSanitizer, and
// on a GPU, under compute-sanitizer. What a test expects is computed in the test, the plain way.
//
//   TEST(sums_up) {
//     Buffer<float> x(random_floats(100, 1)), out(1);
//     expect_ok(glimpse_cuda_sum(&params, call()));
//     expect_equal(out.read(), {...}, "sum");
//   }
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "glimpse/cuda.h"

namespace glimpse::tests {

void* device_malloc(size_t bytes);  // of exactly this size, so that a sanitizer sees a step over its end; filled with 0xff bytes
void device_free(void* memory);
void to_device(void* to, const void* from, size_t bytes);
void to_host(void* to, const void* from, size_t bytes);  // waits for what was launched

// Device memory for the time of a test.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count), memory_(static_cast<T*>(device_malloc(count * sizeof(T)))) {}
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { write(values); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { device_free(memory_); }

  T* data() const { return memory_; }
  size_t size() const { return count_; }
  void write(const std::vector<T>& values) { to_device(memory_, values.data(), values.size() * sizeof(T)); }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    to_host(values.data(), memory_, count_ * sizeof(T));
    return values;
  }

 private:
  size_t count_;
  T* memory_;
};

// The stream of the tests; with `workspace`, memory of that many bytes which lasts until the end of the test.
const glimpse_cuda_call* call(size_t workspace = 0);

// The chip that launch code is told of; on a GPU without effect. Every test starts as capability 9.0 with 3 multiprocessors.
void set_chip(int capability, int multiprocessors);

// Captures `launches` into a graph; `replay` runs it on what memory holds by then. Inside, as on a GPU, no memory can be had, written or
// read: `call` goes before.
class Graph {
 public:
  template <class Launches>
  explicit Graph(Launches launches) {
    begin();
    launches();
    end();
  }
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void replay();

 private:
  void begin();
  void end();
  void* graph_ = nullptr;
};

// A test fails when one of these does, and goes on, so that it tells all.
void expect(bool condition, const char* format, ...) __attribute__((format(printf, 2, 3)));
void expect_ok(glimpse_status status);

inline double as_number(float x) { return x; }
inline double as_number(double x) { return x; }
template <class T>
double as_number(T x) {
  return static_cast<double>(x);
}

template <class T>
void expect_equal(const std::vector<T>& found, const std::vector<T>& wanted, const char* what) {
  expect(found.size() == wanted.size(), "%s: %zu values, expected %zu", what, found.size(), wanted.size());
  for (size_t i = 0; i < found.size() && i < wanted.size(); ++i) {
    if (std::memcmp(&found[i], &wanted[i], sizeof(T)) == 0) continue;
    expect(false, "%s[%zu]: expected %.9g, found %.9g", what, i, as_number(wanted[i]), as_number(found[i]));
    return;
  }
}

// Equal to within `relative` of the largest magnitude that was expected.
void expect_close(const std::vector<float>& found, const std::vector<float>& wanted, double relative, const char* what);

// The same numbers on every machine, about normal, or below `end`.
std::vector<float> random_floats(size_t count, uint64_t seed);
std::vector<int32_t> random_ints(size_t count, int32_t end, uint64_t seed);

// float and back, in 16 bits, rounded to the nearest, ties to even.
uint16_t to_bfloat16(float x);
float from_bfloat16(uint16_t x);

struct Registered {
  Registered(const char* name, void (*run)());
};

}  // namespace glimpse::tests

#define TEST(name)                                                   \
  static void test_##name();                                         \
  static const ::glimpse::tests::Registered registered_##name(#name, test_##name); \
  static void test_##name()
