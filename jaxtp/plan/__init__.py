"""Pure arithmetic over a model, GPUs and a layout: what fits and what it costs."""
