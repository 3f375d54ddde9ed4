// Run the golden samples of a package: `golden PACKAGE`. With ONNX Runtime's C++ interface and JSON for Modern C++.

#include <onnxruntime_cxx_api.h>

#include <cmath>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

using nlohmann::json;

// The raw bytes of a file; golden samples are little-endian, as phones, laptops and browsers are.
std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// numpy's name of a type, as ONNX Runtime knows it.
ONNXTensorElementDataType type_of(const std::string& dtype) {
  static const std::map<std::string, ONNXTensorElementDataType> types = {
      {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}, {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
      {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},   {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
      {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},   {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL}};
  return types.at(dtype);
}

// The largest difference between a sample's outputs and what the model gives here, and whether all are within `atol`.
bool holds(Ort::Session& session, const std::string& golden, const json& sample) {
  Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
  std::vector<std::vector<char>> kept;  // the tensors do not own their bytes
  std::vector<const char*> names, outputs;
  std::vector<Ort::Value> feeds;
  for (const auto& [name, entry] : sample["inputs"].items()) {
    auto shape = entry["shape"].get<std::vector<int64_t>>();
    auto& bytes = kept.emplace_back(bytes_of(golden + "/" + entry["file"].get<std::string>()));
    names.push_back(name.c_str());
    feeds.push_back(Ort::Value::CreateTensor(memory, bytes.data(), bytes.size(), shape.data(), shape.size(),
                                             type_of(entry["dtype"])));
  }
  for (const auto& [name, entry] : sample["outputs"].items()) outputs.push_back(name.c_str());
  auto found = session.Run({}, names.data(), feeds.data(), feeds.size(), outputs.data(), outputs.size());

  bool within = true;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const json& entry = sample["outputs"][outputs[i]];
    if (entry["dtype"] != "float32") throw std::runtime_error("this example compares outputs of float32");
    auto bytes = bytes_of(golden + "/" + entry["file"].get<std::string>());
    const auto* wanted = reinterpret_cast<const float*>(bytes.data());
    auto shape = found[i].GetTensorTypeAndShapeInfo();
    if (shape.GetShape() != entry["shape"].get<std::vector<int64_t>>() ||
        shape.GetElementType() != type_of(entry["dtype"]) || bytes.size() != shape.GetElementCount() * sizeof(float))
      throw std::runtime_error(std::string(outputs[i]) + " has another shape or type than expected");
    const float* given = found[i].GetTensorData<float>();
    float worst = 0;
    for (size_t j = 0; j < shape.GetElementCount(); ++j) {
      float off = std::abs(given[j] - wanted[j]);
      if (!(off <= worst)) worst = off;  // also if it is no number
    }
    bool good = worst <= entry["atol"].get<float>();
    std::cout << outputs[i] << ": " << worst << " off, " << entry["atol"] << " allowed: " << (good ? "ok" : "WRONG")
              << "\n";
    within = within && good;
  }
  return within;
}

int main(int count, char** words) try {
  if (count != 2) throw std::runtime_error("usage: golden PACKAGE");
  const std::string package = words[1], golden = package + "/golden";
  const json index = json::parse(std::ifstream(golden + "/golden.json"));
  if (index["format"] != "potstill-golden/1") throw std::runtime_error("golden.json has another form");
  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "golden");
  Ort::Session session(environment, (package + "/model.onnx").c_str(), Ort::SessionOptions{});
  bool all = true;
  for (const auto& sample : index["samples"]) all = holds(session, golden, sample) && all;
  return all ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 2;
}
