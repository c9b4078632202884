"""Flow matching: probability paths and ODE solvers. Tensors and mathematics only; knows neither text nor Megatron."""
