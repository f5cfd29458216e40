"""Keeps libraries from reporting that they are used: no device id in the home folder, no look-ups, no events.

OpenVINO has no variable for it; `engines.openvino` keeps its reporting package out when it imports OpenVINO.
"""

import os
from typing import Any

# ONNX Runtime 1.32 on Linux writes a device id and a database of events, and looks for its maker's server.
# Hugging Face's libraries add what else is installed to every request. Each variable is read at the library's import.
OFF = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def switch_off_telemetry() -> None:
    """Set the variables for this process and those it starts. One that the user has set stays as it is."""
    for name in OFF:
        os.environ.setdefault(name, "1")


def silence(onnxruntime: Any) -> None:
    """Stop the events of an ONNX Runtime that the program may have imported before cascadekit, unless the user's
    variable asks for them."""
    if os.environ.get(OFF[0]) == "1" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
