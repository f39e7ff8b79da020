"""`python -m hf_longalign`, and `accelerate launch -m hf_longalign` for several processes."""

import sys

from hf_longalign.cli import main


if __name__ == "__main__":
    sys.exit(main())
