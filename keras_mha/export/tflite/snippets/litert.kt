// A sketch that was NOT RUN: no phone was at hand. The file itself was, in LiteRT on
// the CPU, and its values were compared with the model's.
// build.gradle: implementation("com.google.ai.edge.litert:litert:2.1.6")

import java.nio.ByteBuffer
import java.nio.FloatBuffer
import org.tensorflow.lite.Interpreter

/** Runs $file on $rows row(s) of $length ids, padded with 0. */
fun run(model: ByteBuffer, ids: Array<IntArray>): FloatArray {
    require(ids.size == $rows && ids.all { it.size == $length })
    val answer = FloatBuffer.allocate($count) // of shape ($shape)
    Interpreter(model).use { interpreter ->
        interpreter.runSignature(
            mapOf<String, Any>("$input" to ids),
            mapOf<String, Any>("$output" to answer),
            "$signature",
        )
    }
    return answer.array()
}
