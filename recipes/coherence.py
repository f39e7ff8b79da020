"""Does a data set need its contexts? See `hf_longalign/commands/coherence.py`."""

import sys

from hf_longalign.commands.coherence import main


if __name__ == "__main__":
    sys.exit(main())
