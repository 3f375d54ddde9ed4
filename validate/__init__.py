"""How a model is judged: task, data, predictions, scorecard, gate. Knows no other folder."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by onnxruntime when it is imported
