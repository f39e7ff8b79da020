"""Ask a model and its adapter the same questions and report what changed; see `hf_longalign/commands/evaluate.py`."""

import sys

from hf_longalign.commands.evaluate import main


if __name__ == "__main__":
    sys.exit(main())
