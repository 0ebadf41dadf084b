"""What Prometheus gets of a run from Ray's own endpoints. About 25 s: Ray reports every 10 s."""

from __future__ import annotations

import re
import urllib.request

from conftest import SharedCluster
from product import Product

from elastictrain.tracking.metrics import METRICS


def scraped(cluster: SharedCluster, run: str) -> dict[str, dict[str, float]]:
    """Value by metric (as it is named in elastictrain) and by its labels, of this run."""
    found: dict[str, dict[str, float]] = {}
    for url in cluster.metrics:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for name, labels, value in re.findall(r"^ray_(elastictrain_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            told = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if told.get("run") == run:
                own = next(m for m in METRICS if m.name == name)
                found.setdefault(name, {})[",".join(told[label] for label in own.labels)] = float(value)
    return found


def test_prometheus_gets_every_metric_through_ray(product: Product, shared_cluster: SharedCluster) -> None:
    priced = "cluster.worker_cost_per_hour=3.6"
    running = product.begin("scraped", "train.steps=100000", "checkpoint.every=20", priced)
    expected = {m.name for m in METRICS} - {"elastictrain_recovery_seconds", "elastictrain_model_gauge"}
    running.until("all metrics", lambda: scraped(shared_cluster, "scraped").keys() >= expected)
    values = scraped(shared_cluster, "scraped")
    assert values["elastictrain_world_size"] == {"": 2.0}
    assert values["elastictrain_running"] == {"": 1.0}
    assert values["elastictrain_step"][""] > 0
    assert values["elastictrain_checkpoint_step"][""] % 20 == 0
    assert values["elastictrain_rank_own_seconds"].keys() == {"0", "1"}
    assert {ranks.partition(",")[0] for ranks in values["elastictrain_rank_step"]} == {"0", "1"}
    assert values["elastictrain_wall_seconds"]["startup"] > 0
    assert values["elastictrain_worker_seconds"]["compute"] > values["elastictrain_wall_seconds"]["compute"] > 0
    assert 0 < values["elastictrain_cost"][""] < 3.6e-3 * sum(values["elastictrain_worker_seconds"].values())
    assert running.stop().code == 130
