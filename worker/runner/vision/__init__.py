"""Vision: what is particular to a family of vision models, and the stage that encodes images before prefill."""
