// SPDX-License-Identifier: Apache-2.0
// glimpse_cuda_tests [part of a name ...]: runs the tests whose names hold one of these, all without. Prints a line for each, and last
// `N passed, M failed`.
#include "cuda/tests/harness.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <random>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "glimpse/cuda_emulated.h"
#endif

namespace glimpse::tests {
namespace {

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int failures = 0;
bool capturing = false;
std::vector<std::unique_ptr<Buffer<unsigned char>>> workspaces;
std::vector<std::unique_ptr<glimpse_cuda_call>> calls;

#ifdef __CUDACC__
cudaStream_t stream() {
  static cudaStream_t made = nullptr;
  if (made == nullptr) cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
  return made;
}
void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}
#endif

}  // namespace

// A GPU refuses this and gives the capture up; so does the emulation, where it would do no harm.
static void not_in_a_capture(const char* what) {
  if (!capturing) return;
  std::printf("%s inside of a capture\n", what);
  std::exit(2);
}

#ifdef __CUDACC__
void* device_malloc(size_t bytes) {
  not_in_a_capture("memory is allocated");
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes > 0 ? bytes : 1));
  must(cudaMemsetAsync(memory, 0xff, bytes, stream()));
  return memory;
}
void device_free(void* memory) {
  must(cudaStreamSynchronize(stream()));
  must(cudaFree(memory));
}
void to_device(void* to, const void* from, size_t bytes) {
  not_in_a_capture("memory is written");
  must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream()));
  must(cudaStreamSynchronize(stream()));
}
void to_host(void* to, const void* from, size_t bytes) {
  not_in_a_capture("memory is read");
  must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream()));
  must(cudaStreamSynchronize(stream()));
}
void set_chip(int, int) {}
void Graph::begin() {
  must(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeGlobal));
  capturing = true;
}
void Graph::end() {
  capturing = false;
  cudaGraph_t captured = nullptr;
  cudaGraphExec_t made = nullptr;
  must(cudaStreamEndCapture(stream(), &captured));
  must(cudaGraphInstantiate(&made, captured, 0));
  must(cudaGraphDestroy(captured));
  graph_ = made;
}
void Graph::replay() { must(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_), stream())); }
Graph::~Graph() {
  must(cudaStreamSynchronize(stream()));
  must(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_)));
}
#else
void* device_malloc(size_t bytes) {
  not_in_a_capture("memory is allocated");
  // As aligned as cudaMalloc's memory, and no byte longer.
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  return memory;
}
void device_free(void* memory) { std::free(memory); }
void to_device(void* to, const void* from, size_t bytes) {
  not_in_a_capture("memory is written");
  if (bytes > 0) std::memcpy(to, from, bytes);
}
void to_host(void* to, const void* from, size_t bytes) {
  not_in_a_capture("memory is read");
  if (bytes > 0) std::memcpy(to, from, bytes);
}
void set_chip(int capability, int multiprocessors) { glimpse_emulated_set_chip(capability, multiprocessors); }
void Graph::begin() {
  glimpse_emulated_capture_begin();
  capturing = true;
}
void Graph::end() {
  capturing = false;
  graph_ = glimpse_emulated_capture_end();
}
void Graph::replay() { expect_ok(glimpse_emulated_replay(graph_)); }
Graph::~Graph() { glimpse_emulated_free(graph_); }
#endif

const glimpse_cuda_call* call(size_t workspace) {
  workspaces.push_back(std::make_unique<Buffer<unsigned char>>(workspace));
  void* on = nullptr;
#ifdef __CUDACC__
  on = stream();
#endif
  calls.push_back(std::make_unique<glimpse_cuda_call>(glimpse_cuda_call{on, workspaces.back()->data(), workspace}));
  return calls.back().get();
}

void expect(bool condition, const char* format, ...) {
  if (condition) return;
  ++failures;
  va_list arguments;
  va_start(arguments, format);
  std::printf("  ");
  std::vprintf(format, arguments);
  std::printf("\n");
  va_end(arguments);
}

void expect_ok(glimpse_status status) {
  expect(status == GLIMPSE_OK, "status %d: %s", static_cast<int>(status), glimpse_last_error());
}

void expect_close(const std::vector<float>& found, const std::vector<float>& wanted, double relative, const char* what) {
  expect(found.size() == wanted.size(), "%s: %zu values, expected %zu", what, found.size(), wanted.size());
  double most = 0;
  for (const float x : wanted) most = std::isfinite(x) ? std::max(most, std::fabs(static_cast<double>(x))) : most;
  for (size_t i = 0; i < found.size() && i < wanted.size(); ++i) {
    if (std::isnan(found[i]) && std::isnan(wanted[i])) continue;
    if (std::fabs(static_cast<double>(found[i]) - wanted[i]) <= relative * most) continue;
    expect(false, "%s[%zu]: expected %.9g, found %.9g", what, i, as_number(wanted[i]), as_number(found[i]));
    return;
  }
}

std::vector<float> random_floats(size_t count, uint64_t seed) {
  std::mt19937_64 bits(seed);
  std::vector<float> found(count);
  for (float& x : found) {  // the sum of twelve uniform numbers, less its mean
    x = -6;
    for (int i = 0; i < 12; ++i) x += static_cast<float>(bits() >> 40) * 0x1p-24f;
  }
  return found;
}

std::vector<int32_t> random_ints(size_t count, int32_t end, uint64_t seed) {
  std::mt19937_64 bits(seed);
  std::vector<int32_t> found(count);
  for (int32_t& x : found) x = static_cast<int32_t>((bits() >> 33) % static_cast<uint64_t>(end));
  return found;
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

Registered::Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }

static int run(int count, char** parts) {
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    bool wanted = count == 0;
    for (int i = 0; i < count; ++i) wanted = wanted || std::strstr(test.name, parts[i]) != nullptr;
    if (!wanted) continue;
    failures = 0;
    set_chip(90, 3);
    test.run();
    workspaces.clear();
    calls.clear();
    ++(failures == 0 ? passed : failed);
    std::printf("%s %s\n", failures == 0 ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace glimpse::tests

int main(int argc, char** argv) {
  if (const char* missing = glimpse_cuda_missing()) {
    std::printf("no device: %s\n", missing);
    return 2;
  }
  std::printf("%s\n", glimpse_cuda_build());
  return glimpse::tests::run(argc - 1, argv + 1);
}
