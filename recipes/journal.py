"""The same as `hf-longalign journal`, for those who launch scripts of a clone; its options: --help."""

import sys

from hf_longalign.cli import main


if __name__ == "__main__":
    sys.exit(main(["journal", *sys.argv[1:]]))
