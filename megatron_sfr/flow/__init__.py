"""Flow matching: probability paths, ODE solvers and information measures. Pure tensor code, without Megatron."""
