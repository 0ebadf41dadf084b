"""The HTML report in a real browser: nothing sticks out, and every picture is drawn. Skips where there is no Chromium.

A page around the report measures it and writes down what it finds, which the browser prints. About 3 s.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from example_events import full_story

from elastictrain.tracking.html import render_html
from elastictrain.tracking.report import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MEASURE = """<!doctype html><title>measure</title>
<iframe src="report.html" style="border:0;height:4000px;width:WIDTHpx"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const shown = element => element.getClientRects().length > 0;
  const charts = [...page.querySelectorAll("svg.chart")].filter(shown);
  const outside = charts.flatMap(chart => [...chart.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect(), paper = chart.getBoundingClientRect();
    return box.left < paper.left - 1 || box.right > paper.right + 1 || box.bottom > paper.bottom + 1;
  }).map(text => text.textContent));
  const colour = (element, name) => view.getComputedStyle(element)[name];
  const found = {
    width: page.documentElement.scrollWidth,
    charts: charts.map(chart => chart.getAttribute("aria-label")),
    outside,
    fills: [...new Set(charts.flatMap(c => [...c.querySelectorAll("path[style]")]).map(p => colour(p, "fill")))],
    heat: [...new Set(charts.flatMap(c => [...c.querySelectorAll("rect[style]")]).map(r => colour(r, "fill")))],
  };
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1140, 390])
def test_the_page_fits_and_every_picture_is_drawn(tmp_path: Path, width: int) -> None:
    report = build_report(full_story().events)
    (tmp_path / "report.html").write_text(render_html(report), encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE.replace("WIDTH", str(width)))
    found = measured(tmp_path)
    assert found["width"] <= width
    assert [label.split()[0] for label in found["charts"]] == ["Loss", "demo", "Seconds", "Memory"]
    assert found["outside"] == []
    assert len(found["fills"]) >= len(report["timeline"]["seconds"]) - 1  # a colour for each bucket, none left out
    assert "none" not in found["fills"]
    assert len(found["heat"]) > 2


def measured(folder: Path) -> dict[str, Any]:
    """What the page around the report found."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000",
        f"file://{folder / 'measure.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (told,) = re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(told))
    return found
