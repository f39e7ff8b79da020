"""Publishing on the Hub, complete or not at all: the only code of this package that writes there."""
