"""How fast a run is: the speed of each step, and the floating-point operations that it is measured by."""
