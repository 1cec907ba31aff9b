"""Open the pages of the site in headless Chromium and say what a reader would stumble over.

    python tools/browser.py                      every page of _docs, or, where that was not rendered, of tools/plainsite.py
    python tools/browser.py index gridnet        these pages alone
    python tools/browser.py --shots DIR ...      pictures of the pages too, 1280 and 390 pixels wide
    python tools/browser.py --plain ...          tools/plainsite.py in any case

For each page: errors in the console, requests that fail or leave the site, pictures that do not load, links and anchors that lead
nowhere, a page wider than a telephone (390 pixels), the rules of axe-core (contrast, headings, names of controls), controls that
the Tab key does not reach, and printing. Chromium is found on the PATH or in CHROME; axe-core in AXE (a file), in node_modules
above this folder, or in ~/.cache/synseg/node_modules (npm install --prefix ~/.cache/synseg axe-core)."""
import argparse
import base64
import functools
import html
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import websocket

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
CONTROLS = "a[href], button, input:not([type=hidden]), select, textarea, summary, video[controls], [tabindex]:not([tabindex='-1'])"
PHONE, DESKTOP, PAPER = 390, 1280, 718  # CSS pixels; A4 less margins of 10 mm is 718 wide
# Browsers let Tab reach what scrolls, which `keyboard` tries; the other rules ask for more than a page of text owes
LENIENT = {"region", "landmark-unique", "scrollable-region-focusable"}


def chromium():
    "The path of a Chromium, or None"
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


def axe():
    "The path of axe-core, or None"
    places = [Path(os.environ["AXE"])] if "AXE" in os.environ else []
    for above in (*Path(__file__).resolve().parents, Path.home() / ".cache" / "synseg"):
        places.append(above / "node_modules" / "axe-core" / "axe.min.js")
    return next((p for p in places if p.is_file()), None)


