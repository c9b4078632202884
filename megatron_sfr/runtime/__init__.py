"""What the machine is: devices, process groups, random numbers. Nothing outside this folder asks."""
