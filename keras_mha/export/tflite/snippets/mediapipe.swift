// A sketch that was NOT RUN: no phone was at hand.
// Podfile: pod 'MediaPipeTasksText'

import Foundation
import MediaPipeTasksText

/// The score of each label for a text, by $file in the app's bundle.
func classify(_ text: String) throws -> [String: Float] {
  let path = Bundle.main.path(forResource: "$stem", ofType: "tflite")!
  let classifier = try TextClassifier(modelPath: path)
  let result = try classifier.classify(text: text)
  let categories = result.classificationResult.classifications[0].categories
  return Dictionary(uniqueKeysWithValues: categories.map { ($$0.categoryName ?? "", $$0.score) })
}
