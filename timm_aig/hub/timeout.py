"""hub_timeout: an error instead of endless waiting when the Hugging Face Hub stalls."""
from contextlib import contextmanager
from typing import Any, Iterator

from huggingface_hub import constants, set_client_factory

from ..compat import hub_client_factory
from ..config import InputError

__all__ = ['hub_timeout']


@contextmanager
def hub_timeout(seconds: float) -> Iterator[None]:
    """Limit how long huggingface_hub waits for the Hub, in this process.

    By itself it waits forever for the answer to an upload or a commit, and up to 60 seconds for that to a download.
    Uploads and downloads are tried up to six times, so a Hub that stalls raises after at most 6 * seconds + 23.
    Inside this context files are sent and fetched by plain HTTP: Xet has time limits of its own, of minutes.

    Args:
        seconds: Longest wait for a connection, for the next bytes of an answer, or for the next bytes to be taken.

    Raises:
        InputError: seconds is not above 0.
        TimeoutError: The Hub stalled.
    """
    if not seconds > 0:
        raise InputError(f'must be above 0 seconds, not {seconds!r}.', 'timeout')
    make_client, disable_xet = hub_client_factory(), constants.HF_HUB_DISABLE_XET

    def limit(request: Any) -> None:
        request.extensions['timeout'] = dict.fromkeys(('connect', 'read', 'write', 'pool'), seconds)

    def make_limited_client() -> Any:
        client = make_client()
        client.event_hooks = {**client.event_hooks, 'request': [*client.event_hooks['request'], limit]}
        return client

    set_client_factory(make_limited_client)
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    except Exception as e:
        cause: Any = e
        while cause is not None and not type(cause).__name__.endswith('Timeout'):  # of httpx, or httpx2
            cause = cause.__cause__
        if cause is None:
            raise
        request = f'{cause.request.method} {str(cause.request.url).partition("?")[0]}'
        raise TimeoutError(f'the Hub stalled for {seconds:g} s at {request}. {e}') from e
    finally:
        set_client_factory(make_client)
        constants.HF_HUB_DISABLE_XET = disable_xet
