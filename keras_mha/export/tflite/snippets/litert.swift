// A sketch that was NOT RUN: no phone was at hand. The file itself was, in LiteRT on
// the CPU, and its values were compared with the model's.
// Podfile: pod 'TensorFlowLiteSwift'

import Foundation
import TensorFlowLite

/// Runs $file on $rows row(s) of $length ids, padded with 0.
func run(ids: [Int32]) throws -> [Float32] {
  precondition(ids.count == $rows * $length)
  let path = Bundle.main.path(forResource: "$stem", ofType: "tflite")!
  let interpreter = try Interpreter(modelPath: path)
  try interpreter.allocateTensors()
  try interpreter.copy(ids.withUnsafeBytes { Data($$0) }, toInputAt: 0)
  try interpreter.invoke()
  // "$output" of shape ($shape)
  return try interpreter.output(at: 0).data.withUnsafeBytes {
    Array($$0.bindMemory(to: Float32.self))
  }
}
