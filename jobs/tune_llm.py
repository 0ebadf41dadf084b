"""Try values of some fields of a config: a sweep of elastic runs that share a budget of workers.

    python jobs/tune_llm.py --config jobs/llm_tiny.yaml --space jobs/tune_llm.yaml train.steps=100
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/tune_llm.py --config jobs/llm_tiny.yaml --space jobs/tune_llm.yaml train.steps=100

Exit status and output are those of `elastictrain tune`. It needs `pip install 'elastictrain[tune]'`.
"""

import argparse
import sys

from elastictrain import TrainConfig
from elastictrain.cli import plain_errors, run_tuning
from elastictrain.sweep.space import Sweep


def main() -> int:
    parser = argparse.ArgumentParser(description="Begin a sweep, or continue it.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file that describes the runs")
    parser.add_argument("--space", required=True, metavar="FILE", help="YAML file that says what to try")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields to change, such as train.steps=50")
    arguments = parser.parse_intermixed_args()
    with plain_errors():
        config = TrainConfig.load(arguments.config, arguments.overrides)
        return run_tuning(Sweep.load(arguments.space, config), config)


if __name__ == "__main__":
    sys.exit(main())
