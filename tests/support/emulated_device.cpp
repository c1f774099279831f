// A PyTorch back end (PrivateUse1) whose device memory is main memory and whose kernels are those
// of the CPU. It counts what it gives out, and refuses what a real accelerator refuses: tensors of
// two devices in one operation, and more memory than it has. See emulated_device.py.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/resize.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(KIND, 0);

// PyTorch lets `parameter.data` go from the CPU to CUDA, and to few other back ends. The key of the
// CPU beside our own makes this one of them; the higher key decides who runs an operation.
const c10::DispatchKeySet KEYS =
    c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) | c10::DispatchKeySet(c10::DispatchKey::CPU);

// Memory ------------------------------------------------------------------------------------------

struct Count {
  std::mutex mutex;
  int64_t now = 0;
  int64_t peak = 0;
  int64_t most = int64_t(64) << 30;

  void take(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        now + bytes <= most,
        "emulated device out of memory: tried to allocate ", bytes, " bytes beside ", now,
        " of ", most, ".");
    now += bytes;
    peak = std::max(peak, now);
  }

  void give(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    now -= bytes;
  }
};

// Storages may outlive everything at the end of the process.
Count& count() {
  static auto* the = new Count;
  return *the;
}

// A piece of main memory that counts as device memory for as long as it lives.
struct Piece {
  c10::DataPtr memory;
  int64_t bytes;

  // The bytes must have been taken.
  static c10::DataPtr of(c10::DataPtr memory, int64_t bytes) {
    void* data = memory.get();
    return {data, new Piece{std::move(memory), bytes}, &Piece::drop, DEVICE};
  }

  static void drop(void* context) {
    auto* piece = static_cast<Piece*>(context);
    count().give(piece->bytes);
    delete piece;
  }
};

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, DEVICE};
    }
    count().take(int64_t(bytes));
    return Piece::of(c10::GetCPUAllocator()->allocate(bytes), int64_t(bytes));
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

DeviceMemory device_memory;
REGISTER_ALLOCATOR(KIND, &device_memory)

// Main memory in locked pages: here pages like any others, which are remembered.
struct PinnedMemory final : c10::Allocator {
  static std::set<std::pair<const char*, const char*>>& ranges() {
    static auto* the = new std::set<std::pair<const char*, const char*>>;
    return *the;
  }

  struct Range {
    c10::DataPtr memory;
    std::pair<const char*, const char*> range;
    static void drop(void* context) {
      auto* own = static_cast<Range*>(context);
      ranges().erase(own->range);
      delete own;
    }
  };

  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    auto* begin = static_cast<char*>(memory.get());
    auto* range = new Range{std::move(memory), {begin, begin + bytes}};
    ranges().insert(range->range);
    return {begin, range, &Range::drop, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

PinnedMemory pinned_memory;

// What PyTorch asks of a back end -----------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override {
    const auto* place = static_cast<const char*>(data);
    const auto& ranges = PinnedMemory::ranges();
    return std::any_of(ranges.begin(), ranges.end(), [place](const auto& range) {
      return range.first <= place && place < range.second;
    });
  }
};

// Operations --------------------------------------------------------------------------------------

void describe(const at::Tensor& tensor, const at::Tensor& like) {
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
}

// The tensors of one operation, on the device and as the CPU sees them. Nothing is copied.
class Crossing {
 public:
  at::Tensor to_cpu(const at::Tensor& tensor, bool written) {
    TORCH_CHECK(tensor.layout() == c10::kStrided, "the emulated device has dense tensors alone");
    at::Tensor seen;
    if (written && tensor.numel() == 0) {
      // A result that an operation makes as large as it needs.
      seen = at::empty(tensor.sizes(), tensor.options().device(c10::kCPU));
      fresh_.emplace_back(tensor, seen);
    } else {
      seen = at::detail::make_tensor<c10::TensorImpl>(
          cpu_storage(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU),
          tensor.dtype());
      describe(seen, tensor);
    }
    tensors_.emplace_back(tensor, seen);
    return seen;
  }

