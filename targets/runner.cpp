// Run ONNX models on a device that has no Python: `potstill-runner REQUEST.json` prints one line of JSON, its last.
//
// The same request and the same reply as those of agent.py, whose docstring says what is in them; where the two
// differ: the providers are the CPU's alone, and `provider_nodes` is null. The library is opened when it starts, from where
// the loader looks for it, so that this program is built without it. It is asked for the version of its
// interface that the headers have; later libraries keep the earlier ones (onnxruntime_c_api.h, OrtApiBase).

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>

#include "runner_machine.h"

using Clock = std::chrono::steady_clock;

constexpr int kProfiledRuns = 20;
const std::string kCpu = "CPUExecutionProvider";

void demand(const json& given, const std::vector<std::string>& keys, const std::string& what = "the request") {
  for (const auto& key : keys)
    if (!given.contains(key)) fail(what + " lacks '" + key + "'");
}

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// Tensors.

struct Dtype {
  const char* name;  // numpy's
  ONNXTensorElementDataType type;
  size_t size;
};

constexpr Dtype kDtypes[] = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},   {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8},
    {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}, {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1},
    {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},       {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1},
    {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2},     {"uint16", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, 2},
    {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},     {"uint32", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, 4},
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},     {"uint64", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, 8},
};

// The inputs of a run, with the memory that they lie in.
struct Feeds {
  std::vector<std::string> names;
  std::vector<const char*> pointers;
  std::vector<std::vector<char>> raw;
  std::vector<Ort::Value> values;

  // Add an array, whose bytes are the next of a raw little-endian file.
  void add(const std::string& name, const json& entry, std::istream& file, const std::string& whose) {
    const Dtype* found = nullptr;
    if (entry.contains("dtype") && entry.contains("shape"))
      for (const auto& dtype : kDtypes)
        if (entry["dtype"] == dtype.name) found = &dtype;
    const auto shape = found ? entry["shape"].get<std::vector<int64_t>>() : std::vector<int64_t>{-1};
    if (std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; }))
      fail(whose + " has an input that is no array of numbers: " + entry.dump());
    size_t bytes = found->size;
    for (int64_t size : shape) bytes *= static_cast<size_t>(size);
    raw.emplace_back(std::max<size_t>(bytes, 1));
    if (!file.read(raw.back().data(), static_cast<std::streamsize>(bytes))) fail("the inputs end within " + whose);
    names.push_back(name);
    auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    values.push_back(Ort::Value::CreateTensor(memory, raw.back().data(), bytes, shape.data(), shape.size(), found->type));
  }

  // The inputs that a session has, in its order; any more are left out.
  void keep(const std::vector<std::string>& wanted) {
    std::vector<Ort::Value> kept;
    for (const auto& name : wanted)
      kept.push_back(std::move(values[static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin())]));
    names = wanted;
    values = std::move(kept);
    point();
  }

  void point() {
    for (const auto& name : names) pointers.push_back(name.c_str());
  }
};

Feeds read_inputs(const json& spec) {
  Feeds feeds;
  for (const auto& [name, entry] : spec.at("inputs").items()) {
    const std::string path = entry.at("file");
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("cannot read " + path);
    feeds.add(name, entry, file, path);
    if (file.peek() != std::ifstream::traits_type::eof()) fail(path + " holds more than " + entry.dump());
  }
  feeds.point();
  return feeds;
}

// Sessions.

Ort::Env* env = nullptr;

struct Session {
  Ort::Session session{nullptr};
  std::vector<std::string> inputs, outputs;
  std::vector<const char*> wanted;  // all outputs

