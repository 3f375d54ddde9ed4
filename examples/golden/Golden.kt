// Run the golden samples of a package, on Android or any JVM. With ONNX Runtime's Java interface and org.json.

package golden

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import org.json.JSONObject

/** One output of one sample: the largest difference that was found, and the largest that is allowed. */
data class Compared(val sample: Int, val output: String, val off: Float, val allowed: Float) {
    val good: Boolean get() = off <= allowed // false as well if it is no number
}

private val types = mapOf(
    "float32" to OnnxJavaType.FLOAT, "int64" to OnnxJavaType.INT64, "int32" to OnnxJavaType.INT32,
    "uint8" to OnnxJavaType.UINT8, "int8" to OnnxJavaType.INT8, "bool" to OnnxJavaType.BOOL
)

/** The raw bytes of a file, little-endian, in memory that ONNX Runtime reads directly. */
private fun bytesOf(file: File): ByteBuffer {
    val bytes = file.readBytes()
    val buffer = ByteBuffer.allocateDirect(bytes.size).order(ByteOrder.LITTLE_ENDIAN)
    buffer.put(bytes)
    buffer.rewind()
    return buffer
}

private fun shapeOf(entry: JSONObject): LongArray {
    val shape = entry.getJSONArray("shape")
    return LongArray(shape.length()) { shape.getLong(it) }
}

/** Run every sample of a package's folder. */
fun runGolden(folder: File): List<Compared> {
    val golden = File(folder, "golden")
    val index = JSONObject(File(golden, "golden.json").readText())
    check(index.getString("format") == "potstill-golden/1") { "golden.json has another form" }
    val environment = OrtEnvironment.getEnvironment()
    environment.createSession(File(folder, "model.onnx").path).use { session ->
        val samples = index.getJSONArray("samples")
        return (0 until samples.length()).flatMap { compare(environment, session, golden, samples.getJSONObject(it), it) }
    }
}

private fun compare(
    environment: OrtEnvironment, session: OrtSession, golden: File, sample: JSONObject, number: Int
): List<Compared> {
    val inputs = sample.getJSONObject("inputs")
    val feeds = inputs.keys().asSequence().map { it as String }.associateWith { name ->
        val entry = inputs.getJSONObject(name)
        val type = types.getValue(entry.getString("dtype"))
        OnnxTensor.createTensor(environment, bytesOf(File(golden, entry.getString("file"))), shapeOf(entry), type)
    }
    try {
        session.run(feeds).use { found ->
            val outputs = sample.getJSONObject("outputs")
            return outputs.keys().asSequence().map { it as String }.map { name ->
                val entry = outputs.getJSONObject(name)
                check(entry.getString("dtype") == "float32") { "this example compares outputs of float32" }
                val wanted = bytesOf(File(golden, entry.getString("file"))).asFloatBuffer()
                val tensor = found.get(name).get() as OnnxTensor
                check(tensor.info.shape.contentEquals(shapeOf(entry))) { "$name has another shape than expected" }
                val given = tensor.floatBuffer
                var worst = 0f
                for (i in 0 until wanted.remaining()) {
                    val off = abs(given.get(i) - wanted.get(i))
                    if (!(off <= worst)) worst = off // also if it is no number
                }
                Compared(number, name, worst, entry.getDouble("atol").toFloat())
            }.toList()
        }
    } finally {
        feeds.values.forEach { it.close() }
    }
}

fun main(words: Array<String>) {
    val found = runGolden(File(words.single()))
    for (one in found) println("${one.output}: ${one.off} off, ${one.allowed} allowed: ${if (one.good) "ok" else "WRONG"}")
    if (!found.all { it.good }) kotlin.system.exitProcess(1)
}
