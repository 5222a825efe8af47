"""hub_timeout: an error instead of endless waiting when the Hugging Face Hub stalls."""
from contextlib import contextmanager
from threading import RLock
from typing import Any, Iterator, Optional

from huggingface_hub import constants, set_client_factory

from ..compat import hub_client_factory
from ..config import InputError

__all__ = ['hub_timeout', 'stalled_request']

_LOCK = RLock()  # the settings are those of the process


@contextmanager
def hub_timeout(timeout: float) -> Iterator[None]:
    """Limit how long huggingface_hub waits for the Hub, in this process. One thread at a time.

    By itself it waits forever for the answer to an upload or a commit, and up to 60 seconds for that to a download.
    Uploads and downloads are tried up to six times, so a Hub that stalls raises after at most 6 * timeout + 23.
    Inside this context files are sent and fetched by plain HTTP: Xet has time limits of its own, of minutes.

    Args:
        timeout: Longest wait in seconds for a connection, for the next bytes of an answer, or for the next bytes to be
            taken.

    Raises:
        InputError: timeout is not above 0.
        TimeoutError: The Hub stalled.
    """
    if not timeout > 0:
        raise InputError(f'must be above 0 seconds, not {timeout!r}.', 'timeout')

    def limit(request: Any) -> None:
        request.extensions['timeout'] = dict.fromkeys(('connect', 'read', 'write', 'pool'), timeout)

    def make_limited_client() -> Any:
        client = make_client()
        client.event_hooks = {**client.event_hooks, 'request': [*client.event_hooks['request'], limit]}
        return client

    with _LOCK:
        make_client, disable_xet = hub_client_factory(), constants.HF_HUB_DISABLE_XET
        set_client_factory(make_limited_client)
        constants.HF_HUB_DISABLE_XET = True
        try:
            yield
        except Exception as e:
            request = stalled_request(e)
            if request is None:
                raise
            raise TimeoutError(f'the Hub stalled for {timeout:g} s at {request}.') from e
        finally:
            set_client_factory(make_client)
            constants.HF_HUB_DISABLE_XET = disable_xet


def stalled_request(error: BaseException) -> Optional[str]:
    """The request, as 'METHOD url', at which the Hub stalled and so caused an error. None for other errors."""
    cause: Any = error
    while cause is not None and not type(cause).__name__.endswith('Timeout'):  # of httpx, or httpx2
        cause = cause.__cause__
    return None if cause is None else f'{cause.request.method} {str(cause.request.url).partition("?")[0]}'
