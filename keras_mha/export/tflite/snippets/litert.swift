// A sketch that was NOT RUN: no phone was at hand. The file itself was, in LiteRT on
// the CPU, and its values were compared with the model's.
// Podfile: pod 'TensorFlowLiteSwift'

import Foundation
import TensorFlowLite

/// Runs $file. Numbers go row by row, as their bytes.
/// It takes: $takes.
/// It gives: $gives.
func run(_ inputs: [String: Data]) throws -> [String: Data] {
  let sizes = [$sizes]
  precondition(sizes.allSatisfy { inputs[$$0.key]?.count == $$0.value })
  let path = Bundle.main.path(forResource: "$stem", ofType: "tflite")!
  let interpreter = try Interpreter(modelPath: path)
  let runner = try interpreter.signatureRunner(with: "$signature")
  try runner.allocateTensors()
  for (name, bytes) in inputs { try runner.copy(bytes, toInputNamed: name) }
  try runner.invoke()
  return try Dictionary(
    uniqueKeysWithValues: [$outputs].map { ($$0, try runner.output(named: $$0).data) })
}
