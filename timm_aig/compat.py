"""Names of other packages that are private or undocumented and have no public counterpart.

Each entry says what needs it and what happens in a version that lacks it: the slower public way, never a crash.
"""
from functools import partial
from typing import Any, Callable

# ---- huggingface_hub


def hub_client_factory() -> Callable[[], Any]:
    """The function that makes huggingface_hub's HTTP clients, for hub_timeout to set limits on them and to restore it.

    Without the private name: plain clients, which ignore a factory set by huggingface_hub.set_client_factory.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http
    plain = partial(type(get_session()), follow_redirects=True, timeout=None)
    return getattr(_http, '_GLOBAL_CLIENT_FACTORY', plain)
