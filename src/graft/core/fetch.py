"""Downloads from URLs that strangers wrote: http(s) only, public addresses only, bounded in bytes and in time.

The address that was checked is the one connected to: aiohttp's resolver checks every address of a name and its socket
factory checks the one about to be dialled, on every redirect, so neither a redirect nor a second DNS answer leads into the
private network. TLS is verified for the name. A download holds at most `max_bytes` in memory and costs one connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import graft
from graft.core.errors import DataError

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from yarl import URL

MAX_REDIRECTS = 5
CHUNK = 64 << 10  # bytes a read
ATTEMPTS = 3  # of what another try may mend
BACKOFF_S = 0.5

Address = IPv4Address | IPv6Address

# Tables of our own: what `ipaddress.is_global` answers for several of these changed between releases of Python 3.11.
# https://www.iana.org/assignments/iana-ipv4-special-registry and …/iana-ipv6-special-registry
_NOT_PUBLIC_4 = [
    IPv4Network(n)
    for n in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host services, reachable from its virtual machines alone
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
_UNICAST_6 = IPv6Network("2000::/3")  # all that IANA has handed out; the rest is loopback, link-local, ULA, multicast, reserved
_NOT_PUBLIC_6 = [IPv6Network(n) for n in ("2001::/23", "2001:db8::/32", "3fff::/20")]  # Teredo among the first
_NAT64, _6TO4 = IPv6Network("64:ff9b::/96"), IPv6Network("2002::/16")


class FetchError(DataError):
    """A download that failed, as one line without the URL; `passing` where another try may succeed."""

    def __init__(self, reason: str, passing: bool = False):
        super().__init__(reason)
        self.passing = passing


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet; an IPv6 form of an IPv4 address is judged by what it holds."""
    if isinstance(address, IPv4Address):
        return not any(address in n for n in _NOT_PUBLIC_4)
    if address.ipv4_mapped:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if address in _6TO4:
        return is_public(IPv4Address(int(address) >> 80 & 0xFFFFFFFF))
    return address in _UNICAST_6 and not any(address in n for n in _NOT_PUBLIC_6)


def without_secrets(url: str) -> str:
    """The URL as a log or a row may show it: without user, password, query and fragment, any of which may be a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(a URL that cannot be read)"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


@asynccontextmanager
async def fetcher(allow: Callable[[Address], bool] = is_public) -> AsyncIterator[ClientSession]:
    """A session for `fetch` whose every connection goes to an address that `allow` accepts."""
    import aiohttp
    from aiohttp.abc import AbstractResolver
    from aiohttp.resolver import ThreadedResolver

    def check(host: str, name: str) -> None:
        try:
            public = allow(ip_address(host))
        except ValueError:  # 127.1, 0177.0.0.1, 2130706433: the system would read it as an address, in a way of its own
            raise FetchError(f"bad URL: {host!r} is no canonical address") from None
        if not public:
            raise FetchError(f"private address: {name} is {host}" if name != host else f"private address: {host}")

    class CheckedResolver(AbstractResolver):
        def __init__(self) -> None:
            self.system = ThreadedResolver()

        async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[Any]:
            found = await self.system.resolve(host, port, family)
            for entry in found:  # one private address among public ones is refused too
                check(entry["host"], host)
            return found

        async def close(self) -> None:
            await self.system.close()

    def checked_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        check(address[0], address[0])  # a literal address in the URL never reached the resolver
        return socket.socket(family, kind, protocol)

    connector = aiohttp.TCPConnector(
        resolver=CheckedResolver(),
        socket_factory=checked_socket,
        use_dns_cache=False,
        happy_eyeballs_delay=None,  # in turn: a race would swallow the refusal
    )
    headers = {"User-Agent": f"graft/{graft.__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,  # a proxy would dial for us, unchecked; a .netrc would send passwords
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        yield session


async def fetch(session: ClientSession, url: str, max_bytes: int, timeout_s: float, attempts: int = ATTEMPTS) -> bytes:
    """The body behind `url`; timeout_s bounds each attempt from DNS to the last byte, redirects included.

    session: of `fetcher`. Raises FetchError, whose text starts with its kind: bad URL, private address, not found, too
    large, timed out, truncated, encoded, too many redirects, HTTP <status>, no HTTP, no connection.
    """
    for attempt in range(attempts):
        try:
            async with asyncio.timeout(timeout_s):
                return await _follow(session, url, max_bytes)
        except TimeoutError:
            error = FetchError(f"timed out: not complete after {timeout_s:g} s", passing=True)
        except FetchError as e:
            error = e
        if not error.passing:
            break
        if attempt + 1 < attempts:
            await asyncio.sleep(BACKOFF_S * 2**attempt)
    raise error


async def _follow(session: ClientSession, url: str, max_bytes: int) -> bytes:
    import aiohttp

    target = _checked(url)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            async with session.get(target, allow_redirects=False) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return await _body(response, max_bytes)
                if "Location" not in response.headers:
                    raise FetchError(f"HTTP {response.status}: a redirect to nowhere")
                target = _checked(response.headers["Location"], target)
    except aiohttp.ClientConnectorDNSError as e:
        raise FetchError(f"not found: no address for {target.host}", passing=e.os_error.errno == socket.EAI_AGAIN) from None
    except aiohttp.ClientConnectorCertificateError:
        raise FetchError(f"no connection: no valid certificate for {target.host}") from None
    except aiohttp.InvalidURL:
        raise FetchError("bad URL") from None
    except aiohttp.ClientPayloadError:
        raise FetchError("truncated: the server ended the body early", passing=True) from None
    except aiohttp.ClientResponseError:
        raise FetchError(f"no HTTP: {target.host} answers otherwise", passing=True) from None
    except (aiohttp.ClientError, OSError) as e:
        raise FetchError(f"no connection: {target.host}: {type(e).__name__}", passing=True) from None
    raise FetchError(f"too many redirects: more than {MAX_REDIRECTS}")


def _checked(url: str, base: URL | None = None) -> URL:
    from yarl import URL

    try:
        found = URL(url) if base is None else base.join(URL(url))
        host, _ = found.host, found.port  # both parsed here, where a bad one can be told
    except ValueError:
        raise FetchError("bad URL") from None
    if found.scheme not in ("http", "https"):
        raise FetchError(f"bad URL: scheme {found.scheme!r}, only http and https are read")
    if not host:
        raise FetchError("bad URL: no host")
    if found.user is not None or found.password is not None:
        raise FetchError("bad URL: it holds a user or a password")
    return found


async def _body(response: Any, max_bytes: int) -> bytes:
    if response.status != 200:
        passing = response.status in (408, 425, 429) or response.status >= 500
        raise FetchError(f"not found: HTTP {response.status}" if response.status in (404, 410) else f"HTTP {response.status}", passing)
    if (encoding := response.headers.get("Content-Encoding", "identity").strip().lower()) not in ("identity", ""):
        raise FetchError(f"encoded: {encoding[:20]!r}, where identity was asked for")  # unpacked, it could be of any size
    if response.content_length is not None and response.content_length > max_bytes:
        raise FetchError(f"too large: {response.content_length} bytes, at most {max_bytes}")
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise FetchError(f"too large: more than {max_bytes} bytes")
    return bytes(body)
