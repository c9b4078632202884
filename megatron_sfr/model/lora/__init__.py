"""LoRA: low-rank adapters beside frozen linear layers. `options`, `adapter` (formulas), `attach` (to a model)."""
