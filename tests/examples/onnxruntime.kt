// ONNX Runtime's Java classes as far as Golden.kt uses them, with the same signatures (java/src/main/java/ai/onnxruntime),
// over a model that gives what it is told to: the raw outputs in the folder `answers`, one file for each run.

package ai.onnxruntime

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.util.Optional

enum class OnnxJavaType { FLOAT, DOUBLE, INT8, INT16, INT32, INT64, BOOL, STRING, UINT8, UNKNOWN }

interface OnnxTensorLike : AutoCloseable

interface OnnxValue : AutoCloseable

class TensorInfo(val shape: LongArray)

class OnnxTensor(val info: TensorInfo, private val data: ByteBuffer) : OnnxTensorLike, OnnxValue {
    val floatBuffer: FloatBuffer get() = data.duplicate().order(ByteOrder.nativeOrder()).asFloatBuffer()

    override fun close() = Unit

    companion object {
        @JvmStatic
        fun createTensor(env: OrtEnvironment, data: ByteBuffer, shape: LongArray, type: OnnxJavaType): OnnxTensor {
            val size = mapOf(OnnxJavaType.FLOAT to 4, OnnxJavaType.INT32 to 4, OnnxJavaType.INT64 to 8)[type] ?: 1
            require(shape.fold(1L) { all, one -> all * one } * size == data.remaining().toLong()) { "shape of $env" }
            return OnnxTensor(TensorInfo(shape), data)
        }
    }
}

class OrtEnvironment private constructor() {
    fun createSession(modelPath: String): OrtSession = OrtSession(File(modelPath))

    companion object {
        @JvmStatic
        fun getEnvironment() = OrtEnvironment()
    }
}

class OrtSession(private val model: File) : AutoCloseable {
    private var runs = 0

    fun run(inputs: Map<String, OnnxTensorLike>): Result {
        require(inputs.isNotEmpty() && model.isFile)
        val bytes = File("answers", "${runs++}.bin").readBytes()
        val shape = File("answers", "shape").readText().trim().split(" ").map { it.toLong() }.toLongArray()
        return Result(OnnxTensor(TensorInfo(shape), ByteBuffer.wrap(bytes)))
    }

    override fun close() = Unit

    class Result(private val value: OnnxValue) : AutoCloseable {
        fun get(key: String): Optional<OnnxValue> = Optional.of(value).filter { key.isNotEmpty() }

        override fun close() = Unit
    }
}