  // A session with the threads and options of the request; it writes a profile where a prefix for its file is given.
  explicit Session(const json& spec, const std::string& profile_prefix = "") {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(spec.at("threads"));
    options.SetInterOpNumThreads(1);
    options.SetLogSeverityLevel(3);
    if (!profile_prefix.empty()) {
      options.EnableProfiling(profile_prefix.c_str());
      options.DisableMemPattern();  // so that it counts memory node by node
      if (const std::string graph = spec.value("graph", ""); !graph.empty()) {
        options.SetOptimizedModelFilePath(graph.c_str());
        options.AddConfigEntry("session.optimized_model_external_initializers_file_name", "weights");
      }
    }
    for (const auto& [key, value] : spec.value("session_options", json::object()).items())
      options.AddConfigEntry(key.c_str(), value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
    session = Ort::Session(*env, spec.at("path").get<std::string>().c_str(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session.GetInputCount(); ++i)
      inputs.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    for (size_t i = 0; i < session.GetOutputCount(); ++i)
      outputs.emplace_back(session.GetOutputNameAllocated(i, allocator).get());
    for (const auto& name : outputs) wanted.push_back(name.c_str());
  }
  Session(const Session&) = delete;

  std::vector<Ort::Value> run(const Feeds& feeds) {
    return session.Run(Ort::RunOptions{nullptr}, feeds.pointers.data(), feeds.values.data(), feeds.values.size(),
                       wanted.data(), wanted.size());
  }
};

json used(const json& spec) {
  json missing = json::array();
  for (const auto& name : spec.value("providers", json::array({kCpu})))
    if (name != kCpu) missing.push_back(name);
  return {{"path", spec["path"]}, {"providers", {kCpu}}, {"missing_providers", missing}};
}

// Measuring.

bool finished(size_t rounds, double seconds, const json& spec) {
  if (spec.contains("runs") && !spec["runs"].is_null()) return rounds >= spec["runs"].get<size_t>();
  return rounds >= spec["max_runs"].get<size_t>() ||
         (rounds >= spec["min_runs"].get<size_t>() && seconds >= spec["seconds"].get<double>());
}

using Pairs = std::vector<std::pair<Session*, const Feeds*>>;

// Milliseconds of the run alone, round after round. Where models take turns, each turn starts with untimed runs
// for 5 ms, since the model before it has filled the CPU's caches; agent.py has the measurement.
std::vector<std::vector<double>> time_in_turns(const Pairs& pairs, const json& spec) {
  for (int i = 0; i < spec["warmup"]; ++i)
    for (const auto& [session, feeds] : pairs) session->run(*feeds);
  std::vector<std::vector<double>> times(pairs.size());
  const auto start = Clock::now();
  while (!finished(times[0].size(), ms_since(start) / 1000, spec)) {
    for (size_t i = 0; i < pairs.size(); ++i) {
      const auto& [session, feeds] = pairs[i];
      if (pairs.size() > 1) {
        const auto turn = Clock::now();
        do session->run(*feeds);
        while (ms_since(turn) < 5);
      }
      const auto begin = Clock::now();
      session->run(*feeds);
      times[i].push_back(ms_since(begin));
    }
  }
  return times;
}

json time_one(const json& spec) {
  const double baseline = status_mb("VmRSS").value_or(peak_mb(false).first);
  const bool dropped = drop_from_page_cache(spec.at("path").get<std::string>());
  const Feeds feeds = read_inputs(spec);
  const bool reset = reset_peak();
  auto begin = Clock::now();
  Session session(spec);
  const double load_ms = ms_since(begin);
  begin = Clock::now();
  session.run(feeds);
  const double first_ms = ms_since(begin);
  const json before = sensors();
  const auto times = time_in_turns({{&session, &feeds}}, spec)[0];
  const json after = sensors();
  const auto [peak, method] = peak_mb(reset);
  json result = used(spec);
  result.update({{"load_ms", load_ms},
                 {"page_cache_dropped", dropped},
                 {"first_run_ms", first_ms},
                 {"times_ms", times},
                 {"baseline_mb", baseline},
                 {"peak_memory_mb", std::max(peak - baseline, 0.0)},
                 {"memory_method", method},
                 {"sensors", {{"before", before}, {"after", after}}},
                 {"energy_uj", nullptr}});
  return result;
}

// The q-th quantile, q in [0, 1], linear between neighbours.
double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  const double place = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<size_t>(place);
  const auto high = std::min(low + 1, values.size() - 1);
  return values[low] + (values[high] - values[low]) * (place - static_cast<double>(low));
}

// Run without a pause: of each second the runs, their median and 90th percentile, and the temperature at its end. Each
// is told as it ends, too.
json under_load(const json& spec) {
  Session session(spec);
  const Feeds feeds = read_inputs(spec);
  json seconds = json::array();
  const auto start = Clock::now();
  while (seconds.size() < spec["sustained"].get<double>()) {
    std::vector<double> times;
    while (times.empty() || ms_since(start) < 1000 * static_cast<double>(seconds.size() + 1)) {
      const auto begin = Clock::now();
      session.run(feeds);
      times.push_back(ms_since(begin));
    }
    json second = {{"at_s", ms_since(start) / 1000},
                   {"runs", times.size()},
                   {"median_ms", quantile(times, 0.5)},
                   {"p90_ms", quantile(times, 0.9)}};
    second.update(sensors());
    seconds.push_back(second);
    std::cout << json{{"second", second}}.dump() << std::endl;
  }
  json result = used(spec);
  result["seconds"] = seconds;
  return result;
}

double runs_per_second(const json& spec) {
  Session session(spec);
  const Feeds feeds = read_inputs(spec);
  for (int i = 0; i < spec["warmup"]; ++i) session.run(feeds);
  int runs = 0;
  const auto start = Clock::now();
  for (; ms_since(start) < 1000; ++runs) session.run(feeds);
  return runs / (ms_since(start) / 1000);
}

// ONNX Runtime's own profile of a second session, since profiling slows a small model down.
void profile(const json& spec) {
  const Feeds feeds = read_inputs(spec);
  const std::string made = spec["operators"];
  Session session(spec, made + ".ort");
  for (int i = 0; i <= kProfiledRuns; ++i) session.run(feeds);
  Ort::AllocatorWithDefaultOptions allocator;
  fs::rename(session.session.EndProfilingAllocated(allocator).get(), made);
}

json measure(const json& spec) {
  if (spec.value("sustained", 0.0) > 0) return under_load(spec);
  json result = time_one(spec);
  if (spec.contains("throughput") && !spec["throughput"].empty()) {
    json found = json::object();
    for (int threads : spec["throughput"]) {
      json one = spec;
      one["threads"] = threads;
      found[std::to_string(threads)] = runs_per_second(one);
    }
    result["throughput"] = found;
  }
  if (spec.contains("operators") && !spec["operators"].is_null()) {
    profile(spec);
    result["provider_nodes"] = nullptr;
  }
  return result;
}

json take_turns(const std::vector<json>& specs) {
  std::vector<std::unique_ptr<Session>> sessions;
  std::vector<Feeds> feeds;
  for (const auto& spec : specs) {
    sessions.push_back(std::make_unique<Session>(spec));
    feeds.push_back(read_inputs(spec));
  }
  Pairs pairs;
  for (size_t i = 0; i < specs.size(); ++i) pairs.emplace_back(sessions[i].get(), &feeds[i]);
  const auto times = time_in_turns(pairs, specs[0]);
  json results = json::array();
  for (size_t i = 0; i < specs.size(); ++i) {
    results.push_back(used(specs[i]));
    results.back()["times_ms"] = times[i];
  }
  return results;
}

json measured(const json& request) {
  demand(request, {"models", "threads", "warmup"});
  if (!request.contains("runs") &&
      !(request.contains("seconds") && request.contains("min_runs") && request.contains("max_runs")))
    fail("the request lacks 'runs', or 'seconds' with 'min_runs' and 'max_runs'");
  std::vector<json> specs;
  for (const auto& model : request["models"]) {
    specs.push_back(request);
    specs.back().update(model);
  }
  const json results = specs.size() == 1 ? json::array({measure(specs[0])}) : take_turns(specs);
  return {{"warmup", request["warmup"]}, {"models", results}};
}

// Answers: each example alone, its first output into a file.

json answered(const json& request) {
  demand(request, {"threads"});
  const json& wanted = request["answer"];
  demand(wanted, {"path", "examples", "inputs", "outputs"}, "the answer asked for");
  const std::string into = wanted["outputs"], from = wanted["inputs"];
  if (fs::exists(fs::symlink_status(into))) fail(into + " is there already; outputs go into a new file");
  json spec = request;
  spec.update(wanted);
  Session session(spec);
  std::ifstream given(from, std::ios::binary);
  std::ofstream file(into, std::ios::binary);
  if (!given || !file) fail("cannot open " + (given ? into : from));
  json outputs = json::array();
  const auto start = Clock::now();
  const double limit_ms = wanted.contains("seconds") ? 1000 * wanted["seconds"].get<double>() : HUGE_VAL;
  for (const auto& entries : wanted["examples"]) {
    const std::string whose = "example " + std::to_string(outputs.size() + 1);
    demand(entries, session.inputs, whose);
    Feeds feeds;
    for (const auto& [name, entry] : entries.items()) feeds.add(name, entry, given, whose);
    feeds.keep(session.inputs);
    const auto values = session.run(feeds);
    const Dtype* found = nullptr;
    if (values[0].IsTensor())
      for (const auto& dtype : kDtypes)
        if (values[0].GetTensorTypeAndShapeInfo().GetElementType() == dtype.type) found = &dtype;
    if (!found) fail("the model's first output is no array of numbers");
    const auto shape = values[0].GetTensorTypeAndShapeInfo();
    file.write(values[0].GetTensorData<char>(), static_cast<std::streamsize>(shape.GetElementCount() * found->size));
    outputs.push_back({{"dtype", found->name}, {"shape", shape.GetShape()}});
    if (ms_since(start) >= limit_ms) break;
  }
  if (limit_ms == HUGE_VAL && given.peek() != std::ifstream::traits_type::eof())
    fail(from + " holds more than its " + std::to_string(outputs.size()) + " examples");
  if (!file.flush()) fail("cannot write " + into);
  json answer = used(spec);
  answer["outputs"] = outputs;
  return {{"answer", answer}};
}

// The version of the library, once it is open.
std::string open_library() {
  setenv("ORT_DISABLE_TELEMETRY", "1", 1);
  void* library = dlopen("libonnxruntime.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(dlerror());
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"))();
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) fail("this library lacks version " + std::to_string(ORT_API_VERSION) + " of its interface");
  Ort::InitApi(api);
  return base->GetVersionString();
}

int main(int argc, char** argv) try {
  if (argc != 2) fail("give one request, a file of JSON");
  std::ifstream file(argv[1]);
  const json request = json::parse(file);
  const std::string version = open_library();
  Ort::Env here(ORT_LOGGING_LEVEL_ERROR, "potstill");
  env = &here;
  if (request.contains("cores") && !request["cores"].empty()) keep_to(request["cores"]);
  json reply = request.contains("answer") ? answered(request) : measured(request);
  reply.update({{"machine", machine()}, {"threads", request["threads"]}, {"versions", {{"onnxruntime", version}}}});
  std::cout << "\n" << reply.dump() << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "agent: " << error.what() << std::endl;
  return dynamic_cast<const Cannot*>(&error) ? 2 : 1;
}
