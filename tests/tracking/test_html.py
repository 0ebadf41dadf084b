"""The HTML report: whole, escaped, self-contained, and small for long runs."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import hypothesis.strategies as st
import pytest
from example_events import Story, full_story
from hypothesis import given

from elastictrain.events import Cause, Warned
from elastictrain.tracking.chart import loss_chart, standalone_svg
from elastictrain.tracking.clock_chart import STACK, TimeAxis, clock_chart
from elastictrain.tracking.heat_map import heat_map
from elastictrain.tracking.html import LEDGER, render_html
from elastictrain.tracking.ledger import BUCKETS
from elastictrain.tracking.memory_chart import memory_chart
from elastictrain.tracking.report import build_report
from elastictrain.tracking.scale import MAX_POINTS, downsample, gather, ticks
from elastictrain.tracking.wording import bytes_text, count_text, seconds_text

VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Refuses a tag that is closed in the wrong place; collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_happened() -> None:
    page = Balanced(render_html(build_report(full_story().events)))
    for text in ("demo", "complete", "1.930", "gzip -9: 2.210", "SIGKILL", "bit_exact from memory", "def main():"):
        assert text in page.text
    for text in ("Skipped steps", "above 3.2", "2,560 to 2,879", "back to the state after step 160"):
        assert text in page.text
    assert "nothing is known to be faster" in page.text
    for bucket in ("compute", "lost", "recovery", "wall time"):
        assert bucket in page.text


def test_the_page_needs_nothing_else() -> None:
    html = render_html(build_report(full_story().events))
    page = Balanced(html)
    assert "script" not in page.tags
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not re.search(r"@import|url\(", html)


def test_what_comes_from_a_run_is_escaped() -> None:
    evil = '<script>alert("x")</script>$body'
    story = Story().start().generation().steps(2)
    story.events.append(Warned(story.clock, evil, evil))
    story.bug().end("failed", Cause("exception", evil, evil))
    html = render_html(build_report(story.events))
    page = Balanced(html)
    assert "script" not in page.tags
    assert page.text.count(evil) == 4
    assert "<b>bad" not in html


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_any_loss_can_be_drawn(loss: float) -> None:
    story = Story().start().generation().steps(3).steps(1, loss=loss).steps(2).steps(1, loss=loss)
    page = render_html(build_report(story.events))
    points = " ".join(re.findall(r'points="([^"]*)"', page))
    assert points
    assert "nan" not in points
    assert "inf" not in points


def test_steps_lost_to_the_death_of_a_driver_are_not_put_down_to_failures() -> None:
    story = Story().start(data=True).generation().steps(50).checkpoint().steps(20).wait(5)
    story.start().generation(first_step=51, cause="resume").steps(50).end()
    page = render_html(build_report(story.events))
    assert "done again after 1 death of the driver" in page
    assert "done again after 2 failures and 1 death of the driver" in render_html(build_report(full_story().events))
    assert "done again after 0 failures" in render_html(build_report(Story().start().generation().steps(3).events))


def test_nobody_works_between_two_attempts() -> None:
    report = build_report(full_story().events)
    gone_s = report["attempts"][0]["seen_s"]
    back_s = next(g["at_s"] for g in report["generations"] if g["attempt"] == 2)
    assert back_s > gone_s + 10
    chart = ElementTree.fromstring(clock_chart(report, 1000, 400))
    x = TimeAxis(48.0, 1000 - 18.0, report["wall_s"]).x((gone_s + back_s) / 2)
    bars = [bar for bar in chart.iter("rect") if bar.get("class") == "world"]
    assert len(bars) == len(report["generations"])
    assert not any(float(bar.attrib["x"]) <= x <= float(bar.attrib["x"]) + float(bar.attrib["width"]) for bar in bars)


def test_a_run_that_was_stopped_before_it_trained() -> None:
    story = Story().start()
    for events in (story.events, story.end("stopped", Cause("stop", "SIGTERM received")).events):
        page = Balanced(render_html(build_report(events)))
        assert "Over the clock" in page.text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun(steps: int) -> None:
    report = build_report(Story().start().generation().steps(steps).events)
    Balanced(render_html(report))
    ElementTree.fromstring(standalone_svg(report))


def test_a_long_run_stays_a_small_file() -> None:
    story = Story().start().generation()
    for _ in range(20):
        story.steps(500).kill().recover()
    report = build_report(story.events)
    page = render_html(report)
    assert len(page) < 250_000
    assert "A point stands for several steps: of every 10, the lowest" in page
    assert "A point stands" not in render_html(build_report(Story().start().generation().steps(9).events))


def test_long_tables_show_how_it_began_and_how_it_goes() -> None:
    report = build_report(full_story().events)
    one = report["checkpoints"][0]

    def drawn(number: int) -> str:
        report["checkpoints"] = [one | {"step": n, "uri": f"file:///step-{n:08d}"} for n in range(1, number + 1)]
        page = render_html(report)
        Balanced(page)
        return page

    assert "more between these" not in drawn(200)
    page = drawn(5_000)
    assert len(page) < 1.1 * len(drawn(2_000)) < 350_000
    shown = [int(step) for step in re.findall(r"<code>file:///step-(\d+)</code>", page)]
    assert shown == [*range(1, 51), *range(4_851, 5_001)]
    assert "4,800 more between these" in page


def test_the_curve_has_as_many_points_whatever_the_length_and_the_losses() -> None:
    """Losses that are NaN every so often cut it into pieces, and more events than pixels are marked together."""

    def drawn(steps: int) -> str:
        report = build_report(Story().start().generation(world_size=4).steps(1).kill().recover().events)
        report["steps"] = steps
        report["loss"] = [[n, math.nan if n % 7 == 0 else 2 + math.sin(n)] for n in range(1, steps + 1)]
        report["loss"][steps // 2][1] = 99.0
        for kind, at, every in (
            ("failures", "step", 20),
            ("generations", "first_step", 20),
            ("checkpoints", "step", 5),
        ):
            one = report[kind][0] if report[kind] else {"bytes": 1, "removed": False}
            report[kind] = [one | {at: n, "world_size": 1 + (n == 401)} for n in range(1, steps, every)]
        return loss_chart(report, 1040, 430)

    short, long = drawn(9_000), drawn(36_000)
    assert len(long) < 1.2 * len(short) < 600_000
    for text, most in (('class="curve"', 1000), ('class="failure"', 400), ('class="checkpoint"', 400)):
        assert 100 < long.count(text) <= most
    assert long.count(",") < 10_000
    lines = [[p.split(",") for p in found.split()] for found in re.findall(r'class="curve" points="([^"]+)"', long)]
    highest, second, *_ = sorted(float(y) for line in lines for _, y in line)
    assert second > highest + 100, "the spike is there"
    heights = {float(h) for h in re.findall(r'class="world"[^>]* height="([\d.]+)"', long)}
    assert heights == {22.0, 44.0}, "the one larger group is seen"


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 20))
def test_marks_are_gathered_only_where_they_are_too_many(places: list[int], limit: int) -> None:
    groups = gather(places, float, limit)
    assert len(groups) <= max(limit, 0 if places else 1)
    assert [place for group in groups for place in group] == sorted(places)
    assert len(places) > limit or all(len(group) == 1 for group in groups)


def test_the_picture_is_a_file_of_its_own() -> None:
    picture = ElementTree.fromstring(standalone_svg(build_report(full_story().events)))
    text = " ".join(picture.itertext())
    assert "SIGKILL, back in 0.96 s" in text
    assert "checkpoint after step 100" in text
    assert "2 workers" in text


def test_every_bucket_has_a_meaning_and_a_colour() -> None:
    assert set(LEDGER) == set(BUCKETS)
    html = render_html(build_report(full_story().events))
    assert all(f"--{bucket}:" in html for bucket in BUCKETS)


def test_every_bucket_has_a_place_in_the_stack() -> None:
    assert sorted(STACK) == sorted(BUCKETS)


@pytest.mark.parametrize("width", [1040, 380])
def test_the_pictures_over_the_clock_lie_within_their_frame(width: int) -> None:
    report = build_report(full_story().events)
    for drawn in (clock_chart(report, width, 420), heat_map(report, width), memory_chart(report, width, 260)):
        picture = ElementTree.fromstring(drawn)
        _, _, right, bottom = map(float, picture.attrib["viewBox"].split())
        for box in picture.iter("rect"):
            x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= right
            assert 0 <= y <= y + h <= bottom
        numbers = re.findall(r"([\d.-]+),([\d.-]+)", drawn.replace("color-mix(in oklab,var", ""))
        assert all(0 <= float(x) <= right and 0 <= float(y) <= bottom for x, y in numbers)


def test_the_heat_map_of_a_thousand_ranks_shows_the_slow_one_and_stays_small() -> None:
    story = Story()
    story.world_size = 1000
    story.start().generation(world_size=1000)
    for _ in range(300):
        story.steps(10).timed()
    drawn = heat_map(build_report(story.events), 1040)
    assert len(drawn) < 1_500_000
    hottest = max(int(heat) for heat in re.findall(r"var\(--hot\) (\d+)%", drawn))
    assert hottest == 100
    assert "rank 999, steps" in drawn


def test_the_memory_of_the_ranks_lies_beside_the_plan() -> None:
    story = Story().start().generation().steps(30).measured().steps(30).measured()
    report = build_report(story.events)
    assert [m["bytes"] for m in report["rank_memory"]] == [[300_000_000, 340_000_000]] * 2
    assert "Memory of the ranks: at most 340.0 MB, planned 400.0 MB" in render_html(report)
    report["layouts"] = [{"at_s": 0.0, "memory_bytes": 500_000_000}]
    drawn = memory_chart(report, 1040, 260)
    assert "rank 0 300.0 MB, rank 1 340.0 MB" in drawn
    planned, used = (
        float(re.findall(pattern, drawn)[0])
        for pattern in (r'class="planned".* y1="([\d.]+)"', r'class="curve" points="[\d.]+,([\d.]+)')
    )
    assert planned < used  # up is more
    report["rank_memory"] = report["rank_memory"][:1]
    assert "<circle" in memory_chart(report, 1040, 260)


def test_a_run_that_nobody_timed_has_no_heat_map() -> None:
    report = build_report(Story().start().generation().steps(3).events)
    assert (heat_map(report, 1040), memory_chart(report, 1040, 260)) == ("", "")


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300), st.integers(4, 50))
def test_fewer_points_keep_the_ends_and_the_extremes(values: list[float], limit: int) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = downsample(points, limit)
    assert len(kept) <= max(limit, 4)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert min(v for _, v in kept) == min(values)
    assert max(v for _, v in kept) == max(values)


def test_a_spike_and_a_gap_and_what_is_asked_for_in_a_hundred_thousand_steps_are_kept() -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[54_330] = (54_330.0, math.inf)
    kept = downsample(points, beside={54_350, 54_351})
    assert {points[n] for n in (54_321, 54_330, 54_350, 54_351)} <= set(kept)
    assert len(kept) <= MAX_POINTS + 3


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_lie_within_and_are_few(low: float, width: float, count: int) -> None:
    found = ticks(low, low + width, count)
    assert len(found) <= count + 2
    assert all(low - width * 1e-3 <= t <= low + width * 1.001 for t in found)


def test_numbers_in_words() -> None:
    assert [seconds_text(s) for s in (None, 0.012, 0.45, 9.996, 59.99, 200, 7500)] == [
        "–",
        "12 ms",
        "0.45 s",
        "10.0 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert (bytes_text(999), bytes_text(12e6), bytes_text(3e15)) == ("999 B", "12.0 MB", "3000.0 TB")
    assert (count_text(1, "step"), count_text(2000, "step")) == ("1 step", "2,000 steps")
