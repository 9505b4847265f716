"A report is one readable file: text survives, nothing is loaded, the structure holds, and a browser agrees."

import re
import subprocess
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, asked
from hypothesis import given
from hypothesis import strategies as st

from medsim.bench.report import MARK, NOTICE, UNPRINTABLE, Report, counts, number, style
from medsim.bench.style import DARK, LIGHT, drawn
from medsim.core.paths import OutputExists
from medsim.data.cohorts import draw_flow

VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    "Tags with attributes, the text of each element by tag, and whether every element is closed where it was opened."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[t for t, _ in self.open]}"

    def handle_starttag(self, tag, attrs):
        names = [k for k, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append((tag, []))

    def handle_endtag(self, tag):
        opened, text = self.open.pop()
        assert opened == tag, f"{opened} ends as {tag}"
        self.texts.append((tag, "".join(text)))

    def handle_data(self, data):
        for _, text in self.open: text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [a[attribute] for _, a in self.tags if attribute in a]

    def of(self, tag: str) -> list[str]:
        return [text for t, text in self.texts if t == tag]


def curve():
    figure, ax = plt.subplots(figsize=(5, 2.5))
    ax.plot([0, 1, 2], [1, 3, 2], label="made up")
    ax.axhline(2, color="black")
    ax.legend()
    return figure


def wide():
    figure, axes = plt.subplots(1, 4, figsize=(14, 3))
    for ax in axes: ax.plot(np.random.default_rng(0).normal(size=1500), ".")
    return figure


def example() -> Report:
    "What strains a page: long words, a table of 60 rows and 14 columns, a figure wider than any phone."
    facts = {"data": "none", "a long name " * 5: "/".join(["x" * 30] * 6)}
    page = Report("A page with everything", "Made up", facts=facts)
    page.say("Before the first section, with `code_" + "x" * 200 + "`.")
    page.section("First & <foremost>")
    page.say("**Bold**, a [link](https://example.org/?a=1&b=2).\n\n" + "W" * 300)
    page.warn("Three patients.")
    page.figure(curve, 'A "curve" with a peak', "Values (made up)")
    page.section("Second")
    page.figure(wide, "Four clouds of points", "Values (made up), " + "y" * 150)
    page.table(pd.DataFrame(np.arange(840).reshape(60, 14) / 7, index=[f"row {i}" for i in range(60)],
                            columns=[f"column {j}" for j in range(14)]), "Many numbers, " * 12)
    page.table(pd.DataFrame({"said": ["words " * 80, None]}), "Long text")
    return page


@pytest.fixture(scope="module")
def page() -> str:
    return example().html


# ---- text

plain = st.text(max_size=200).filter(lambda t: t.strip() and not MARK.search(t))


def as_shown(text: str) -> str:
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def letters(text: str) -> str:
    "Without white space and control characters, which paragraphs lose at their ends."
    return "".join(as_shown(text).replace("\ufffd", "").split())


@given(plain)
def test_any_text_survives_everywhere(text: str):
    report = Report(text, text, facts={text: text})
    report.say("a" + text)
    report.warn(text + "a")
    report.table(pd.DataFrame({"c": ["x" + text]}, index=[text]), text)
    read, shown = Page(report.html), as_shown(text.strip())
    assert read.of("title")[0] == read.of("h1")[0] == shown
    assert read.of("caption")[-1] == f"Table 1. {shown}"
    assert read.of("td")[-1] == as_shown("x" + text) and read.of("th")[-1] == as_shown(text)
    paragraphs = "".join(read.of("p")[2:-1])  # after the notice and the lead, before the footer
    assert letters(paragraphs) == letters(f"a{text}Caution.{text}a")


@given(st.text(min_size=1, max_size=50).filter(lambda t: t.strip()))
def test_marks_only_wrap(text: str):
    report = Report("t")
    report.say(f"`{text.replace('`', '')}x`")
    read = Page(report.html)
    frame = {t for t, _ in Page(Report("t").html).tags}
    assert {t for t, _ in read.tags} == frame | {"code"}
    assert read.values("href") == ["data:,", "#page:main", "#page:top"]


def test_marks():
    report = Report("t")
    report.say("a **b `c` d** [e](https://f.org/g) [h](http://i.org) ** `**j**`\n\nk\nl")
    read = Page(report.html)
    assert read.of("strong") == ["b c d"] and read.of("code") == ["c", "**j**"]
    assert [a for a in read.values("href") if a.startswith("http")] == ["https://f.org/g"]
    assert read.of("p")[1:3] == ["a b c d e [h](http://i.org) ** **j**", "k\nl"]


@given(st.floats(-1e300, 1e300, allow_subnormal=False), st.integers(1, 8))
def test_numbers_keep_their_digits(x: float, digits: int):
    said = number(x, digits)
    back = float(said.replace("−", "-").replace(",", ""))
    assert back == 0 if x == 0 else abs(back - x) <= 0.501 * 10.0 ** (np.floor(np.log10(abs(x))) + 1 - digits)
    if "e" not in said and x: assert len(re.sub(r"[−,.]", "", said).lstrip("0")) >= digits


@given(st.integers())
def test_whole_numbers_are_exact(n: int):
    assert int(number(n).replace("−", "-").replace(",", "")) == n


def test_counts():
    assert [counts(n, False) for n in range(11)] == ["<10"] * 10 + ["10"]
    assert counts(np.int64(3), True) == "3"
    for bad in (-1, 2.0, True, None):
        with pytest.raises(ValueError, match="whole number"): counts(bad, True)


# ---- structure


def test_structure(page: str):
    read = Page(page)
    ids, tags = read.values("id"), [t for t, _ in read.tags]
    assert len(ids) == len(set(ids))
    links = [h for h in read.values("href") if h.startswith("#")]
    assert {h[1:] for h in links} | set(read.values("aria-labelledby")) <= set(ids)
    assert {"#first-foremost", "#second"} <= set(links)
    assert all(tags.count(t) == 1 for t in ("html", "title", "h1", "main", "header", "nav", "footer"))
    assert dict(read.tags)["html"] == {"lang": "en"}
    assert tags.count("section") == 2 and tags.count("figure") == tags.count("figcaption") == 2 == tags.count("img") / 2
    assert all(a["alt"].strip() for t, a in read.tags if t == "img")
    assert tags.count("table") == tags.count("caption") == 3
    assert all("scope" in a for t, a in read.tags if t == "th")
    boxes = [a for t, a in read.tags if a.get("class", "").startswith("box rows")]
    assert len(boxes) == 2 and all(b["tabindex"] == "0" for b in boxes)


def test_notice_cannot_be_left_out(page: str):
    for text in (page, Report("t").html):
        assert Page(text).of("p")[0] == NOTICE and text.index(NOTICE) < text.index("<h1>")


def test_loads_nothing(page: str):
    read = Page(page)
    assert not read.values("srcset")
    loaded = [*read.values("src"), *(a["href"] for t, a in read.tags if t == "link")]
    assert len(loaded) == 5 and all(x.startswith("data:") for x in loaded)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {t for t, _ in read.tags}
    (sheet,) = read.of("style")
    assert not re.search(r"url\(|@import|//", sheet)
    assert {u for u in re.findall(r"https?://[^\s\"<]+", page)} == {"https://example.org/?a=1&amp;b=2"}
    for image in loaded[:4]:
        kind, data = image.split(";base64,")
        if kind.endswith("svg+xml"):
            drawing = b64decode(data).decode()
            assert not re.search(r"<!DOCTYPE|<!ENTITY|<script|<image|@font-face|href=\"(?!#)", drawing)
    assert "default-src 'none'" in page


def test_table_cells():
    report = Report("t")
    table = pd.DataFrame({"n": [12, "<10", None], "x": [0.5, np.nan, -1234.6], "ok": [True, False, None]},
                         index=pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)], names=["who", "when"]))
    report.table(table.astype({"x": float}), "c", digits=2)
    report.table(table.reset_index(drop=True).iloc[:0], "empty")
    read = Page(report.html)
    assert read.of("td")[:9] == ["12", "0.50", "yes", "<10", "–", "no", "–", "−1235", "–"]
    heads = [(text, a["scope"]) for (t, text), a in zip(
        [x for x in read.texts if x[0] == "th"], [a for t, a in read.tags if t == "th"], strict=True)]
    assert heads[:5] == [("who", "col"), ("when", "col"), ("n", "col"), ("x", "col"), ("ok", "col")]
    assert heads[5:7] == [("a", "row"), ("1", "row")] and read.of("td")[-1] == "no rows"