  // The results that were made as large as needed, written where they belong.
  void settle() {
    for (const auto& [tensor, seen] : fresh_) {
      if (seen.numel() > 0) {
        tensor.resize_(seen.sizes());
        tensor.copy_(seen);
      }
    }
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined()) {
      return result;
    }
    for (const auto& [tensor, seen] : tensors_) {
      if (seen.is_same(result)) {
        return tensor;
      }
    }
    at::Tensor made;
    for (const auto& [tensor, seen] : tensors_) {
      if (seen.storage().is_alias_of(result.storage())) {
        made = at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(tensor.storage()), tensor.key_set(),
            result.dtype());
        break;
      }
    }
    if (!made.defined()) {
      made = at::detail::make_tensor<c10::TensorImpl>(
          adopted(result.storage()), KEYS, result.dtype());
    }
    describe(made, result);
    return made;
  }

 private:
  c10::Storage cpu_storage(const c10::Storage& storage) {
    for (const auto& [there, here] : storages_) {
      if (there.is_alias_of(storage)) {
        return here;
      }
    }
    auto* data = const_cast<void*>(storage.data());
    c10::Storage seen(
        c10::Storage::use_byte_size_t(), storage.nbytes(),
        c10::DataPtr(data, c10::Device(c10::kCPU)), nullptr, false);
    storages_.emplace_back(storage, seen);
    return seen;
  }

  // The memory of a result that the CPU has made, which now counts as the device's.
  c10::Storage adopted(const c10::Storage& storage) {
    for (const auto& [there, here] : storages_) {
      if (here.is_alias_of(storage)) {
        return there;
      }
    }
    auto bytes = storage.nbytes();
    void* data = const_cast<void*>(storage.data());
    c10::DataPtr pointer(nullptr, DEVICE);
    if (bytes > 0) {
      count().take(int64_t(bytes));
      auto* owner = new c10::Storage(storage);
      auto drop = [](void* context) { delete static_cast<c10::Storage*>(context); };
      pointer = Piece::of(c10::DataPtr(data, owner, drop, c10::Device(c10::kCPU)), int64_t(bytes));
    }
    c10::Storage made(
        c10::Storage::use_byte_size_t(), bytes, std::move(pointer), &device_memory, true);
    storages_.emplace_back(made, storage);
    return made;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_, fresh_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

void check_device(const at::Tensor& tensor, const c10::OperatorHandle& operation) {
  TORCH_CHECK(
      tensor.device().type() == KIND || tensor.dim() == 0,
      "Expected all tensors to be on the same device, but found at least two devices, ", DEVICE,
      " and ", tensor.device(), "! (when checking arguments of ",
      operation.schema().operator_name(), ")");
}

// Any operation, by the CPU's kernel on the same memory.
void by_cpu(const c10::OperatorHandle& operation, c10::DispatchKeySet, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = operation.schema();
  const auto begin = stack->size() - schema.arguments().size();
  // Indices may be in main memory, as on CUDA.
  const bool indexes = schema.name().find("index") != std::string::npos;
  Crossing crossing;
  for (size_t place = begin; place < stack->size(); ++place) {
    auto& value = (*stack)[place];
    const auto* alias = schema.arguments()[place - begin].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    auto cross = [&](const at::Tensor& tensor) {
      if (!tensor.defined()) {
        return tensor;
      }
      check_device(tensor, operation);
      return tensor.device().type() == KIND ? crossing.to_cpu(tensor, written) : tensor;
    };
    if (value.isTensor()) {
      value = cross(value.toTensor());
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      std::transform(tensors.begin(), tensors.end(), tensors.begin(), cross);
      value = std::move(tensors);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> seen;
      for (const std::optional<at::Tensor>& own : value.toOptionalTensorList()) {
        const bool here = own.has_value() && own->defined() && own->device().type() != KIND;
        seen.push_back(own.has_value() && !(here && indexes) ? cross(*own) : own);
      }
      value = std::move(seen);
    } else if (value.isDevice() && value.toDevice().type() == KIND) {
      value = c10::Device(c10::kCPU);
    }
  }
  operation.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  crossing.settle();
  for (auto place = stack->size() - schema.returns().size(); place < stack->size(); ++place) {
    auto& value = (*stack)[place];
    if (value.isTensor()) {
      value = crossing.to_device(value.toTensor());
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) {
        tensor = crossing.to_device(tensor);
      }
      value = std::move(tensors);
    }
  }
}

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &device_memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &device_memory, KEYS, c10::dtype_or_default(dtype));
}

// The one operation that crosses between devices.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView below;
  Crossing crossing;
  auto here = [&](const at::Tensor& tensor) {
    return tensor.device().type() == KIND ? crossing.to_cpu(tensor, false) : tensor;
  };
  here(to).copy_(here(from));
  return to;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  TORCH_CHECK(source.device().type() == KIND, "a storage of ", source.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_nothing(at::Tensor& self) {
  c10::Storage nothing(
      c10::Storage::use_byte_size_t(), 0, device_memory.allocate(0), &device_memory, true);
  return at::native::set_storage_cpu_(self, std::move(nothing), 0, {0}, {});
}

at::Tensor convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  at::AutoDispatchBelowADInplaceOrView below;
  Crossing crossing;
  auto here = [&](const at::Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == KIND, "convolution of tensors on two devices");
    return crossing.to_cpu(tensor, false);
  };
  std::optional<at::Tensor> own;
  if (bias.has_value() && bias->defined()) {
    own = here(*bias);
  }
  return crossing.to_device(at::convolution_symint(
      here(input), here(weight), own, stride, padding, dilation, transposed, output_padding,
      std::move(groups)));
}

// The same tensor as the CPU sees it, for as long as the tensor is there.
at::Tensor as_cpu(const at::Tensor& tensor) {
  return Crossing().to_cpu(tensor, false);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("resize_", TORCH_FN(at::native::resize_));
  library.impl("_copy_from", TORCH_FN(copy_from));
  using SetStorage = at::Tensor& (*)(at::Tensor&, at::Storage);
  library.impl("set_.source_Storage", TORCH_FN(static_cast<SetStorage>(at::native::set_)));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  library.impl("set_", TORCH_FN(set_nothing));
  library.impl("convolution_overrideable", TORCH_FN(convolution));
  // Without a kernel of the back end's own, PyTorch would take it apart.
  library.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

TORCH_LIBRARY(emulated, library) {
  library.def("register_hooks() -> ()", [] {
    static auto* hooks = new Hooks;
    at::RegisterPrivateUse1HooksInterface(hooks);
  });
  library.def("as_cpu(Tensor tensor) -> Tensor", as_cpu);
  library.def("allocated() -> int", [] { return count().now; });
  library.def("peak() -> int", [] { return count().peak; });
  library.def("reset_peak() -> ()", [] { count().peak = count().now; });
  library.def("most() -> int", [] { return count().most; });
  library.def("set_most(int bytes) -> ()", [](int64_t bytes) { count().most = bytes; });
}

} // namespace
