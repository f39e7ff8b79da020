"""What the command line does: one module per command, called by `hf-longalign` and by the scripts in `recipes/`."""
