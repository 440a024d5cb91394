"""Out of a run: an adapter or a merged model, with a model card."""
