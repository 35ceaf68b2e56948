// What a build of torch without CUDA, or a machine without a GPU, lacks for tensors whose device is
// cuda:0: the hooks that say that one GPU exists, and the guard that switches devices and streams.
// Nothing is computed here; fakegpu.py says why each part is there.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

// Autograd asks this guard for a device thread and for streams as soon as a tensor is on cuda:0.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device gpu() { return Device(c10::DeviceType::CUDA, 0); }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return gpu(); }
  Device getDevice() const override { return gpu(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, gpu()); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, gpu()); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
}  // namespace

namespace at {
// Torch looks these hooks up once, while it is imported, so this library must be loaded before.
struct Hooks final : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
// Preferred over the hooks of a build of torch with CUDA, which would ask the driver.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks);
}  // namespace at

// To be called after the import of torch: a build with CUDA registers its own guard meanwhile.
extern "C" void install_guard() {
  static Guard guard;
  c10::impl::DeviceGuardImplRegistrar(c10::DeviceType::CUDA, &guard);
}
