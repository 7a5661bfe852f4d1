// Runs ONNX models where no Python is: a decoder on windows of token ids, or models of linears. The job: see job.h.
// Needs ONNX Runtime's C API alone. More keys than there, as session_options.json of the bundle has them:
//
//   level LEVEL       graph optimization: disable, basic, extended, all
//   entry KEY VALUE   a configuration entry of the session; may be repeated
//   provider NAME     an execution provider, in order; may be repeated
//   profile FILE      written: ONNX Runtime's profile of what ran
//
// The model follows the convention of Hugging Face's ONNX exports: input_ids, attention_mask and position_ids int64
// [batch, tokens], past_key_values.I.key and .value [batch, heads, past, width]; logits, present.I.key and .value.

#include <onnxruntime_cxx_api.h>

#include "job.h"

namespace {

const std::string PAST = "past_key_values.", PRESENT = "present.", CPU = "CPUExecutionProvider";

GraphOptimizationLevel level_of(const std::string& name) {
  const std::map<std::string, GraphOptimizationLevel> known = {{"disable", ORT_DISABLE_ALL},
                                                               {"basic", ORT_ENABLE_BASIC},
                                                               {"extended", ORT_ENABLE_EXTENDED},
                                                               {"all", ORT_ENABLE_ALL}};
  if (!known.count(name)) {
    afq::stop(afq::WRONG_INPUT, "no such optimization level: " + name);
  }
  return known.at(name);
}

Ort::SessionOptions options_of(const afq::Job& job) {
  Ort::SessionOptions options;
  const size_t threads = job.has("threads") ? job.number("threads", 0) : 1;
  options.SetIntraOpNumThreads(static_cast<int>(threads)).SetInterOpNumThreads(1);
  options.SetGraphOptimizationLevel(level_of(job.has("level") ? job.text("level") : "all"));
  for (const auto& entry : job.all("entry")) {
    const auto blank = entry.find(' ');
    if (blank == std::string::npos) {
      afq::stop(afq::WRONG_INPUT, "an entry without a value: " + entry);
    }
    options.AddConfigEntry(entry.substr(0, blank).c_str(), entry.substr(blank + 1).c_str());
  }
  for (const auto& provider : job.all("provider")) {
    const auto there = Ort::GetAvailableProviders();
    if (std::find(there.begin(), there.end(), provider) == there.end()) {
      afq::stop(afq::WRONG_INPUT, "this ONNX Runtime has no " + provider);
    }
    if (provider != CPU) {
      const std::string end = "ExecutionProvider";
      options.AppendExecutionProvider(provider.substr(0, provider.size() - end.size()));
    }
  }
  if (job.has("profile")) {
    options.EnableProfiling(job.file("profile").c_str());
  }
  return options;
}

std::vector<std::string> names_of(const Ort::Session& session, bool inputs) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> names;
  const size_t count = inputs ? session.GetInputCount() : session.GetOutputCount();
  for (size_t index = 0; index < count; ++index) {
    const auto name = inputs ? session.GetInputNameAllocated(index, allocator)
                             : session.GetOutputNameAllocated(index, allocator);
    names.emplace_back(name.get());
  }
  return names;
}

std::vector<const char*> pointers(const std::vector<std::string>& names) {
  std::vector<const char*> found;
  for (const auto& name : names) {
    found.push_back(name.c_str());
  }
  return found;
}

bool begins(const std::string& name, const std::string& with) {
  return name.compare(0, with.size(), with) == 0;
}

const Ort::MemoryInfo& memory() {
  static const Ort::MemoryInfo info = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return info;
}

// A session of a decoder and its KV cache.
class Decoder {
 public:
  Decoder(Ort::Env& env, const std::string& path, const Ort::SessionOptions& options)
      : session_(env, path.c_str(), options), inputs_(names_of(session_, true)) {
    outputs_.push_back("logits");
    for (const auto& name : inputs_) {
      if (begins(name, PAST)) {
        outputs_.push_back(PRESENT + name.substr(PAST.size()));
      }
    }
  }

  // Forgets everything: caches of length 0.
  void restart() {
    Ort::AllocatorWithDefaultOptions allocator;
    cache_.clear();
    for (size_t index = 0; index < inputs_.size(); ++index) {
      if (!begins(inputs_[index], PAST)) {
        continue;
      }
      const auto type = session_.GetInputTypeInfo(index);
      const auto stated = type.GetTensorTypeAndShapeInfo().GetShape();
      const int64_t shape[] = {1, stated.at(1), 0, stated.at(3)};
      cache_.push_back(Ort::Value::CreateTensor<float>(allocator, shape, 4));
    }
  }

