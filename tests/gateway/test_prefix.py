"""The API below a prefix that a reverse proxy removes, that Serve keeps, or both at once."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from serve_app.gateway.auth import KeyRing
from serve_app.gateway.relative_redirects import relative_reference
from serve_app.gateway.routes import create_api
from tests.browser import running_browser
from tests.fakes.backend import CONFIG, FakeBackend
from tests.fakes.reverse_proxy import stripping_proxy
from tests.gateway.served import served


@dataclass(frozen=True)
class Mounted:
    """Where a client finds the API: ``origin`` and ``prefix`` together."""

    origin: str
    prefix: str

    @property
    def url(self) -> str:
        return self.origin + self.prefix


@contextmanager
def gateway(route_prefix: str) -> Iterator[str]:
    """Serve the API on a free port; uvicorn prepends ``root_path``, as Serve keeps a prefix."""
    api = create_api(CONFIG, FakeBackend(), KeyRing(None, None))
    with served(api, route_prefix) as url:
        yield url


@contextmanager
def mounted(removed: str, route_prefix: str) -> Iterator[Mounted]:
    """Serve the API below both prefixes; the proxy removes the first one.

    uvicorn adds the route prefix itself, so a proxy in front removes it in every case.
    """
    with ExitStack() as stack:
        upstream = stack.enter_context(gateway(route_prefix))
        prefix = removed + route_prefix
        if prefix:
            yield Mounted(stack.enter_context(stripping_proxy(prefix, upstream)), prefix)
        else:
            yield Mounted(upstream, "")


@pytest.fixture(
    scope="module",
    params=[("", ""), ("/sd", ""), ("", "/sd"), ("/team/a", "/sd")],
    ids=["no prefix", "removed", "kept", "both"],
)
def api(request: pytest.FixtureRequest) -> Iterator[Mounted]:
    with mounted(*request.param) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose answers with an error fail the test."""
    page = browser.new_page()
    failed: list[str] = []
    page.on(
        "response",
        lambda answer: (
            failed.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
        ),
    )
    yield page
    page.close()
    assert failed == []


def test_every_asset_of_the_documentation_is_below_the_prefix(api: Mounted) -> None:
    answer = httpx.get(f"{api.url}/docs")
    assert answer.status_code == 200
    assets = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    described = re.findall(r"url: '([^']+)'", answer.text)
    assert len(assets) == 3
    assert len(described) == 1
    for address in assets + described:
        url = answer.url.join(address)
        assert str(url).startswith(f"{api.url}/")
        assert httpx.get(url).status_code == 200, url


def test_the_documentation_sends_requests_below_the_prefix(api: Mounted, page: Page) -> None:
    page.goto(f"{api.url}/docs")
    page.locator("#operations-health-health_health_get").click()
    page.get_by_role("button", name="Try it out").click()
    with page.expect_response(lambda answer: answer.url.endswith("/health")) as found:
        page.get_by_role("button", name="Execute").click()
    assert found.value.url == f"{api.url}/health"
    assert found.value.json() == {"status": "ok"}


def test_a_slash_redirect_keeps_scheme_host_and_prefix(api: Mounted) -> None:
    for path, target in {
        "/docs/": "/docs",
        "/health/?a=b%20c": "/health?a=b%20c",
        "/v1/images/generations/": "/v1/images/generations",
        "/static-offline-docs": "/static-offline-docs/",
    }.items():
        answer = httpx.get(api.url + path)
        assert answer.status_code == 307, path
        assert "//" not in answer.headers["location"]
        # A client behind a proxy that ends TLS sees another scheme and host than the server.
        seen = httpx.URL(f"https://public.example{api.prefix}{path}")
        found = seen.join(answer.headers["location"])
        assert str(found) == f"https://public.example{api.prefix}{target}"


@pytest.mark.parametrize("ending", ["/", ""])
def test_the_page_works_with_and_without_a_final_slash(
    api: Mounted, page: Page, ending: str
) -> None:
    page.goto(f"{api.url}{ending}?from=mail")
    expect(page.locator("#size option").nth(1)).to_be_attached()
    assert page.url == f"{api.url}/?from=mail"
    page.fill("#prompt", "a red circle")
    with page.expect_response(lambda answer: "/v1/" in answer.url) as found:
        page.click("#generate")
    assert found.value.url == f"{api.url}/v1/images/generations"
    page.get_by_role("link", name="API").click()
    expect(page.locator("#operations-health-health_health_get")).to_be_visible()
    assert page.url == f"{api.url}/docs"


def test_a_forwarded_prefix_of_a_client_changes_no_answer() -> None:
    """Anyone can send it: an address from it would be another site's script in this origin."""
    headers = {
        "x-forwarded-prefix": "//evil.example",
        "x-forwarded-host": "evil.example",
        "x-script-name": "//evil.example",
    }
    with gateway("") as url:
        for path in ("/", "/docs", "/openapi.json", "/docs/"):
            plain, forged = httpx.get(url + path), httpx.get(url + path, headers=headers)
            assert plain.content == forged.content
            assert plain.headers.get("location") == forged.headers.get("location")
            assert "evil" not in forged.text + str(forged.headers)


@pytest.mark.parametrize(
    ("path", "target", "reference"),
    [
        ("/docs/", "/docs", "../docs"),
        ("/docs//", "/docs", "../../docs"),
        ("/sd", "/sd/", "./sd/"),
        ("/", "/a/b", "./a/b"),
        ("/a/b/c", "/a/d", "../d"),
        ("/a:b", "/a:b/", "./a:b/"),
        ("//evil.example", "//evil.example/", "./evil.example/"),
    ],
)
def test_a_reference_leads_from_one_path_to_another(
    browser: Browser, path: str, target: str, reference: str
) -> None:
    assert relative_reference(path, target) == reference
    page = browser.new_page()
    found = page.evaluate("(both) => new URL(...both).pathname", [reference, f"http://host{path}"])
    page.close()
    assert found == target
