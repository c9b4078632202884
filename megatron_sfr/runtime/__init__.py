"""The machine: devices, process groups, random numbers. Only this package distinguishes CPU and CUDA."""
