// What an app's test does with Golden.swift: a line for each output, and 1 if one is off.

import Foundation

do {
    let found = try runGolden(URL(fileURLWithPath: CommandLine.arguments[1]))
    for one in found {
        print("\(one.output): \(one.off) off, \(one.allowed) allowed: \(one.good ? "ok" : "WRONG")")
    }
    exit(found.allSatisfy(\.good) ? 0 : 1)
} catch {
    FileHandle.standardError.write(Data("\(error)\n".utf8))
    exit(2)
}
