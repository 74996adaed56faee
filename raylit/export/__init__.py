"""A trained Module as a file for other runtimes: ONNX, TorchScript, ``torch.export``. Floor 2, any process.

torch's exporters are imported by the call that uses them.
"""

from raylit.export.onnx_file import to_onnx
from raylit.export.program import to_program
from raylit.export.script import to_torchscript

__all__ = ["to_onnx", "to_program", "to_torchscript"]
