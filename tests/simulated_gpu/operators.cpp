// torch's operators on simulated GPUs: the CPU's, on the same memory, in the order of the streams.
//
// Every operator that torch registers for CUDA is replaced, but those that only make tensors or
// views. What an operator returns is allocated when it is called, by torch's CUDA allocator; what
// it computes is computed by the stream, on CPU tensors that alias the memory.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <fcntl.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <iostream>

extern "C" int simulated_enqueue(void* stream, void (*work)(void*), void* data, int programmatic);

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

constexpr const char* kCaptureFailed =
    "CUDA error: operation failed due to a previous error during capture";
constexpr const char* kForbidden = "CUDA error: operation not permitted when stream is capturing";

// The memory of a CUDA tensor, which may be gone by the time that the alias is used: as on a GPU,
// it is the allocator that has to see to that.
Tensor aliased(const Tensor& x) {
  const auto options = at::TensorOptions().dtype(x.dtype()).device(at::kCPU);
  if (x.numel() == 0) return at::empty_strided(x.sizes(), x.strides(), options);
  Tensor alias = at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [](void*) {}, options);
  alias._set_conj(x.is_conj());
  alias._set_neg(x.is_neg());
  return alias;
}

// An argument as the CPU's operator gets it. A host value is taken when the operator is called.
Tensor for_cpu(const Tensor& x) {
  if (!x.defined()) return x;
  if (x.is_cuda()) return aliased(x);
  Tensor value = x.clone();
  const bool is_number = x.unsafeGetTensorImpl()->is_wrapped_number();
  value.unsafeGetTensorImpl()->set_wrapped_number(is_number);
  return value;
}

// An argument without data, to find out what an operator returns.
Tensor for_meta(const Tensor& x) {
  if (!x.defined()) return x;
  if (x.is_cpu() && x.dim() == 0) return for_cpu(x);
  return at::empty_strided(x.sizes(), x.strides(), x.options().device(at::kMeta));
}

// Numbers that go on from call to call, and are the same for the same seed.
at::Generator cpu_generator(at::Generator generator) {
  constexpr uint64_t kSpread = 1000003, kStep = 4;
  if (generator.device().is_cpu()) return generator;
  const uint64_t offset = generator.get_offset();
  generator.set_offset(offset + kStep);
  return at::detail::createCPUGenerator(generator.current_seed() * kSpread + offset);
}

template <typename Function>
IValue with_tensors(const IValue& value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isGenerator()) return cpu_generator(value.toGenerator());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& x : value.toTensorVector()) list.push_back(function(x));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& x : value.toOptionalTensorVector()) {
      list.push_back(x ? std::optional<Tensor>(function(*x)) : std::nullopt);
    }
    return list;
  }
  return value;
}

template <typename Function>
Stack with_tensors(const Stack& values, Function function) {
  Stack result;
  for (const IValue& value : values) result.push_back(with_tensors(value, function));
  return result;
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// What a stream does for a call; kept for good, as a graph may replay it.
struct Call {
  OperatorHandle op;
  Stack arguments;
  std::vector<Tensor> results;  // where to put what the operator returns
};

void run(void* data) {
  auto* const call = static_cast<Call*>(data);
  try {
    const at::AutoDispatchBelowADInplaceOrView below;
    Stack stack = call->arguments;
    call->op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
    auto result = call->results.begin();
    for (const IValue& value : stack) {
      if (result == call->results.end()) break;
      if (value.isTensor()) (result++)->copy_(value.toTensor());
      if (!value.isTensorList()) continue;
      for (const Tensor& x : value.toTensorVector()) (result++)->copy_(x);
    }
  } catch (const std::exception& error) {
    std::cerr << "simulated GPU: " << call->op.operator_name() << ": " << error.what() << '\n';
    std::abort();  // as a failed kernel leaves nothing that could go on
  }
}

void enqueue(Call* call) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  TORCH_CHECK(simulated_enqueue(stream.stream(), run, call, 0) == 0, kCaptureFailed);
}

void wait_for_stream() {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  TORCH_CHECK(cudaStreamSynchronize(stream.stream()) == cudaSuccess, kForbidden);
}

Tensor on_cuda(const Tensor& like) {
  const c10::Device device(c10::kCUDA, c10::cuda::current_device());
  return at::empty_strided(like.sizes(), like.strides(), like.options().device(device));
}

void check_devices(const OperatorHandle& op, const Stack& arguments) {
  bool on_gpu = false, on_host = false;
  for (const IValue& value : arguments) {
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    on_gpu |= value.toTensor().is_cuda();
    on_host |= value.toTensor().is_cpu() && value.toTensor().dim() > 0;
  }
  TORCH_CHECK(!on_gpu || !on_host, op.operator_name(),
              ": Expected all tensors to be on the same device");
}

// Outputs that the caller gave without elements get the size that they need.
void resize_outputs(const OperatorHandle& op, const Stack& arguments) {
  std::vector<Tensor> outputs, metas;
  Stack trial = with_tensors(arguments, for_meta);
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!is_written(op.schema().arguments()[i]) || !arguments[i].isTensor()) continue;
    outputs.push_back(arguments[i].toTensor());
    metas.push_back(trial[i].toTensor());
  }
  const bool unsized = std::any_of(outputs.begin(), outputs.end(),
                                   [](const Tensor& x) { return x.numel() == 0; });
  if (!unsized || op.schema().overload_name().find("out") == std::string::npos) return;
  op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &trial);
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i].resize_(metas[i].sizes());
}