class Browser:
    "Headless Chromium with one page, spoken to through the DevTools protocol"

    def __enter__(self):
        self.home = tempfile.mkdtemp(prefix="synseg-browser-")
        flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-extensions", "--mute-audio", "--hide-scrollbars",
                 "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0", f"--user-data-dir={self.home}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to run as root with it
        self.process = subprocess.Popen([chromium(), *flags, "about:blank"], stderr=subprocess.PIPE, text=True, start_new_session=True)
        port = next((m[1] for m in (re.search(r"DevTools listening on ws://[^:]+:(\d+)", line) for line in self.process.stderr) if m), None)
        if port is None:
            raise RuntimeError("Chromium ended before it could be spoken to")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # else its pipe fills and it waits
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30))
        url = next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
        self.socket, self.numbers, self.events = websocket.create_connection(url, suppress_origin=True, timeout=60), itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.socket.close()
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def send(self, method, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        return number

    def receive(self):
        message = json.loads(self.socket.recv())
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method, **params):
        "The answer to one command; events that come meanwhile are kept"
        number = self.send(method, **params)
        while (message := self.receive()).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def js(self, expression):
        "The value of an expression in the page; promises are awaited"
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", found["exceptionDetails"]["text"]))
        return found["result"].get("value")

    def width(self, pixels, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 600)

    def open(self, url, patience=30):
        "Load a page and wait until it and its pictures are there"
        self.events.clear()
        self.call("Page.navigate", url=url)
        until = time.monotonic() + patience
        while not any(e["method"] == "Page.loadEventFired" for e in self.events) and time.monotonic() < until:
            self.receive()
        self.js("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
        self.js("Promise.race([Promise.allSettled([...document.images].map(i => i.decode())), new Promise(r => setTimeout(r, 8000))]).then(() => 1)")

    def press(self, keys):
        "Press Tab many times; the answers are collected afterwards"
        what = dict(key="Tab", code="Tab", windowsVirtualKeyCode=9)
        numbers = {self.send("Input.dispatchKeyEvent", type=kind, **what) for _ in range(keys) for kind in ("rawKeyDown", "keyUp")}
        while numbers:
            numbers.discard(self.receive().get("id"))


def console(browser, base):
    "Errors that the page reports, and requests that fail or go elsewhere"
    for event in browser.events:
        p = event["params"]
        if event["method"] == "Runtime.exceptionThrown":
            d = p["exceptionDetails"]
            yield f"script: {d.get('exception', {}).get('description', d['text'])[:160]}"
        elif event["method"] == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
            yield f"console: {' '.join(str(a.get('value', a.get('description'))) for a in p['args'])[:160]}"
        elif event["method"] == "Log.entryAdded" and p["entry"]["level"] == "error":
            yield f"console: {p['entry']['text'][:160]} {p['entry'].get('url', '')[:100]}"
        elif event["method"] == "Network.requestWillBeSent" and not p["request"]["url"].startswith((base, "data:", "blob:")):
            yield f"asks elsewhere: {p['request']['url'][:120]}"


def pictures(browser):
    for source in browser.js("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 100))"):
        yield f"picture does not load: {source}"
    for source in browser.js("[...document.images].filter(i => !i.hasAttribute('alt')).map(i => i.src.slice(0, 60))"):
        yield f"picture without alt text: {source}"


@functools.cache
def anchors(path):
    "Every id and name in a file"
    return {html.unescape(a or b) for a, b in re.findall(r"""\s(?:id|name)=(?:"([^"]+)"|'([^']+)')""", path.read_text(encoding="utf-8"))}


def links(browser, url, base, folder, known=()):
    "Links within the site whose file or anchor is not there; `known`: pages of the site that were not made this time"
    for href in browser.js("[...new Set([...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href')))]"):
        there = urlsplit(urljoin(url, href))
        if not urljoin(url, href).startswith(base) or href == "#":
            continue
        path = folder / (unquote(there.path).lstrip("/") or "index.html")
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file():
            if path.name not in known:
                yield f"link leads nowhere: {href}"
        elif there.fragment and path.suffix == ".html" and unquote(there.fragment) not in anchors(path):
            yield f"no such anchor: {href}"


def too_wide(browser, pixels):
    "The page scrolls sideways; names what sticks out"
    wide = browser.js("(() => { const w = %d;" % pixels + """
      if (document.documentElement.scrollWidth <= w + 1) return null;
      const clipped = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
        if (getComputedStyle(p).overflowX !== 'visible') return true; return false };
      const out = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > w + 1 && !clipped(e));
      return [document.documentElement.scrollWidth, out.slice(-2).map(e => e.outerHTML.slice(0, 90))]; })()""")
    if wide:
        yield f"{wide[0]} pixels wide on {pixels}: {' | '.join(wide[1])}"


def rules(browser, script):
    "What axe-core finds"
    browser.js(script)
    found = browser.js("""axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'], resultTypes: ['violations']})
      .then(r => r.violations.map(v => [v.id, v.help, v.nodes.length, v.nodes.slice(0, 2).map(n => n.target.join(' ') + ' ' + n.html.slice(0, 80)
                 + (v.id === 'color-contrast' ? ' ' + (n.any[0]?.message || '').slice(0, 120) : ''))]))""")
    for name, text, count, where in found:
        if name not in LENIENT:
            yield f"axe {name} ({count}): {text}: {' | '.join(where)}"


def keyboard(browser):
    "Controls that the Tab key does not reach"
    count = browser.js(f"""(() => {{ document.activeElement?.blur(); window.scrollTo(0, 0); window.reached = new Set();
      const scrolls = e => e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX);
      window.wanted = [...document.querySelectorAll({json.dumps(CONTROLS)}), ...[...document.querySelectorAll('pre')].filter(scrolls)].filter(e => !e.disabled && !e.closest("[aria-hidden=true]") && e.checkVisibility({{visibilityProperty: true}})
        && e.getClientRects().length && !e.closest('[inert]')
        && (e.localName !== 'summary' || e.parentElement.localName === 'details' && e.parentElement.querySelector('summary') === e));
      document.addEventListener('focusin', e => window.reached.add(e.target));
      return window.wanted.length; }})()""")
    scrollers = browser.js("[...document.querySelectorAll('pre, table, div')].filter(e => e.scrollWidth > e.clientWidth + 1).length")
    browser.press(count + scrollers + 10)
    missed = browser.js("""window.wanted.filter(e => !window.reached.has(e) &&
      !(e.type === 'radio' && [...window.reached].some(r => r.type === 'radio' && r.name === e.name))).map(e => e.outerHTML.slice(0, 100))""")
    if missed:
        yield f"{len(missed)} of {count} controls cannot be reached with Tab, such as {missed[0]}"


def paper(browser):
    "Printing: a PDF comes out, and nothing is wider than the paper"
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.width(PAPER)
    yield from (f"on paper: {problem}" for problem in too_wide(browser, PAPER))
    browser.call("Emulation.setEmulatedMedia", media="")
    pdf = base64.b64decode(browser.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, marginTop=0.4, marginBottom=0.4,
                                        marginLeft=0.4, marginRight=0.4, printBackground=True)["data"])
    sheets = len(re.findall(rb"/Type\s*/Page\b", pdf))
    browser.sheets = sheets
    if not pdf.startswith(b"%PDF") or not sheets:
        yield "printing gives no PDF"


