"""Prints the peak of a process that writes or reads a format, in bytes above what it had at its start.

python -m foreign.memory_alone FUNCTION SOURCE OUTPUT OPTIONS

FUNCTION is `convert`, `export` or `write_openvino_ir`; OPTIONS are JSON."""

import json
import os
import sys

from helpers.peak_memory import reset_peak, status

FUNCTION, SOURCE, OUTPUT, OPTIONS = sys.argv[1:]
os.fsync = lambda descriptor: None  # as for other tests; it takes no memory
START = reset_peak()

from cascadekit import convert, export  # noqa: E402

if FUNCTION == "write_openvino_ir":
    from cascadekit.converters.openvino_ir import write_openvino_ir

    write_openvino_ir(SOURCE, OUTPUT)
elif FUNCTION == "export":
    export(SOURCE, OUTPUT, **json.loads(OPTIONS))
else:
    convert(SOURCE, OUTPUT, **json.loads(OPTIONS))
print(status("VmHWM") - START)
