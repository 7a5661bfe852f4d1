// What both runners share: the job they are given, and what they answer. The same in onnx_runner.py.
//
//   RUNNER JOB
//
// JOB is a text file with one `key value` per line; other files are relative to the folder that it lies in.
//
//   model FILE      the program                              windows N, tokens T   shape of `ids`
//   ids FILE        int64 [N, T]                             prompt P              tokens before single steps (1 to T)
//   threads COUNT   0: as the runtime likes                  call C                most tokens of one call
//   logits FILE     written: float32 [N, T, V]               losses FILE           written: float64 [N, T - 1]
//   choices FILE    written: int32 [N, T - 1]
//
// Every window starts at position 0. Its first P tokens go in calls of C tokens (prefill), each other one in a call of
// its own (decode). Losses are -log p of the token that follows, in nats; choices are the likeliest tokens.
//
//   matrices FILE   in place of `ids` and what belongs to it: one line per program,
//                   `MODEL OUT ROWS FILE COLUMNS [FILE COLUMNS]...`; each FILE is an input, float32 [ROWS, COLUMNS],
//                   OUT gets the outputs, float32, one after the other.
//
// All arrays are raw and little-endian. Standard output: one JSON object with `load` (seconds), `prefill` and `decode`
// (seconds of every window, without losses and files), `memory` (peak, MiB) and `code`: [file, start, end] of every
// executable mapping, so that what an emulator translates can be told apart by library.
// Exit codes: 2 wrong job or files, 3 the program does not load, 4 it does not run.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace afq {

enum Exit { WRONG_INPUT = 2, NOT_LOADED = 3, NOT_RUN = 4 };

[[noreturn]] inline void stop(Exit code, const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(code);
}

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
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

// A file that is written, or nothing where none is asked for.
class Output {
 public:
  explicit Output(std::string path) : path_(std::move(path)) {
    if (!path_.empty()) {
      file_.open(path_, std::ios::binary);
    }
  }

  explicit operator bool() const {
    return !path_.empty();
  }

  template <typename T>
  void write(const T* values, size_t count) {
    if (!path_.empty()) {
      file_.write(reinterpret_cast<const char*>(values), static_cast<std::streamsize>(count * sizeof(T)));
    }
  }

  void close() {
    if (path_.empty()) {
      return;
    }
    file_.close();
    if (!file_) {
      stop(WRONG_INPUT, "cannot write " + path_);
    }
  }

 private:
  std::string path_;
  std::ofstream file_;
};

class Job {
 public:
  Job(int count, char** arguments, const char* usage, std::set<std::string> known) {
    if (count != 2) {
      stop(WRONG_INPUT, usage);
    }
    const std::string path(arguments[1]);
    const auto slash = path.rfind('/');
    folder_ = slash == std::string::npos ? "" : path.substr(0, slash + 1);
    known.insert({"model", "ids", "windows", "tokens", "prompt", "call", "threads", "logits", "losses", "choices"});
    known.insert("matrices");
    std::ifstream file(path);
    if (!file) {
      stop(WRONG_INPUT, "cannot read " + path);
    }
    for (std::string line; std::getline(file, line);) {
      const auto blank = line.find(' ');
      const std::string key = line.substr(0, blank);
      if (blank == std::string::npos || !known.count(key)) {
        stop(WRONG_INPUT, "not a line of a job: " + line);
      }
      values_[key].push_back(line.substr(blank + 1));
    }
  }

  bool has(const std::string& key) const {
    return values_.count(key) != 0;
  }

  std::vector<std::string> all(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? std::vector<std::string>{} : found->second;
  }

  std::string text(const std::string& key) const {
    if (!has(key)) {
      stop(WRONG_INPUT, "the job has no " + key);
    }
    return values_.at(key).front();
  }

  std::string file(const std::string& key) const {
    return folder_ + text(key);
  }

  // Where output goes, empty when it is not wanted.
  std::string wanted(const std::string& key) const {
    return has(key) ? file(key) : "";
  }

  const std::string& folder() const {
    return folder_;
  }

  size_t number(const std::string& key, size_t least) const {
    char* end = nullptr;
    const std::string said = text(key);
    const auto value = std::strtoull(said.c_str(), &end, 10);
    if (*end || value < least) {
      stop(WRONG_INPUT, key + " is a number from " + std::to_string(least));
    }
    return value;
  }

 private:
  std::string folder_;
  std::map<std::string, std::vector<std::string>> values_;
};

// Losses and choices of rows that are seen one after the other; a row says something of the token after it.
class Scores {
 public:
  Scores(const std::string& losses, const std::string& choices) : losses_(losses), choices_(choices) {}

