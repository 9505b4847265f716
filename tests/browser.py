"What a browser says of a page: sizes, pictures, colours, and what stood on its console."

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ASK = """
const frame = document.querySelector('iframe'), w = frame.contentWindow, d = w.document, said = {};
said.inner = w.innerWidth; said.scroll = d.documentElement.scrollWidth;
said.dark = w.matchMedia('(prefers-color-scheme: dark)').matches;
said.paper = w.getComputedStyle(d.body).backgroundColor;
said.images = [...d.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]);
said.shown = [...d.images].filter(i => i.checkVisibility()).map(i => i.className);
said.boxes = [...d.querySelectorAll('.box')].map(b => [b.clientWidth, b.scrollWidth, b.tabIndex]);
said.text = Math.max(...[...d.querySelectorAll('p, figcaption')].map(p => p.getBoundingClientRect().right));
document.querySelector('pre').textContent = JSON.stringify(said);
"""


def asked(text: str, width: int, dark: bool, folder: Path) -> tuple[dict, list[str]]:
    """What a browser says of the page, unchanged, in a frame `width` px wide; and what stood on its console.

    A frame, because headless Chromium makes no window narrower than 500 px.
    """
    outer = (f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><pre></pre>'
             f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(text)}"></iframe>'
             f"<script>addEventListener('load', () => {{ {ASK} }})</script>")
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    switches = ("--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking "
                "--disable-component-update --disable-sync --no-first-run --enable-logging=stderr "
                "--virtual-time-budget=5000 --window-size=1400,1000 --dump-dom").split()
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *switches, scheme, f"--user-data-dir={folder / 'profile'}", str(folder / "outer.html")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    said = re.search(r"<pre>({.*?})</pre>", done.stdout)
    assert said, done.stderr[-2000:]
    return json.loads(html.unescape(said[1])), [x for x in done.stderr.splitlines() if "CONSOLE" in x]
