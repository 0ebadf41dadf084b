"""Prepare a corpus ahead of its runs: read, tokenise and pack it, once, with all CPUs of a Ray cluster.

    python jobs/prepare_corpus.py --config jobs/llm_tiny.yaml
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/prepare_corpus.py --config jobs/llm_tiny.yaml data.corpus=/data/text data.vocab_size=32000

A run with the same `data` and `run.storage` finds it there. What was cut off goes on when it is submitted again.
"""

import argparse
import sys

from elastictrain import TrainConfig
from elastictrain.cli import plain_errors, run_preparation


def main() -> int:
    parser = argparse.ArgumentParser(description="Make token shards of a corpus, or find them whole.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file that describes the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields to change, such as data.seq_len=512")
    arguments = parser.parse_intermixed_args()
    with plain_errors():
        return run_preparation(TrainConfig.load(arguments.config, arguments.overrides))


if __name__ == "__main__":
    sys.exit(main())
