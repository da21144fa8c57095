// A sketch that was NOT RUN: no phone was at hand. The file itself was, in LiteRT on
// the CPU, and its values were compared with the model's.
// build.gradle: implementation("com.google.ai.edge.litert:litert:2.1.6")

import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import org.tensorflow.lite.Interpreter

/**
 * Runs $file. Numbers go row by row.
 * It takes: $takes.
 * It gives: $gives.
 */
fun run(model: ByteBuffer, inputs: Map<String, Buffer>): Map<String, Any> {
    val counts = mapOf($counts)
    require(counts.all { (name, count) -> inputs[name]?.remaining() == count })
    val answers = mapOf<String, Any>($answers)
    Interpreter(model).use { it.runSignature(inputs, answers, "$signature") }
    return answers
}
