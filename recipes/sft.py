"""Instruction-tune a language model on short data with skipped positions; see `hf_longalign/commands/sft.py`."""

import sys

from hf_longalign.commands.sft import main


if __name__ == "__main__":
    sys.exit(main())
