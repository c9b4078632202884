"""Models in FP8, INT8 and NVFP4, calibrated by NVIDIA's Model Optimizer."""
