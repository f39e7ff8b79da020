"""Tests of `hf_longalign.publish`."""
