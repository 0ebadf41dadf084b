"""Energy from the kernel's counters: a folder laid out as powercap's stands for them."""

from __future__ import annotations

from pathlib import Path

from elastictrain.runtime.power import PowerMeter


def package(powercap: Path, name: str, joules: float, wraps_at_j: float = 1000.0) -> Path:
    zone = powercap / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (zone / "max_energy_range_uj").write_text(f"{int(wraps_at_j * 1e6)}\n")
    return zone


def test_packages_are_summed_from_look_to_look_across_a_wrap_and_without_their_parts(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 990.0)
    package(tmp_path, "intel-rapl:1", 10.0)
    package(tmp_path, "intel-rapl:0:0", 5.0)  # the cores of package 0, counted in it
    meter = PowerMeter(tmp_path)
    package(tmp_path, "intel-rapl:0", 20.0)
    package(tmp_path, "intel-rapl:1", 15.0)
    package(tmp_path, "intel-rapl:0:0", 500.0)
    assert meter.look() == 35.0
    assert meter.look() == 0.0


def test_who_can_not_read_is_told_nothing(tmp_path: Path) -> None:
    assert PowerMeter(tmp_path).look() is None
    zone = package(tmp_path, "intel-rapl:0", 1.0)
    meter = PowerMeter(tmp_path)
    (zone / "energy_uj").unlink()  # as good as unreadable, which nothing is for root
    assert meter.look() is None
