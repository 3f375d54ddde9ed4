"""A checkpoint becomes an ONNX package for one target."""
