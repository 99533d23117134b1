"""Vision models: the families of models that are supported, and the stage that encodes images before prefill."""
