"""Benchmarks, the demo, and looks at the kernels that need no GPU."""
