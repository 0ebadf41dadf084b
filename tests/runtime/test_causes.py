"""From Ray's errors to causes."""

from __future__ import annotations

from ray.exceptions import RayTaskError

from elastictrain.runtime.causes import explain


def test_the_traceback_of_a_worker_has_no_colours() -> None:
    error = RayTaskError(
        "Worker.warm", "\x1b[36mray::Worker.warm()\x1b[39m (pid=7)\n  in create\n", ValueError("7 heads")
    )
    cause = explain(error)
    assert (cause.kind, cause.message) == ("exception", "ValueError: 7 heads")
    assert "\x1b" not in cause.traceback
    assert "ray::Worker.warm() (pid=7)\n  in create" in cause.traceback
