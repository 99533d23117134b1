"""The engine: admits rows to each model's batch, steps the models and turns tokens into output.

It knows neither MLX nor Redis.
"""
