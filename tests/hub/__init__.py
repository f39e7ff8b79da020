"""Tests of `hf_longalign.hub`."""
