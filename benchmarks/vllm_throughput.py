"""``vllm bench throughput``, by its own parser and its own function.

Only the ``vllm`` command before it is left out: that looks for a package named vllm, and the CPU build has another name.
For the Python in which vLLM is installed; nothing of this project is needed there.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vllm.benchmarks.throughput import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
