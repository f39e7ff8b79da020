# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_longalign"]
#
# [tool.uv.sources]
# hf_longalign = { git = "https://github.com/hf-longalign/hf_longalign" }
# ///
"""The same as `hf-longalign sft`, for those who launch scripts of a clone; its options: --help."""

import sys

from hf_longalign.cli import main


if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
