"""Who may use an embedded cluster: whoever has the token that this process made up for it.

Ray reads how to authenticate when it is first imported. So the package gives itself a token when it is imported, unless
the environment names a cluster or a way to authenticate already; and takes it back before it joins a cluster that the
config names, where the environment or Ray's own token file says how (docs/security.md).
"""

from __future__ import annotations

import os
import secrets
import sys

_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
_SAID_OTHERWISE = frozenset({"RAY_ADDRESS", _MODE})
_own = secrets.token_hex(32)


def take_own_token() -> None:
    """Have what this process starts from now on ask for its own token, where nothing says otherwise."""
    if not os.environ.keys() & _SAID_OTHERWISE:
        os.environ |= {_MODE: "token", _TOKEN: _own}
        _tell_ray()


def leave_own_token() -> None:
    """Authenticate as if there had never been an own token."""
    if os.environ.get(_TOKEN) == _own:
        del os.environ[_MODE], os.environ[_TOKEN]
        _tell_ray()


def _tell_ray() -> None:
    """Ray remembers what it has read; there is no public way to have it read again."""
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # no stubs

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
