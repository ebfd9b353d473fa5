"""The competitors of ``python -m benchmarks.speed``, one library a file."""
