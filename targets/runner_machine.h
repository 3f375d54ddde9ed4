// The machine that the runner runs on, and its memory: what Linux says of them, and null where it does not.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;  // arrays lie in a file in the order in which the request lists them

[[noreturn]] inline void fail(const std::string& words) { throw std::runtime_error(words); }

inline std::optional<std::string> read_text(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  if (!file || !std::getline(file, line)) return {};
  return line;
}

inline json number_in(const fs::path& path) {
  try {
    return std::stod(read_text(path).value_or(""));
  } catch (const std::exception&) {
    return nullptr;
  }
}

// The value of a line "name : value" of a file of the system.
inline std::optional<std::string> field(const char* path, const std::vector<std::string>& names) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    for (const auto& name : names)
      if (line.rfind(name, 0) == 0 && line.find(':') != std::string::npos) {
        const auto start = line.find_first_not_of(" \t", line.find(':') + 1);
        return start == std::string::npos ? "" : line.substr(start);
      }
  return {};
}

inline json machine() {
  utsname names{};
  uname(&names);
  return {{"system", names.sysname},
          {"arch", names.machine},
          {"cpu", field("/proc/cpuinfo", {"model name", "Hardware"}).value_or("unknown")},
          {"cores", sysconf(_SC_NPROCESSORS_ONLN)}};
}

inline json sensors() {
  json hottest = nullptr;
  std::error_code none;
  for (const auto& zone : fs::directory_iterator("/sys/class/thermal", none)) {
    if (zone.path().filename().string().rfind("thermal_zone", 0) != 0) continue;
    const json read = number_in(zone.path() / "temp");
    if (read.is_number() && read > 0 && (hottest.is_null() || read.get<double>() / 1000 > hottest))
      hottest = read.get<double>() / 1000;
  }
  const auto governor = read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
  return {{"temperature_c", hottest}, {"governor", governor ? json(*governor) : json(nullptr)}};
}

inline std::optional<double> status_mb(const std::string& name) {
  const auto value = field("/proc/self/status", {name + ":"});
  return value ? std::optional(std::stod(*value) * 1024 / 1e6) : std::nullopt;
}

// Set the peak of resident memory back to the present (proc(5), clear_refs); false where that is forbidden.
inline bool reset_peak() {
  std::ofstream file("/proc/self/clear_refs");
  return file && file << "5" && file.flush();
}

inline std::pair<double, std::string> peak_mb(bool reset) {
  const auto peak = status_mb("VmHWM");
  if (peak && reset) return {*peak, "VmHWM since the load"};
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return {static_cast<double>(usage.ru_maxrss) * 1024 / 1e6, "ru_maxrss since the start"};
}

// Ask the system to forget the model's files, so that loading reads them again.
inline bool drop_from_page_cache(const fs::path& model) {
  const auto folder = model.has_parent_path() ? model.parent_path() : fs::path(".");
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().filename().string().rfind(model.filename().string(), 0) != 0) continue;
    const int handle = open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
    if (handle < 0) return false;
    fsync(handle);  // pages not yet written stay
    posix_fadvise(handle, 0, 0, POSIX_FADV_DONTNEED);
    close(handle);
  }
  return true;
}

// What is thrown where this machine cannot do what was asked.
struct Cannot : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void keep_to(const std::vector<int>& cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int core : cores) CPU_SET(core, &set);
  if (sched_setaffinity(0, sizeof set, &set) != 0) throw Cannot("there are no cores " + json(cores).dump() + " here");
}
