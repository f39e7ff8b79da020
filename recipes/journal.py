"""Look into the journal of a synthesis; see `hf_longalign/commands/journal.py`."""

import sys

from hf_longalign.commands.journal import main


if __name__ == "__main__":
    sys.exit(main())
