"""Where replies come from: an OpenAI-compatible endpoint or a local model, behind one small protocol."""
