"""The chat page in a real browser, with a server behind it whose answers are known."""

import contextlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import jaxtp

PAGE = Path(jaxtp.__file__).parent / "serve" / "page.html"
PIECES = ["Once ", "upon <b>a</b> ", "time…"]


class Endpoint(BaseHTTPRequestHandler):
    """What is asked says what happens: "Hi" streams PIECES; other words below."""

    def do_GET(self):
        if self.path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models":
            if self.allowed():
                self.reply(200, {"data": [{"id": "tiny"}, {"id": "other"}]})
        else:
            self.reply(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self):
        if not self.allowed():
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        chat = self.path == "/v1/chat/completions"
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        if chat and self.server.no_template:
            self.reply(400, {"error": {"message": "tiny has no chat template", "type": "BadRequestError"}})
        elif text == "full":
            self.reply(503, {"error": {"message": "the queue is full"}})
        else:
            with contextlib.suppress(ConnectionError):
                self.stream(text, chat)

    def stream(self, text, chat):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        count = 0
        while count < len(PIECES) or text == "forever":
            piece = PIECES[count % len(PIECES)]
            self.event(
                {
                    "choices": [
                        {"index": 0, "finish_reason": None, **({"delta": {"content": piece}} if chat else {"text": piece})}
                    ]
                }
            )
            count += 1
            if text in ("break", "cut") and count == 2:
                break
            if self.server.ended.wait(0.02):
                return
        if text == "break":
            self.event({"error": {"message": "the engine ended"}})
        if text in ("break", "cut"):
            return
        self.event({"choices": [{"index": 0, "finish_reason": "length", **({"delta": {}} if chat else {"text": ""})}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 41}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk):
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def allowed(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.reply(401, {"error": {"message": "which key?"}})
            return False
        return True

    def reply(self, status, body, kind="application/json"):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def chromium():
    """A browser: Playwright's own, or the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="no browser is driven without playwright")
    with api.sync_playwright() as driver:
        there = Path(driver.chromium.executable_path).exists()
        found = (
            None if there else next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        )
        if not there and not found:
            pytest.skip("no Chromium is here: `playwright install chromium`, or the system's package")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.asked, server.key, server.no_template, server.ended = [], None, False, threading.Event()
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join(20)


@pytest.fixture
def page(chromium, server):
    """The page, open; what goes wrong in its scripts, or is fetched from elsewhere, fails the test."""
    page, wrong = chromium.new_page(), []
    address = f"http://127.0.0.1:{server.server_port}/"
    page.on("pageerror", lambda error: wrong.append(error))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or wrong.append(request.url))
    page.set_default_timeout(20_000)
    page.goto(address)
    yield page
    page.close()
    assert wrong == []


def say(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def answered(page, count=1):
    """The answers, once so many are there and whole."""
    found = page.locator(".assistant")
    found.nth(count - 1).and_(page.locator(":not(.growing)")).wait_for()
    assert found.count() == count
    return found


def refused(page):
    return page.locator("[role=alert]").inner_text()


def test_a_conversation_streams_and_is_sent_again_with_the_next_message(page, server):
    page.locator("#model option").nth(1).wait_for(state="attached")
    assert page.locator("#model option").all_inner_texts() == ["tiny", "other"]
    page.select_option("#model", "other")
    page.fill("#temperature", "0")
    page.fill("#most", "12")
    say(page, "Hi")
    answer = answered(page).last
    assert answer.locator(".text").inner_text() == "".join(PIECES)  # as text: nothing in it is markup
    assert answer.locator(".text b").count() == 0
    figures = answer.locator("small").inner_text()
    assert figures.startswith("41 tokens · ")  # the server's count, not that of the chunks
    assert " tokens/s · first after 0." in figures
    assert figures.endswith("cut at max tokens")
    say(page, "More")
    answered(page, 2)
    (path, first), (_, second) = server.asked
    assert path == "/v1/chat/completions"
    assert first == {
        "model": "other",
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    said = {"role": "assistant", "content": "".join(PIECES)}
    assert second["messages"] == [*first["messages"], said, {"role": "user", "content": "More"}]
    page.click("#clear")
    assert page.locator("article").count() == 0
    say(page, "Hi")
    answered(page)
    assert server.asked[-1][1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_a_model_without_a_chat_template_continues_the_text(page, server):
    server.no_template = True
    say(page, "Hi")
    answer = answered(page).last
    assert answer.inner_text().startswith("Hi" + "".join(PIECES))
    assert page.is_checked("[value=completion]")
    assert [path for path, _ in server.asked] == ["/v1/chat/completions", "/v1/completions"]
    assert server.asked[-1][1]["prompt"] == "Hi"
    say(page, "Hi ")
    answered(page, 2)
    assert [body.get("prompt") for _, body in server.asked[2:]] == ["Hi "]  # at once, and its spaces stay
    assert page.locator(".user, [role=alert]").count() == 0


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_an_answer_can_be_stopped_and_what_came_stays(page, server, by):
    say(page, "forever")
    page.locator(".assistant .text", has_text="".join(PIECES * 2)).wait_for()
    if by == "button":
        assert page.inner_text("#send") == "Stop"
        page.click("#send")
    else:
        page.keyboard.press("Escape")
    answer = answered(page).last
    assert answer.locator("small").inner_text().endswith("stopped")
    came = answer.locator(".text").text_content()
    assert page.inner_text("#send") == "Send"
    assert page.locator("[role=alert]").count() == 0
    say(page, "Hi")
    answered(page, 2)
    assert server.asked[-1][1]["messages"][1]["content"] == came


def test_what_the_server_refuses_is_shown_and_can_be_sent_again(page, server):
    say(page, "full")
    assert refused(page) == "503: the queue is full"
    assert page.input_value("#input") == "full"
    assert page.locator(".user, .assistant").count() == 0
    say(page, "Hi")
    answered(page)
    assert page.locator("[role=alert]").count() == 0
    assert server.asked[-1][1]["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(("text", "said"), [("break", "the engine ended"), ("cut", "The stream ended before the answer did.")])
def test_a_stream_that_breaks_shows_what_came_and_why_it_ended(page, text, said):
    say(page, text)
    assert refused(page) == said
    assert answered(page).last.locator(".text").inner_text() == "".join(PIECES[:2])


def test_a_server_that_is_gone_is_told(page, server):
    server.shutdown()
    server.server_close()
    say(page, "Hi")
    assert refused(page) == "The server does not answer."


def test_a_key_is_asked_for_and_sent(page, server):
    server.key = "k"
    page.reload()
    assert refused(page) == "401: which key?"
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("k")
    page.keyboard.press("Tab")
    page.locator("#model option").last.wait_for(state="attached")
    assert page.locator("[role=alert]").count() == 0
    say(page, "Hi")
    answered(page)
    assert "k" not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")


def test_settings_that_cannot_be_are_not_sent(page, server):
    for field, value in (("#temperature", "-1"), ("#most", ""), ("#most", "0")):
        page.fill(field, value)
        say(page, "Hi")
        assert page.evaluate("document.activeElement.id") == field[1:]
        page.fill(field, "1")
    assert server.asked == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_everything_fits_and_can_be_read(page, width, scheme):
    """No scrolling sideways, nothing outside, a name for every control, and a contrast of 4.5 for every text (WCAG AA)."""
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    say(page, "break")
    refused(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for control in page.locator("header :is(input, select, button), footer :is(textarea, button)").all():
        box = control.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        assert control.evaluate("e => e.labels?.[0]?.textContent.trim() || e.textContent.trim()")
    assert page.evaluate(CONTRAST) >= 4.5


CONTRAST = """() => {
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3]) return c; } return [255, 255, 255]; };
  const ratio = (e) => { const [a, b] = [numbers(getComputedStyle(e).color), behind(e)].map(light).sort((x, y) => y - x);
    return (a + .05) / (b + .05); };
  return Math.min(...[...document.querySelectorAll("body *")].filter(e => e.innerText?.trim() && !e.disabled).map(ratio));
}"""
