# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_longalign[eval,harness]"]
#
# [tool.uv.sources]
# hf_longalign = { git = "https://github.com/hf-longalign/hf_longalign" }
# ///
"""The same as `hf-longalign evaluate`, for those who launch scripts of a clone; its options: --help."""

import sys

from hf_longalign.cli import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
