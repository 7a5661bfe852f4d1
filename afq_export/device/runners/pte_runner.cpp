// Runs .pte programs: a decoder on windows of token ids, or programs of linears on matrices. The job: see job.h.
//
// Every kernel is ExecuTorch's own, from its wheel. Runtime, XNNPACK backend, optimized and quantized kernels need no
// PyTorch. llama::update_cache and llama::custom_sdpa are compiled only into a library that registers them with PyTorch
// too; it is linked as a copy whose initializers do not run (elf.py), and its two kernels are registered here. Against
// a build of ExecuTorch's sources, which has them in a library of their own, compile with -DAFQ_OWN_KERNELS=0.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <optional>

#include "job.h"

#ifndef AFQ_OWN_KERNELS
#define AFQ_OWN_KERNELS 1
#endif

#if AFQ_OWN_KERNELS
namespace torch::executor::native {

using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

// As the library exports them.
Tensor& update_cache_out(KernelRuntimeContext&, const Tensor& value, Tensor& cache, int64_t start, Tensor& out);
Tensor& custom_sdpa_out(KernelRuntimeContext&, const Tensor& query, const Tensor& key, const Tensor& value,
                        int64_t start, const std::optional<Tensor>& mask, double dropout, bool causal,
                        std::optional<double> scale, Tensor& out);

EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache_out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa_out);

}  // namespace torch::executor::native

namespace c10 {

// The one object of PyTorch that the library's data refers to; what uses it never runs here.
struct UndefinedTensorImpl {
  static char _singleton[512];
};
char UndefinedTensorImpl::_singleton[512];

}  // namespace c10
#endif

namespace executorch::extension::threadpool {

// As the library exports it; the wheel has no header of it.
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();

}  // namespace executorch::extension::threadpool

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::make_tensor_ptr;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

std::string text(Error error) {
  return executorch::runtime::to_string(error);
}

void load(Module& program) {
  const auto loaded = program.load_forward();
  if (loaded != Error::Ok) {
    afq::stop(afq::NOT_LOADED, "the program does not load: " + text(loaded));
  }
}

// Float32 logits [count, vocabulary] of `count` tokens after `position` others.
std::pair<const float*, size_t> run_call(Module& program, int64_t* ids, size_t count, size_t before) {
  auto position = static_cast<int64_t>(before);
  auto tokens = make_tensor_ptr({1, static_cast<SizesType>(count)}, ids, ScalarType::Long);
  auto start = make_tensor_ptr({1}, &position, ScalarType::Long);
  auto result = program.forward({EValue(tokens), EValue(start)});
  if (!result.ok()) {
    afq::stop(afq::NOT_RUN, "forward: " + text(result.error()));
  }
  if (result->size() != 1 || !result->front().isTensor()) {
    afq::stop(afq::NOT_RUN, "forward does not give one tensor");
  }
  const auto logits = result->front().toTensor();
  if (logits.scalar_type() != ScalarType::Float || logits.dim() != 3 || logits.size(0) != 1 ||
      logits.size(1) != static_cast<int64_t>(count)) {
    afq::stop(afq::NOT_RUN, "forward does not give float logits [1, tokens, vocabulary]");
  }
  return {static_cast<const float*>(logits.const_data_ptr()), static_cast<size_t>(logits.size(2))};
}

void run_product(const std::string& model, int64_t rows, std::vector<afq::Matrix>& inputs, afq::Output& out) {
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> given;
  for (auto& input : inputs) {
    tensors.push_back(make_tensor_ptr({static_cast<SizesType>(rows), static_cast<SizesType>(input.columns)},
                                      input.values.data(), ScalarType::Float));
    given.emplace_back(tensors.back());
  }
  Module program(model);
  load(program);
  auto outputs = program.forward(given);
  if (!outputs.ok()) {
    afq::stop(afq::NOT_RUN, "forward: " + text(outputs.error()));
  }
  for (const auto& output : *outputs) {
    if (!output.isTensor() || output.toTensor().scalar_type() != ScalarType::Float) {
      afq::stop(afq::NOT_RUN, "forward gives something else than float tensors");
    }
    const auto tensor = output.toTensor();
    out.write(static_cast<const float*>(tensor.const_data_ptr()), static_cast<size_t>(tensor.numel()));
  }
}

}  // namespace

int main(int count, char** arguments) {
  const afq::Job job(count, arguments, "usage: pte_runner JOB", {});
  if (job.has("threads") && job.number("threads", 0)) {
    const auto threads = static_cast<uint32_t>(job.number("threads", 0));
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
  }
  afq::Timing timing;
  if (job.has("matrices")) {
    afq::run_matrices(job, run_product);
  } else {
    const auto begin = afq::Clock::now();
    Module program(job.file("model"));
    load(program);
    timing.load = afq::seconds_since(begin);
    const auto call = [&program](int64_t* ids, size_t taken, size_t before) {
      return run_call(program, ids, taken, before);
    };
    afq::run_windows(job, call, [] {}, timing);  // a window starts at position 0, which overwrites the cache
  }
  afq::answer(timing, "");
  return 0;
}
