"""Fine-tune a Hugging Face model that lies in a local folder, on text of yours.

    python jobs/finetune_hf.py --model FOLDER --config jobs/finetune_hf.yaml data.corpus=/data/text
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/finetune_hf.py --model /models/mine --config jobs/finetune_hf.yaml data.corpus=/data/text
    elastictrain export finetuned --to FOLDER

The folder, the same on every node, has config.json, safetensors and tokenizer.json: what `save_pretrained` writes, and
`elastictrain export` too. Nothing is downloaded, no code in it runs, no pickle is opened.
"""

import argparse
import sys
from pathlib import Path

from elastictrain import TrainConfig
from elastictrain.cli import plain_errors, run_training


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune a Hugging Face model, or continue its run.")
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="the model to start from")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file that describes the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields to change, such as train.steps=50")
    arguments = parser.parse_intermixed_args()
    overrides = [f"model.path={arguments.model.absolute()}", *arguments.overrides]
    with plain_errors():
        return run_training(TrainConfig.load(arguments.config, overrides))


if __name__ == "__main__":
    sys.exit(main())