# ---- the same bytes


def test_same_content_same_bytes(page: str, tmp_path: Path):
    assert example().html == page
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_report as t; t.example().save(sys.argv[2])"
    there = tmp_path / "made" / "page.html"
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(there)], check=True)
    assert there.read_bytes().decode() == page


def test_saved_at_once_and_never_unasked(tmp_path: Path):
    report, path = Report("t"), tmp_path / "page.html"
    report.save(path)
    with pytest.raises(OutputExists): report.save(path)
    report.say("more")
    report.save(path, overwrite=True)
    assert path.read_text(encoding="utf-8") == report.html and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_twenty_figures_stay_small(page: str):
    assert 10 * len(page) < 4_000_000, "ten times a page with a curve and a cloud of 6,000 points"


# ---- figures


def test_figures_are_closed_and_styles_end():
    mine = plt.figure()
    before, size = plt.get_fignums(), plt.rcParams["font.size"]
    made = Report("t").figure(curve, "A curve", "Values (made up)")
    assert isinstance(made, plt.Figure) and made.get_facecolor() == plt.matplotlib.colors.to_rgba(LIGHT.paper)
    with pytest.raises(ZeroDivisionError): drawn(lambda: (plt.figure(), 1 / 0), dark=True)
    assert plt.get_fignums() == before and plt.rcParams["font.size"] == size
    plt.close(mine)


