"""Turn short instruction-answer pairs into long-context chat data; see `hf_longalign/commands/synthesize.py`."""

import sys

from hf_longalign.commands.synthesize import main


if __name__ == "__main__":
    sys.exit(main())