  void add(const float* row, size_t vocabulary, int64_t next) {
    if (!losses_ && !choices_) {
      return;
    }
    if (next < 0 || static_cast<size_t>(next) >= vocabulary) {
      stop(WRONG_INPUT, "a token id is outside the vocabulary");
    }
    const float* best = std::max_element(row, row + vocabulary);
    double sum = 0;
    for (size_t index = 0; index < vocabulary; ++index) {
      sum += std::exp(static_cast<double>(row[index]) - *best);
    }
    const double loss = std::log(sum) + *best - row[next];
    const int32_t choice = static_cast<int32_t>(best - row);
    losses_.write(&loss, 1);
    choices_.write(&choice, 1);
  }

  void close() {
    losses_.close();
    choices_.close();
  }

 private:
  Output losses_, choices_;
};

struct Timing {
  double load = 0;
  std::vector<double> prefill, decode;
};

// One call of a program: ids, how many, how many came before. Gives float32 logits [count, vocabulary], which stay
// valid until the next call.
using Call = std::function<std::pair<const float*, size_t>(int64_t* ids, size_t count, size_t position)>;

inline void run_windows(const Job& job, const Call& call, const std::function<void()>& restart, Timing& timing) {
  const size_t windows = job.number("windows", 1), tokens = job.number("tokens", 1);
  const size_t prompt = job.number("prompt", 1), longest = job.number("call", 1);
  if (prompt > tokens) {
    stop(WRONG_INPUT, "the prompt is longer than the window");
  }
  auto ids = read_values<int64_t>(job.file("ids"), windows * tokens);
  Output logits(job.wanted("logits"));
  Scores scores(job.wanted("losses"), job.wanted("choices"));
  for (size_t window = 0; window < windows; ++window) {
    int64_t* own = &ids[window * tokens];
    double seconds[2] = {0, 0};
    restart();
    for (size_t start = 0, count = 0; start < tokens; start += count) {
      const bool decoding = start >= prompt;
      count = decoding ? 1 : std::min(longest, prompt - start);
      const auto begin = Clock::now();
      const auto [rows, vocabulary] = call(own + start, count, start);
      seconds[decoding] += seconds_since(begin);
      logits.write(rows, count * vocabulary);
      for (size_t row = 0; row < count && start + row + 1 < tokens; ++row) {
        scores.add(rows + row * vocabulary, vocabulary, own[start + row + 1]);
      }
    }
    timing.prefill.push_back(seconds[0]);
    timing.decode.push_back(seconds[1]);
  }
  logits.close();
  scores.close();
}

struct Matrix {
  std::string path;
  int64_t columns = 0;
  std::vector<float> values;
};

// Runs a program on matrices [rows, columns] and writes its outputs.
using Product = std::function<void(const std::string& model, int64_t rows, std::vector<Matrix>& inputs, Output& out)>;

inline void run_matrices(const Job& job, const Product& run) {
  std::ifstream list(job.file("matrices"));
  if (!list) {
    stop(WRONG_INPUT, "cannot read " + job.file("matrices"));
  }
  for (std::string line; std::getline(list, line);) {
    std::istringstream words(line);
    std::string model, result;
    int64_t rows = 0;
    if (!(words >> model >> result >> rows) || rows < 1) {
      stop(WRONG_INPUT, "not a line of programs: " + line);
    }
    std::vector<Matrix> inputs;
    for (Matrix one; words >> one.path >> one.columns;) {
      one.values = read_values<float>(job.folder() + one.path, static_cast<size_t>(rows * one.columns));
      inputs.push_back(std::move(one));
      one = Matrix();
    }
    Output out(job.folder() + result);
    run(job.folder() + model, rows, inputs, out);
    out.close();
  }
}

inline void print_list(const char* name, const std::vector<double>& values) {
  std::printf("\"%s\": [", name);
  for (size_t index = 0; index < values.size(); ++index) {
    std::printf("%s%.6f", index ? ", " : "", values[index]);
  }
  std::printf("], ");
}

// Addresses are those that an emulator's log of instructions has.
inline void print_code() {
  std::ifstream maps("/proc/self/maps");
  const char* comma = "";
  std::printf("\"code\": [");
  for (std::string line; std::getline(maps, line);) {
    unsigned long long start = 0, end = 0;
    char mode[8] = {}, path[4096] = {};
    const int found = std::sscanf(line.c_str(), "%llx-%llx %7s %*s %*s %*s %4095s", &start, &end, mode, path);
    if (found != 4 || mode[2] != 'x' || path[0] != '/') {
      continue;
    }
    const std::string whole(path);
    std::printf("%s[\"%s\", %llu, %llu]", comma, whole.substr(whole.rfind('/') + 1).c_str(), start, end);
    comma = ", ";
  }
  std::printf("]");
}

inline void answer(const Timing& timing, const std::string& version) {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  std::printf("{\"version\": \"%s\", \"load\": %.6f, ", version.c_str(), timing.load);
  print_list("prefill", timing.prefill);
  print_list("decode", timing.decode);
  std::printf("\"memory\": %.1f, ", static_cast<double>(used.ru_maxrss) / 1024.0);
  print_code();
  std::printf("}\n");
}

}  // namespace afq