def test_dark_figures_are_legible():
    made = drawn(curve, dark=True)[0]
    line, level = made.axes[0].lines
    assert level.get_color() == (*plt.matplotlib.colors.to_rgb(DARK.ink), 1) and line.get_color() == DARK.cycle[0]
    light = drawn(curve, dark=False)[0].axes[0].lines
    assert light[1].get_color() == "black" and light[0].get_color() == LIGHT.cycle[0]


def test_a_flow_chart_is_legible_in_the_dark():
    flow = pd.DataFrame({"step": ["stays", "adults"], "excluded": [0, 20], "left": [120, 100]})
    made = drawn(lambda: draw_flow(flow, "cohort").figure, dark=True)[0]
    boxed = [t for t in made.axes[0].texts if t.get_bbox_patch()]
    assert boxed and all(t.get_color() == DARK.ink for t in boxed)
    assert {t.get_bbox_patch().get_facecolor()[:3] for t in boxed} == {plt.matplotlib.colors.to_rgb(DARK.paper)}


def test_style_starts_afresh():
    with plt.rc_context({"font.size": 40, "axes.grid": True}):
        with style(dark=False): assert plt.rcParams["font.size"] < 12 and not plt.rcParams["axes.grid"]
        assert plt.rcParams["font.size"] == 40


# ---- errors


@pytest.mark.parametrize("call, says", [
    (lambda r: Report(" "), "title: is empty"),
    (lambda r: r.section("Two  words"), "#two-words already"),
    (lambda r: r.section("!"), "no letter or digit"),
    (lambda r: r.say(""), "say: is empty"),
    (lambda r: r.warn(None), "warn: got NoneType"),
    (lambda r: r.table({"a": [1]}, "c"), "give a DataFrame"),
    (lambda r: r.table(pd.DataFrame({"a": [1]}), " "), "caption: is empty"),
    (lambda r: r.table(pd.DataFrame({"a": [1]}), "c", digits=0), "1 or more"),
    (lambda r: r.figure(curve, "", "c"), "alternative text: is empty"),
    (lambda r: r.figure(curve, "a", ""), "caption: is empty"),
    (lambda r: r.figure(lambda: curve().axes[0], "a", "c"), "returned Axes"),
])
def test_refusals_leave_the_page_alone(call, says: str):
    report = Report("t")
    report.section("Two words")
    before = report.html
    with pytest.raises(ValueError, match=says): call(report)
    assert report.html == before


def test_one_figure_twice_is_refused():
    made = curve()
    with pytest.raises(ValueError, match="one figure twice"): Report("t").figure(lambda: made, "a", "c")
    plt.close(made)


# ---- in a browser

@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(page: str, width: int, dark: bool, tmp_path: Path):
    said, console = asked(page, width, dark, tmp_path)
    assert console == []
    assert said["inner"] == width and said["scroll"] <= width and said["text"] <= width
    assert said["dark"] is dark and said["shown"] == ["dark" if dark else "light"] * 2
    paper = plt.matplotlib.colors.to_rgb((DARK if dark else LIGHT).paper)
    assert said["paper"] == f"rgb({', '.join(str(round(255 * x)) for x in paper)})"
    assert all(complete and natural > 0 for complete, natural, _ in said["images"])
    for client, scroll, tab in said["boxes"]:
        assert client <= width and (scroll <= client or tab == 0), "a box that scrolls cannot be reached by keyboard"
    if width == 390: assert any(scroll > client for client, scroll, _ in said["boxes"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_refuses_what_would_be_loaded(page: str, tmp_path: Path):
    stray = '<img src="https://example.invalid/x.png"><script>alert(1)</script><p style="width:2000px">x</p>'
    said, console = asked(page.replace("</main>", stray + "</main>"), 390, False, tmp_path)
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert said["images"][-1][1] == 0 and said["scroll"] > said["inner"]
