"""Triton kernels, one file a kernel: its description for the compiler and its host plan side by side."""
