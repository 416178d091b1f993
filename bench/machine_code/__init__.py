"""What the machine code of Triton kernels says of their speed, for chips that are not there."""

from .figures import Figures
from .inspecting import inspect_kernel, inspect_shipped

__all__ = ["Figures", "inspect_kernel", "inspect_shipped"]
