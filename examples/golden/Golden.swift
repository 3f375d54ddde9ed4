// Run the golden samples of a package, on iOS or macOS. With ONNX Runtime's Objective-C interface.

import Foundation
import OnnxRuntimeBindings

/// One output of one sample: the largest difference that was found, and the largest that is allowed.
struct Compared {
    let sample: Int
    let output: String
    let off: Float
    let allowed: Float
    var good: Bool { off <= allowed }  // false as well if it is no number
}

struct GoldenError: Error, CustomStringConvertible {
    let description: String
}

private struct Tensor: Decodable {
    let file: String
    let dtype: String
    let shape: [Int]
    let atol: Float?
}

private struct Sample: Decodable {
    let inputs: [String: Tensor]
    let outputs: [String: Tensor]
}

private struct Index: Decodable {
    let format: String
    let samples: [Sample]
}

private let types: [String: ORTTensorElementDataType] = [
    "float32": .float, "int64": .int64, "int32": .int32, "uint8": .uInt8, "int8": .int8,
]

/// The numbers of a raw little-endian file or tensor of float32.
private func floats(_ data: Data) -> [Float] {
    var found = [Float](repeating: 0, count: data.count / MemoryLayout<Float>.size)
    _ = found.withUnsafeMutableBytes { data.copyBytes(to: $0) }
    return found
}

/// Run every sample of a package's folder.
func runGolden(_ folder: URL) throws -> [Compared] {
    let golden = folder.appendingPathComponent("golden")
    let index = try JSONDecoder().decode(
        Index.self, from: Data(contentsOf: golden.appendingPathComponent("golden.json")))
    guard index.format == "potstill-golden/1" else {
        throw GoldenError(description: "golden.json has another form: \(index.format)")
    }
    let environment = try ORTEnv(loggingLevel: .warning)
    let model = folder.appendingPathComponent("model.onnx").path
    let session = try ORTSession(env: environment, modelPath: model, sessionOptions: nil)
    return try index.samples.enumerated().flatMap { number, sample in
        try compare(session, golden, sample, number)
    }
}

private func compare(_ session: ORTSession, _ golden: URL, _ sample: Sample, _ number: Int) throws -> [Compared] {
    var feeds: [String: ORTValue] = [:]
    for (name, tensor) in sample.inputs {
        guard let type = types[tensor.dtype] else { throw GoldenError(description: "an input of \(tensor.dtype)") }
        let data = try Data(contentsOf: golden.appendingPathComponent(tensor.file))
        feeds[name] = try ORTValue(
            tensorData: NSMutableData(data: data), elementType: type, shape: tensor.shape.map { NSNumber(value: $0) })
    }
    let found = try session.run(withInputs: feeds, outputNames: Set(sample.outputs.keys), runOptions: nil)
    return try sample.outputs.map { name, tensor in
        guard tensor.dtype == "float32", let value = found[name], let atol = tensor.atol else {
            throw GoldenError(description: "\(name): this example compares outputs of float32")
        }
        let wanted = floats(try Data(contentsOf: golden.appendingPathComponent(tensor.file)))
        let given = floats(Data(referencing: try value.tensorData()))
        let shape = try value.tensorTypeAndShapeInfo().shape.map { $0.intValue }
        guard shape == tensor.shape, given.count == wanted.count else {
            throw GoldenError(description: "\(name) has another shape than expected: \(shape)")
        }
        var worst: Float = 0
        for (one, other) in zip(given, wanted) {
            let off = abs(one - other)
            if !(off <= worst) { worst = off }  // also if it is no number
        }
        return Compared(sample: number, output: name, off: worst, allowed: atol)
    }
}
