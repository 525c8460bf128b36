"""Downloads against real servers on loopback addresses: 127.0.0.2 plays the public internet, 127.0.0.1 the private network."""

import asyncio
import contextlib
import datetime
import socket
import ssl
import time
from ipaddress import ip_address

import pytest
from aiohttp import web

from graft.core.fetch import MAX_REDIRECTS, FetchError, fetch, fetcher, is_public, without_secrets

from ..ports import free_port

PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.1"
BODY = bytes(range(256)) * 40


def only_public(address):
    return str(address) == PUBLIC


class Site:
    """What both addresses serve; `seen` lists (address, path, host header)."""

    def __init__(self):
        self.seen = []

    async def handle(self, request):
        self.seen.append((request.transport.get_extra_info("sockname")[0], request.path, request.host))
        name = request.match_info["name"]
        if name == "hop":
            left = int(request.query["left"])
            raise web.HTTPFound(f"/hop?left={left - 1}" if left else "/ok")
        if name == "to":
            raise web.HTTPFound(request.query["url"])
        if name == "busy" and len(self.seen) < 2:
            return web.Response(status=503)
        if name in ("drip", "endless"):
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                for _ in range(100_000):
                    await response.write(b"x" * (1 if name == "drip" else 65536))
                    await asyncio.sleep(0.05 if name == "drip" else 0)
            return response
        if name == "packed":
            return web.Response(body=b"x" * 100, headers={"Content-Encoding": "gzip"})
        return web.Response(body=BODY) if name in ("ok", "busy") else web.Response(status={"gone": 410}.get(name, 404))

    async def lie(self, reader, writer):
        """A server of raw sockets, whose Content-Length is the path's number and whose body is BODY."""
        length = (await reader.readline()).split()[1].decode().strip("/")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + BODY)
        await writer.drain()
        writer.close()


def get(path, *, max_bytes=1_000_000, timeout_s=5.0, allow=only_public, attempts=1, host=PUBLIC, site=None):
    """Fetch `path` from a Site; "{port}" in it is the port that both addresses listen on, "{lies}" that of the lying server."""

    async def go():
        s = site or Site()
        app = web.Application()
        app.router.add_get("/{name}", s.handle)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            port = free_port()  # at both addresses: one that the system gave for the first may be another's at the second
            await web.TCPSite(runner, PUBLIC, port).start()
            await web.TCPSite(runner, PRIVATE, port).start()
            liar = await asyncio.start_server(s.lie, PUBLIC, 0)
            path_ = path.replace("{port}", str(port)).replace("{lies}", str(liar.sockets[0].getsockname()[1]))
            async with liar, fetcher(allow) as session:
                url = path_ if "://" in path_[:12] or ":" in path_[:6] else f"http://{host}:{port}{path_}"
                return await fetch(session, url, max_bytes, timeout_s, attempts)
        finally:
            await runner.cleanup()

    return asyncio.run(go())


def refused(path, **how):
    with pytest.raises(FetchError) as e:
        get(path, **how)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_body_comes_whole_through_redirects():
    site = Site()
    assert get(f"/hop?left={MAX_REDIRECTS - 1}", site=site) == BODY
    assert [p for _, p, _ in site.seen] == ["/hop"] * MAX_REDIRECTS + ["/ok"]
    assert "too many redirects" in refused(f"/hop?left={MAX_REDIRECTS}")
    assert get("/ok", max_bytes=len(BODY)) == BODY


PRIVATE_SPELLINGS = [
    "127.0.0.1",
    "2130706433",
    "0177.0.0.1",
    "0x7f.0.0.1",
    "0x7f000001",
    "127.1",
    "[::ffff:127.0.0.1]",
    "localhost",
    "[::1]",
    "0.0.0.0",
]


@pytest.mark.parametrize("host", PRIVATE_SPELLINGS)
@pytest.mark.parametrize("hops", [0, 1, 3])
def test_no_spelling_of_a_private_address_is_dialled(host, hops):
    site = Site()
    url = f"http://{host}:{{port}}/ok"
    for _ in range(hops):
        url = f"http://{PUBLIC}:{{port}}/to?url={url}"
    reason = refused(url, site=site)
    assert reason.startswith(("private address", "bad URL")), reason
    assert all(address == PUBLIC for address, _, _ in site.seen) and len(site.seen) == hops


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/", "http://[64:ff9b::7f00:1]/"])
def test_a_redirect_to_a_metadata_service_is_refused(target):
    started = time.monotonic()
    assert refused(f"/to?url={target}", allow=lambda a: only_public(a) or is_public(a)).startswith("private address")
    assert time.monotonic() - started < 2, "refused, not timed out"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.2/x", "gopher://127.0.0.2/", "data:image/png;base64,AAAA", "http:///x", "//x/y"]
)
def test_only_http_is_read(url):
    reason = refused(url if url != "//x/y" else "http://")
    assert reason.startswith("bad URL")
    if url.startswith(("file", "ftp", "gopher")):
        assert refused(f"/to?url={url}").startswith("bad URL: scheme")


