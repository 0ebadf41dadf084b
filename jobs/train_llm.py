"""Train a language model: submit this script to a Ray cluster, or run it anywhere.

    python jobs/train_llm.py --config jobs/llm_tiny.yaml train.steps=200
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/train_llm.py --config jobs/llm_tiny.yaml train.steps=200

Exit status and output are those of `elastictrain train`.
"""

import argparse
import sys

from elastictrain import TrainConfig
from elastictrain.cli import plain_errors, run_training


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a language model, or continue its run.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file that describes the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields to change, such as train.steps=50")
    arguments = parser.parse_intermixed_args()
    with plain_errors():
        return run_training(TrainConfig.load(arguments.config, arguments.overrides))


if __name__ == "__main__":
    sys.exit(main())
