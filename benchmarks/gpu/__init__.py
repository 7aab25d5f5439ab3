"""Everything that is measured on a GPU, and tried at toy size on a CPU: ``bash benchmarks/gpu.sh``."""
