"""Makes a LoRA adapter and a merged model from a recipe."""