def test_a_password_in_a_url_is_refused_and_not_repeated():
    for path in (f"http://u:hunter2@{PUBLIC}:{{port}}/ok", f"/to?url=http://u:hunter2@{PUBLIC}:{{port}}/ok"):
        reason = refused(path)
        assert "user or a password" in reason and "hunter2" not in reason
    assert without_secrets("https://u:p@h.example:8/a b.png?X-Signature=s3cret#f") == "https://h.example:8/a b.png"


@pytest.fixture
def dns(monkeypatch):
    """answers: name -> one list of addresses a look-up; asked: the names in order."""
    answers, asked, real = {}, [], socket.getaddrinfo

    def getaddrinfo(host, port, *rest, **named):
        if host not in answers:
            return real(host, port, *rest, **named)
        asked.append(host)
        found = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers, asked


def test_a_name_is_resolved_once_and_the_checked_address_is_dialled(dns):
    answers, asked = dns
    answers["rebind.test"] = [[PUBLIC], [PRIVATE]]
    site = Site()
    assert get("/ok", host="rebind.test", site=site) == BODY
    assert asked == ["rebind.test"] and site.seen[0][0] == PUBLIC and site.seen[0][2].startswith("rebind.test:")


def test_one_private_address_among_public_ones_is_refused(dns):
    dns[0]["mixed.test"] = [[PUBLIC, PRIVATE]]
    site = Site()
    assert refused("/ok", host="mixed.test", site=site) == f"private address: mixed.test is {PRIVATE}" and not site.seen


def test_a_name_without_an_address_is_not_found():
    assert refused("http://no-such-host.invalid/x").startswith("not found: no address for")


def test_the_cap_holds_while_reading():
    assert refused("/ok", max_bytes=len(BODY) - 1) == f"too large: {len(BODY)} bytes, at most {len(BODY) - 1}"
    assert refused("/endless", max_bytes=300_000) == "too large: more than 300000 bytes"
    assert refused(f"http://{PUBLIC}:{{lies}}/99999999").startswith("too large: 99999999 bytes"), "refused before the body"
    assert refused(f"http://{PUBLIC}:{{lies}}/{len(BODY) + 1}").startswith("truncated")
    assert refused("/packed") == "encoded: 'gzip', where identity was asked for"


def test_the_deadline_is_of_the_whole_download():
    started = time.monotonic()
    assert refused("/drip", timeout_s=0.5).startswith("timed out")
    assert time.monotonic() - started < 2


def test_passing_faults_are_tried_again_and_others_are_not():
    site = Site()
    assert get("/busy", attempts=3, site=site) == BODY and len(site.seen) == 2
    for path, reason in (("/gone", "not found: HTTP 410"), ("/missing", "not found: HTTP 404")):
        site = Site()
        assert refused(path, attempts=3, site=site) == reason and len(site.seen) == 1
    assert refused("/to?url=", attempts=3).startswith(("HTTP", "too many", "bad URL"))


def test_tls_is_verified_for_the_name_in_the_url(dns, tmp_path):
    """The address is pinned, the name still goes into SNI; a certificate that no authority signed ends the handshake."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "secure.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    signed = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("secure.test")]), False).sign(key, hashes.SHA256())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "both.pem").write_bytes(pem + signed.public_bytes(serialization.Encoding.PEM))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "both.pem")
    names = []
    context.sni_callback = lambda _socket, server_name, _context: names.append(server_name)
    dns[0]["secure.test"] = [[PUBLIC]]

    async def go():
        server = await asyncio.start_server(lambda _r, w: w.close(), PUBLIC, 0, ssl=context)
        async with server, fetcher(only_public) as session:
            return await fetch(session, f"https://secure.test:{server.sockets[0].getsockname()[1]}/x", 1000, 5, attempts=1)

    with pytest.raises(FetchError, match=r"no valid certificate for secure\.test"):
        asyncio.run(go())
    assert names == ["secure.test"]


NOT_PUBLIC = """
0.0.0.0 10.1.2.3 100.64.0.1 100.127.255.255 127.0.0.1 168.63.129.16 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.8 192.168.1.1 198.18.0.1
203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::7f00:1 fe80::1 fe80::1%1 fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001::1
2001:db8::1 3fff::1 5f00::1 100::1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::a00:1 64:ff9b::7f00:1 64:ff9b:1::808:808 2002:7f00:1::
2002:a00:1::1 2002:a9fe:a9fe::
"""
PUBLIC_ONES = """
1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.0 172.15.0.1 172.32.0.1 192.0.1.1 223.255.255.255 2606:4700:4700::1111 2a00::1 2001:4860:4860::8888
::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
"""


@pytest.mark.parametrize(("addresses", "expected"), [(NOT_PUBLIC, False), (PUBLIC_ONES, True)])
def test_what_is_public(addresses, expected):
    assert [a for a in addresses.split() if is_public(ip_address(a)) is not expected] == []
