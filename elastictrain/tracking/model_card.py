"""The card of a finished model, in Markdown, from the report of its run (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from elastictrain.tracking.wording import bytes_text, count_text, layout_text

Report = dict[str, Any]


def model_card(report: Report, uri: str) -> str:
    """What the model is, what it was trained on and how, how good it is, and where its weights are."""
    return "\n".join(_lines(report, uri)) + "\n"


def _lines(report: Report, uri: str) -> Iterator[str]:
    config, data, evaluation = report["config"], report["data"], report["evaluation"]
    weights = next(c for c in reversed(report["checkpoints"]) if c["uri"] == uri)
    yield f"# {report['run']}"
    yield ""
    yield f"A {config['model']['kind']} model after {count_text(report['steps'], 'step')}, trained with elastictrain."
    yield ""
    yield "## Weights"
    yield ""
    yield f"`{uri}`: {bytes_text(weights['bytes'])} of safetensors, the optimizer's state among them, and no pickle."
    yield f"The SHA-256 of its manifest is `{weights['sha256']}`; the manifest holds those of the shards."
    yield ""
    yield "## Training"
    yield ""
    samples, seed = count_text(report["samples"], "sample"), config["train"]["seed"]
    named = config["data"].get("samples")
    yield f"- {samples} of {named or str(config['data']['seq_len']) + ' tokens'}, seed {seed}"
    yield f"- digest of all samples in their order: `{report['sample_digest']}`"
    if data:
        yield f"- data: `{data['uri']}`, SHA-256 `{data['sha256']}`"
    if report["generations"]:
        yield f"- last layout: {layout_text(report['generations'][-1])}"
    survived = sum(failure["recovered_s"] is not None for failure in report["failures"])
    yield f"- {count_text(survived, 'failure')} survived, {count_text(report['lost_steps'], 'step')} done again"
    yield f"- {report['environment'].get('command', '')}".rstrip()
    yield f"- git commit {report['environment'].get('git_commit') or 'unknown'}"
    yield ""
    yield "## Evaluation"
    yield ""
    if not evaluation:
        yield "Not evaluated."
        return
    if evaluation["bits_per_byte"] is None:
        yield f"Loss on what was held out: {evaluation['loss']:.4f}."
        return
    yield f"{bytes_text(evaluation['bytes'])} of held-out text: {evaluation['bits_per_byte']:.4f} bits per byte"
    yield f"({evaluation['gzip_bits_per_byte']:.4f} with `gzip -9`), {evaluation['loss']:.4f} nats per token."
