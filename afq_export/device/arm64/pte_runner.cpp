// Runs .pte programs of this package: a decoder on windows of token ids, or programs of linears on matrices.
//
//   pte_runner MODEL IDS LOGITS WINDOWS TOKENS CALL
//
// IDS: int64 [WINDOWS, TOKENS]. LOGITS: float32 [WINDOWS, TOKENS, vocabulary], both raw and little-endian.
// Every window starts at position 0 and is cut into calls of CALL tokens, as ExecutorchSession does on the host.
//
//   pte_runner FOLDER LIST
//
// LIST: one line per program, `MODEL OUT ROWS FILE COLUMNS [FILE COLUMNS]...`, files in FOLDER. Each FILE is float32
// [ROWS, COLUMNS], and an input; OUT gets the outputs, float32, one after the other.
//
// Standard output: one JSON object: `seconds` per window or program, and `code`: [file, start, end] of every executable
// mapping, so that translated instructions can be told apart by library.
//
// Every kernel is ExecuTorch's own, from its wheel. Runtime, XNNPACK backend, optimized and quantized kernels need no
// PyTorch. llama::update_cache and llama::custom_sdpa are compiled only into a library that registers them with PyTorch
// too; it is linked as a copy whose initializers do not run (elf.py), and its two kernels are registered here.
// Exit codes: 2 wrong arguments or files, 3 the program does not load, 4 it does not run.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

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

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::make_tensor_ptr;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

enum Exit { WRONG_INPUT = 2, NOT_LOADED = 3, NOT_RUN = 4 };

[[noreturn]] void stop(Exit code, const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(code);
}

std::string text(Error error) {
  return executorch::runtime::to_string(error);
}

template <typename T>
std::vector<T> read_values(const std::string& path, size_t count) {
  std::vector<T> values(count);
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(count * sizeof(T));
  if (!file.read(reinterpret_cast<char*>(values.data()), bytes) || file.peek() != EOF) {
    stop(WRONG_INPUT, "not as many values as said: " + path);
  }
  return values;
}

void load(Module& program) {
  const auto loaded = program.load_forward();
  if (loaded != Error::Ok) {
    stop(NOT_LOADED, "the program does not load: " + text(loaded));
  }
}

void close(std::ofstream& out, const std::string& path) {
  out.close();
  if (!out) {
    stop(WRONG_INPUT, "cannot write " + path);
  }
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Float32 logits [count, vocabulary] of `count` tokens after `position` others, appended to `out`.
void run_call(Module& program, int64_t* ids, size_t count, int64_t position, std::ofstream& out) {
  auto tokens = make_tensor_ptr({1, static_cast<SizesType>(count)}, ids, ScalarType::Long);
  auto start = make_tensor_ptr({1}, &position, ScalarType::Long);
  auto result = program.forward({EValue(tokens), EValue(start)});
  if (!result.ok()) {
    stop(NOT_RUN, "forward: " + text(result.error()));
  }
  if (result->size() != 1 || !result->front().isTensor()) {
    stop(NOT_RUN, "forward does not give one tensor");
  }
  const auto logits = result->front().toTensor();
  if (logits.scalar_type() != ScalarType::Float || logits.dim() != 3 || logits.size(0) != 1 ||
      logits.size(1) != static_cast<int64_t>(count)) {
    stop(NOT_RUN, "forward does not give float logits [1, tokens, vocabulary]");
  }
  out.write(static_cast<const char*>(logits.const_data_ptr()), static_cast<std::streamsize>(logits.nbytes()));
}

// [file, start, end] of executable mappings; addresses are those that the emulator's log of instructions has.
void print_code() {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  const char* comma = "";
  std::printf("\"code\": [");
  while (std::getline(maps, line)) {
    unsigned long long start = 0, end = 0;
    char mode[8] = {}, path[4096] = {};
    const int found = std::sscanf(line.c_str(), "%llx-%llx %7s %*s %*s %*s %4095s", &start, &end, mode, path);
    if (found != 4 || mode[2] != 'x' || path[0] != '/') {
      continue;
    }
    const std::string whole(path);
    const std::string name = whole.substr(whole.rfind('/') + 1);
    std::printf("%s[\"%s\", %llu, %llu]", comma, name.c_str(), start, end);
    comma = ", ";
  }
  std::printf("]");
}

std::vector<double> run_windows(char** arguments) {
  const size_t windows = std::strtoull(arguments[4], nullptr, 10);
  const size_t tokens = std::strtoull(arguments[5], nullptr, 10);
  const size_t call = std::strtoull(arguments[6], nullptr, 10);
  if (!windows || !tokens || !call) {
    stop(WRONG_INPUT, "windows, tokens and call are numbers from 1");
  }
  auto ids = read_values<int64_t>(arguments[2], windows * tokens);
  Module program(arguments[1]);
  load(program);
  std::ofstream out(arguments[3], std::ios::binary);
  std::vector<double> seconds;
  for (size_t window = 0; window < windows; ++window) {
    const auto begin = std::chrono::steady_clock::now();
    for (size_t start = 0; start < tokens; start += call) {
      const size_t taken = std::min(call, tokens - start);
      run_call(program, &ids[window * tokens + start], taken, static_cast<int64_t>(start), out);
    }
    seconds.push_back(seconds_since(begin));
  }
  close(out, arguments[3]);
  return seconds;
}

// One line of LIST.
void run_matrices(const std::string& folder, std::istringstream line) {
  std::string model, result, name;
  size_t rows = 0, columns = 0;
  if (!(line >> model >> result >> rows) || !rows) {
    stop(WRONG_INPUT, "not a line of programs");
  }
  std::vector<std::vector<float>> values;
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> inputs;
  while (line >> name >> columns) {
    values.push_back(read_values<float>(folder + "/" + name, rows * columns));
    tensors.push_back(make_tensor_ptr({static_cast<SizesType>(rows), static_cast<SizesType>(columns)},
                                      values.back().data(), ScalarType::Float));
    inputs.emplace_back(tensors.back());
  }
  Module program(folder + "/" + model);
  load(program);
  auto outputs = program.forward(inputs);
  if (!outputs.ok()) {
    stop(NOT_RUN, "forward: " + text(outputs.error()));
  }
  std::ofstream out(folder + "/" + result, std::ios::binary);
  for (const auto& output : *outputs) {
    if (!output.isTensor() || output.toTensor().scalar_type() != ScalarType::Float) {
      stop(NOT_RUN, "forward gives something else than float tensors");
    }
    const auto tensor = output.toTensor();
    out.write(static_cast<const char*>(tensor.const_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  }
  close(out, result);
}

std::vector<double> run_list(char** arguments) {
  const std::string folder(arguments[1]);
  std::ifstream list(folder + "/" + arguments[2]);
  std::vector<double> seconds;
  std::string line;
  while (std::getline(list, line)) {
    const auto begin = std::chrono::steady_clock::now();
    run_matrices(folder, std::istringstream(line));
    seconds.push_back(seconds_since(begin));
  }
  return seconds;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7 && count != 3) {
    stop(WRONG_INPUT, "usage: pte_runner MODEL IDS LOGITS WINDOWS TOKENS CALL | pte_runner FOLDER LIST");
  }
  const auto seconds = count == 7 ? run_windows(arguments) : run_list(arguments);
  std::printf("{\"seconds\": [");
  for (size_t index = 0; index < seconds.size(); ++index) {
    std::printf("%s%.3f", index ? ", " : "", seconds[index]);
  }
  std::printf("], ");
  print_code();
  std::printf("}\n");
  return 0;
}
