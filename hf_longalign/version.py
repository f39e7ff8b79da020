"""The one place that names the version; it imports nothing, so that packaging can read it."""

__version__ = "0.1.0"
