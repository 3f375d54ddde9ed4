"""onnxruntime in a loop, nothing of ours: `bare_loop.py MODEL INPUTS.npz RUNS` prints the median in ms; 1 thread."""

import os
import statistics
import sys
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed, times = dict(np.load(sys.argv[2])), []
for _ in range(10):
    session.run(None, feed)
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    session.run(None, feed)
    times.append((time.perf_counter() - start) * 1e3)
print(statistics.median(times))