def check(browser, url, base, folder, script=None, known=()):
    "All problems of one page, in words"
    browser.width(DESKTOP)
    browser.open(url)
    found = [*pictures(browser), *links(browser, url, base, folder, known), *keyboard(browser)]
    found += rules(browser, script) if script else []
    browser.width(PHONE, 844)
    found += too_wide(browser, PHONE)
    found += paper(browser)
    found += console(browser, base)
    return list(dict.fromkeys(found))


def shoot(browser, url, name, folder):
    "Pictures of a page: its first screens at 1280 and at 390 pixels, light and dark"
    for pixels, height, scheme in ((DESKTOP, 1600, "light"), (DESKTOP, 1600, "dark"), (PHONE, 1600, "light")):
        browser.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        browser.width(pixels, height)
        browser.open(url)
        data = browser.call("Page.captureScreenshot", format="png")["data"]
        (folder / f"{name}-{pixels}-{scheme}.png").write_bytes(base64.b64decode(data))
    browser.call("Emulation.setEmulatedMedia", features=[])


def serve(folder):
    "A server for a folder on this machine; returns it and its address"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def examine(folder, names=(), shots=None, seconds=None, known=()):
    "{page: problems} of the pages in a folder; stops early where `seconds` are over"
    folder, script, found, start = Path(folder), axe(), {}, time.monotonic()
    script = script.read_text(encoding="utf-8") + "\n;1" if script else None
    pages = [folder / f"{n}.html" for n in names] or sorted(folder.glob("*.html"))
    server, base = serve(folder)
    try:
        with Browser() as browser:
            for path in pages:
                if seconds and found and time.monotonic() - start > seconds:
                    break
                found[path.stem] = check(browser, base + path.name, base, folder, script, known)
                print(f"{path.stem:<20} {browser.sheets:3d} sheets  {'; '.join(found[path.stem]) or 'ok'}", flush=True)
                if shots:
                    Path(shots).mkdir(parents=True, exist_ok=True)
                    shoot(browser, base + path.name, path.stem, Path(shots))
    finally:
        server.shutdown()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--shots", type=Path)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--folder", type=Path, help="pages that are there already")
    args = parser.parse_args()
    if not chromium():
        sys.exit("no Chromium on the PATH: install chromium or google-chrome, or name it in CHROME")
    if not axe():
        print("axe-core was not found, its rules are left out: npm install --prefix ~/.cache/synseg axe-core")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or ROOT / "_docs"
        if args.plain or not (folder / "index.html").is_file():
            from plainsite import build
            folder = Path(temporary)
            build(folder)
        found = examine(folder, args.names, args.shots)
    bad = {name: problems for name, problems in found.items() if problems}
    print(f"{len(found)} pages, {len(bad)} with problems")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
