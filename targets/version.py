"""Whether the runtime that a device has is as new as a target asks for."""

from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

from potstill.targets.target import Target
from potstill.validate.errors import InputError


def check_version(target: Target, versions: Mapping[str, str]) -> list[str]:
    """Hold the version that a device says against `runtime.min_version`; a warning where it is older, or not told.

    Args:
        target: that says the oldest version, and whether an older one is an error (`runtime.older`).
        versions: of the agent's reply.

    Raises:
        InputError: it is older, and the target calls that an error.
    """
    oldest, there = target.runtime.min_version, versions.get("onnxruntime") or versions.get("onnxruntime-web")
    if oldest is None:
        return []
    try:
        if Version(there or "") >= Version(oldest):
            return []
    except InvalidVersion:
        return [f"{target.id} needs ONNX Runtime {oldest} or newer, and the device does not say which it has"]
    told = f"ONNX Runtime on the device is {there}, and {target.id} needs {oldest} or newer; update it there"
    if target.runtime.older != "warning":
        raise InputError(f"{told}, or say `runtime: {{older: warning}}` in a target of your own")
    return [told]
