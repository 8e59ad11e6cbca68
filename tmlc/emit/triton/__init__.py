"""Program → Triton engine: launch plans for buckets of calls, machine code for named architectures, and weights."""
