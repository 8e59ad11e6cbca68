"""The CPU runtime: reads a package's plan and runs it with the kernel library in the wheel."""
