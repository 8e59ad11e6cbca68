"""Runs the PTX of kernels on NumPy: what the compiler made of them, thread by thread, on a machine without a GPU."""