// What the operator will return, without data; nothing if that depends on values.
std::optional<Stack> results_without_data(const OperatorHandle& op, const Stack& arguments) {
  const auto composite = DispatchKey::CompositeExplicitAutogradNonFunctional;
  if (!op.hasKernelForDispatchKey(DispatchKey::Meta) && !op.hasKernelForDispatchKey(composite)) {
    return std::nullopt;
  }
  Stack results = with_tensors(arguments, for_meta);
  try {
    op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &results);
  } catch (const std::exception&) {  // also from torch's Python code
    return std::nullopt;
  }
  const auto is_tensors = [](const IValue& x) { return x.isTensor() || x.isTensorList(); };
  if (!std::all_of(results.begin(), results.end(), is_tensors)) return std::nullopt;
  return results;
}

void call_on_cuda(const OperatorHandle& op, DispatchKeySet, Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = op.schema();
  const Stack arguments = torch::jit::pop(*stack, schema.arguments().size());
  check_devices(op, arguments);
  const bool writes_arguments =
      std::all_of(schema.returns().begin(), schema.returns().end(), is_written);
  if (writes_arguments) {
    resize_outputs(op, arguments);
    enqueue(new Call{op, with_tensors(arguments, for_cpu), {}});
    size_t num_returned = 0;
    for (size_t i = 0; i < arguments.size() && num_returned < schema.returns().size(); ++i) {
      if (!is_written(schema.arguments()[i])) continue;
      stack->push_back(arguments[i]);
      ++num_returned;
    }
    return;
  }
  if (const auto results = results_without_data(op, arguments)) {
    auto* const call = new Call{op, with_tensors(arguments, for_cpu), {}};
    for (const IValue& result : *results) {
      stack->push_back(with_tensors(result, [call](const Tensor& like) {
        const Tensor made = on_cuda(like);
        call->results.push_back(aliased(made));
        return made;
      }));
    }
    enqueue(call);
    return;
  }
  wait_for_stream();
  Stack results = with_tensors(arguments, for_cpu);
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &results);
  for (const IValue& result : results) {
    stack->push_back(with_tensors(result, [](const Tensor& x) {
      if (!x.defined()) return x;
      const Tensor made = on_cuda(x);
      aliased(made).copy_(x);
      return made;
    }));
  }
}

// Between any two devices.
Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  struct Copy {
    Tensor to, from;
  };
  if (to.numel() == 0) return to;
  const at::AutoDispatchBelowADInplaceOrView below;
  const bool is_staged = from.is_cpu() && !from.is_pinned();
  const Tensor source = from.is_cuda() ? aliased(from) : is_staged ? from.clone() : from;
  auto* const copy = new Copy{to.is_cuda() ? aliased(to) : to, source.expand(to.sizes())};
  const bool waits = to.is_cpu() && !(non_blocking && to.is_pinned());
  if (waits) {
    const auto stream = c10::cuda::getCurrentCUDAStream(from.device().index());
    TORCH_CHECK(cudaStreamSynchronize(stream.stream()) == cudaSuccess, kForbidden);
    copy->to.copy_(copy->from);
    delete copy;
    return to;
  }
  const auto work = [](void* data) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static_cast<Copy*>(data)->to.copy_(static_cast<Copy*>(data)->from);
  };
  const auto stream = c10::cuda::getCurrentCUDAStream();
  TORCH_CHECK(simulated_enqueue(stream.stream(), work, copy, 0) == 0, kCaptureFailed);
  return to;
}

// Whether torch's own operator does as well: it allocates, makes a view, or asks the runtime.
bool is_kept(const std::string& name) {
  constexpr std::array kKept{
      "_local_scalar_dense", "_pin_memory", "_reshape_alias", "alias", "as_strided", "copy_",
      "is_pinned", "is_set_to", "record_stream", "resize_", "set_", "unfold", "view",
      "view_as_complex", "view_as_real",
  };
  return name.find("empty") != std::string::npos ||
         std::find(kKept.begin(), kKept.end(), name) != kKept.end();
}

// torch warns of each operator that is replaced.
class WithoutStderr {
 public:
  WithoutStderr() : stderr_(dup(STDERR_FILENO)) {
    const int nothing = open("/dev/null", O_WRONLY);
    dup2(nothing, STDERR_FILENO);
    close(nothing);
  }
  ~WithoutStderr() {
    std::cerr.flush();
    dup2(stderr_, STDERR_FILENO);
    close(stderr_);
  }

 private:
  const int stderr_;
};

}  // namespace

// Replaces torch's operators, for the life of the process.
extern "C" __attribute__((visibility("default"))) void simulated_gpu_replace_operators() {
  const WithoutStderr quiet;
  const std::string prefix = "aten::";
  auto* const library = new torch::Library(torch::Library::IMPL, "aten", DispatchKey::CUDA,
                                           __FILE__, __LINE__);
  const auto names =
      c10::Dispatcher::singleton().getRegistrationsForDispatchKey(DispatchKey::CUDA);
  for (const c10::OperatorName& op : names) {
    if (op.name.compare(0, prefix.size(), prefix) != 0) continue;
    const std::string name = op.name.substr(prefix.size());
    if (is_kept(name)) continue;
    const std::string full = op.overload_name.empty() ? name : name + "." + op.overload_name;
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&call_on_cuda>());
  }
  library->impl("copy_", TORCH_FN(copy_));
}