  std::pair<const float*, size_t> run(int64_t* ids, size_t count, size_t before) {
    std::vector<int64_t> mask(before + count, 1), positions(count);
    for (size_t index = 0; index < count; ++index) {
      positions[index] = static_cast<int64_t>(before + index);
    }
    std::vector<Ort::Value> given;
    size_t cached = 0;
    for (const auto& name : inputs_) {
      if (begins(name, PAST)) {
        given.push_back(std::move(cache_[cached++]));
      } else if (name == "input_ids") {
        given.push_back(row(ids, count));
      } else if (name == "attention_mask") {
        given.push_back(row(mask.data(), mask.size()));
      } else if (name == "position_ids") {
        given.push_back(row(positions.data(), count));
      } else {
        afq::stop(afq::NOT_RUN, "an input that a decoder does not have: " + name);
      }
    }
    const auto in = pointers(inputs_), out = pointers(outputs_);
    auto results = session_.Run(Ort::RunOptions{nullptr}, in.data(), given.data(), in.size(), out.data(), out.size());
    logits_ = std::move(results.front());
    cache_.clear();
    std::move(results.begin() + 1, results.end(), std::back_inserter(cache_));
    const auto info = logits_.GetTensorTypeAndShapeInfo();
    const auto shape = info.GetShape();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || shape.size() != 3 || shape[0] != 1 ||
        shape[1] != static_cast<int64_t>(count)) {
      afq::stop(afq::NOT_RUN, "the model does not give float logits [1, tokens, vocabulary]");
    }
    return {logits_.GetTensorData<float>(), static_cast<size_t>(shape[2])};
  }

  void end_profile(const std::string& path) {
    Ort::AllocatorWithDefaultOptions allocator;
    const std::string made = session_.EndProfilingAllocated(allocator).get();
    if (std::rename(made.c_str(), path.c_str())) {
      afq::stop(afq::WRONG_INPUT, "cannot write " + path);
    }
  }

 private:
  static Ort::Value row(int64_t* values, size_t count) {
    const int64_t shape[] = {1, static_cast<int64_t>(count)};
    return Ort::Value::CreateTensor<int64_t>(memory(), values, count, shape, 2);
  }

  Ort::Session session_;
  std::vector<std::string> inputs_, outputs_;
  std::vector<Ort::Value> cache_;
  Ort::Value logits_{nullptr};
};

void run_product(Ort::Env& env, const Ort::SessionOptions& options, const std::string& model, int64_t rows,
                 std::vector<afq::Matrix>& inputs, afq::Output& out) {
  Ort::Session session(env, model.c_str(), options);
  const auto in = names_of(session, true), wanted = names_of(session, false);
  if (in.size() != inputs.size()) {
    afq::stop(afq::WRONG_INPUT, "not as many inputs as the model has");
  }
  std::vector<Ort::Value> given;
  for (auto& input : inputs) {
    const int64_t shape[] = {1, rows, input.columns};
    auto& values = input.values;
    given.push_back(Ort::Value::CreateTensor<float>(memory(), values.data(), values.size(), shape, 3));
  }
  const auto first = pointers(in), second = pointers(wanted);
  const auto results =
      session.Run(Ort::RunOptions{nullptr}, first.data(), given.data(), first.size(), second.data(), second.size());
  for (const auto& result : results) {
    const auto info = result.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      afq::stop(afq::NOT_RUN, "the model gives something else than float tensors");
    }
    out.write(result.GetTensorData<float>(), info.GetElementCount());
  }
}

}  // namespace

int main(int count, char** arguments) {
  const afq::Job job(count, arguments, "usage: onnx_runner JOB", {"level", "entry", "provider", "profile"});
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "afq");
  const auto options = options_of(job);
  afq::Timing timing;
  afq::Exit stage = afq::NOT_LOADED;
  try {
    if (job.has("matrices")) {
      afq::run_matrices(job, [&](const auto& model, int64_t rows, auto& inputs, auto& out) {
        run_product(env, options, model, rows, inputs, out);
      });
    } else {
      const auto begin = afq::Clock::now();
      Decoder decoder(env, job.file("model"), options);
      timing.load = afq::seconds_since(begin);
      stage = afq::NOT_RUN;
      const auto call = [&](int64_t* ids, size_t taken, size_t before) { return decoder.run(ids, taken, before); };
      afq::run_windows(job, call, [&] { decoder.restart(); }, timing);
      if (job.has("profile")) {
        decoder.end_profile(job.file("profile"));
      }
    }
  } catch (const Ort::Exception& error) {
    afq::stop(stage, error.what());
  }
  afq::answer(timing, Ort::GetVersionString());
  return 0;
}
