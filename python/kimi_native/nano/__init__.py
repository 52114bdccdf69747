"""The bundled model kimi-nano: its world, its training data, its training. Nothing here is needed to run a model."""
