// SPDX-License-Identifier: Apache-2.0
// The device that is current: what it is, and whether this build has code for it.
#include <atomic>
#include <cstdio>
#include <mutex>

#include "cuda/kernel.cuh"

#ifndef GLIMPSE_CUDA_TARGETS
#define GLIMPSE_CUDA_TARGETS "unknown targets"
#endif

namespace glimpse::cuda {
namespace {

constexpr int kDevices = 64;

struct Device {
  std::atomic<bool> known{false};
  Chip chip{0, 1, kSharedUnasked};
  char missing[256] = "";
};
Device devices[kDevices];
std::mutex looking;

__global__ void probe_kernel() {}

void look_at(int index, Device& found) {
  int major = 0, minor = 0, multiprocessors = 1, shared = static_cast<int>(kSharedUnasked);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  found.chip = Chip{10 * major + minor, multiprocessors, static_cast<size_t>(shared)};
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) {
    cudaGetLastError();
    std::snprintf(found.missing, sizeof found.missing, "no code for compute capability %d.%d in this build (%s): %s", major,
                  minor, GLIMPSE_CUDA_TARGETS, cudaGetErrorString(error));
  } else if (attributes.ptxVersion < found.chip.capability) {
    // The driver compiled code for an older chip, in which clusters and dependent launches may be left out (__CUDA_ARCH__).
    found.chip.capability = attributes.ptxVersion;
  }
}

Device* current() {
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index < 0 || index >= kDevices) return nullptr;
  Device& device = devices[index];
  if (!device.known.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> alone(looking);
    if (!device.known.load(std::memory_order_relaxed)) {
      look_at(index, device);
      device.known.store(true, std::memory_order_release);
    }
  }
  return &device;
}

// The driver comes first: without it, or with one older than the runtime of this build, every other call fails obscurely.
const char* driver_missing() {
  static char text[256];
  static const char* const found = [] () -> const char* {
    int driver = 0, devices_here = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver";
    if (driver / 1000 < CUDART_VERSION / 1000) {
      std::snprintf(text, sizeof text, "the driver is for CUDA %d.%d, this build needs one for CUDA %d", driver / 1000,
                    driver % 1000 / 10, CUDART_VERSION / 1000);
      return text;
    }
    const cudaError_t error = cudaGetDeviceCount(&devices_here);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    std::snprintf(text, sizeof text, "%s", cudaGetErrorString(error));
    return text;
  }();
  return found;
}

}  // namespace

const Chip& chip() {
  static const Chip nothing{80, 1, kSharedUnasked};
  const Device* device = current();
  return device != nullptr ? device->chip : nothing;
}

}  // namespace glimpse::cuda

extern "C" const char* glimpse_cuda_missing(void) {
  using namespace glimpse::cuda;
  if (const char* missing = driver_missing()) return missing;
  const Device* device = current();
  if (device == nullptr) return "no current CUDA device";
  return device->missing[0] != '\0' ? device->missing : nullptr;
}

extern "C" const char* glimpse_cuda_build(void) { return GLIMPSE_CUDA_TARGETS; }
