"""A checkpoint becomes an ONNX package for one target."""

import potstill.validate  # noqa: F401 - switches onnxruntime's telemetry off before anything imports it
