"""Stops the telemetry of libraries: no device id in the home folder, no look-ups, no events.

OpenVINO has no such variable. `engines.openvino` hides its telemetry package when it imports OpenVINO.
"""

import os
from typing import Any

# ONNX Runtime 1.32 on Linux writes a device id and a database of events, and looks for its maker's server.
# Hugging Face's libraries report the installed packages in every request. A library reads its variable at its import.
OFF = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def switch_off_telemetry() -> None:
    """Set the variables for this process and its children. A variable that the user has set keeps its value."""
    for name in OFF:
        os.environ.setdefault(name, "1")


def silence(onnxruntime: Any) -> None:
    """Stop the events of an ONNX Runtime that the program may have imported before cascadekit, unless the user's
    variable asks for them."""
    if os.environ.get(OFF[0]) == "1" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
