"""The same as `hf-longalign synthesize`, for those who launch scripts of a clone; its options: --help."""

import sys

from hf_longalign.cli import main


if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
