"""A model file in ONNX Runtime, which warns of nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CPU = "CPUExecutionProvider"
QUIET = 3  # of errors alone


def open_session(
    path: Path | bytes, entries: Mapping[str, str] | None = None, *, providers: Sequence[str] = (CPU,), **settings: Any
) -> Any:
    """An `InferenceSession` of a file.

    Args:
        path: the `.onnx` or `.ort` file, or what it holds.
        entries: the session's options by key, as a target's `session_options`.
        providers: execution providers, the first first.
        settings: other attributes of `SessionOptions` by name; `disabled_optimizers` goes to the session.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    disabled = settings.pop("disabled_optimizers", None)
    for name, value in settings.items():
        setattr(options, name, value)
    for key, entry in (entries or {}).items():
        options.add_session_config_entry(key, entry)
    return onnxruntime.InferenceSession(
        path if isinstance(path, bytes) else str(path),
        options,
        providers=list(providers),
        disabled_optimizers=disabled or [],
    )
