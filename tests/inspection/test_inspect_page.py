"""The page of `fairseq-moe inspect` in headless Chromium, by clicking and typing."""

import re

import browser
import pytest


@pytest.fixture(scope="module")
def path(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "p.html"
    found.write_page(path)
    return path


def test_the_page_is_one_file_and_text_cannot_break_out_of_it(path):
    html = path.read_text(encoding="utf-8")
    outside = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    addresses = re.findall(r"https?://[^\"' ]*", outside)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}, "a name, not a request"
    assert not re.search(r"<link|<img|@import|url\(|src=|fetch\(|XMLHttp", outside)
    assert html.count("</script>") == 2, "that of the user's text is data"


@pytest.fixture
def opened(path):
    if browser.find() is None:
        pytest.skip("no Chromium on this machine")
    with browser.Page() as page:
        page.open(path)
        yield page
        assert page.errors == []
        assert {url.split(":")[0] for url in page.requests} <= {"file", "data"}


def shown(page, selector):
    return page.value(f"document.querySelector({selector!r}).textContent")


def test_the_page_answers_to_mouse_and_keys(opened, found):
    text, page = found.texts[0], opened
    number = "document.querySelectorAll('.t').length"
    assert page.value(number) == len(text.tokens)
    page.click('.t[data-i="3"]')
    expert, probability, _ = text.candidates[0][3][0]
    detail = shown(page, "#detail")
    assert "token 4, layer 1" in detail and f"expert {expert}" in detail
    assert f"Loss {text.loss[3]:.2f}" in detail and f"Second model {text.twin[3]:.2f}" in detail
    assert "first" in detail and "second" in detail and "not chosen" in detail
    page.press("ArrowRight")
    assert "token 5, layer 1" in shown(page, "#detail")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert "token 3, layer 1" in shown(page, "#detail")
    page.move('.t[data-i="7"]')
    assert "token 8, layer 1" in shown(page, "#detail"), "hover"

    def experts():
        numbers = "[...document.querySelectorAll('.t small')].map((e) => e.textContent)"
        return page.value(numbers)

    for at, layer in enumerate(("1", "3")):
        assert experts() == [str(row[0][0]) for row in text.candidates[at]]
        assert layer in shown(page, "#layer-name")
        page.value("document.getElementById('layer').focus()")
        page.press("ArrowRight")
    assert f"layer {found.layers[1].layer}" in shown(page, "#experts")

    first = text.candidates[1][0][0][0]
    page.click(f'.chip[data-expert="{first}"]')
    off = page.value("[...document.querySelectorAll('.t')].map((e) => e.className.includes('off'))")
    assert off == [row[0][0] != first for row in text.candidates[1]]
    page.click(f'.chip[data-expert="{first}"]')
    assert page.value("document.querySelectorAll('.t.off').length") == 0

    select = "document.getElementById('colour')"
    page.value(f"{select}.value = 'loss'; {select}.dispatchEvent(new Event('change'))")
    assert "color-mix" in page.value("document.querySelector('.t').getAttribute('style')")
    assert "loss" in shown(page, "#legend")


def test_the_page_shows_every_part(opened, found):
    page = opened
    assert page.value("document.querySelectorAll('.card').length") == 4
    card = found.layers[0].cards[max(range(4), key=lambda e: found.layers[0].cards[e].share)]
    assert f"Expert {card.expert}:" in shown(page, ".card")
    assert page.value("document.querySelectorAll('#knowledge svg[role=img]').length") == 4
    for part in ("flows", "similar", "saturated", "trained"):
        assert page.value(f"document.querySelectorAll('#{part} svg[role=img]').length") > 0, part
    page.click("#flows rect")
    assert "go to expert" in shown(page, "#flows .said")
    page.value("document.querySelector('#similar svg').focus()")
    page.press("ArrowDown")
    assert f"Experts {found.layers[0].shown[1]} and 0" in shown(page, "#similar .said")


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_sticks_out_and_everything_can_be_read(opened, width):
    page = opened
    page.resize(width, 900)
    assert page.value("document.documentElement.scrollWidth") <= width
    wide = (
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg, .tokens')"
    )
    wide += f" && e.getBoundingClientRect().right > {width} + 1).map((e) => e.className)"
    assert page.value(wide) == []
    small = (
        "[...document.querySelectorAll('button.chip')].filter((e) => e.offsetHeight < 24).length"
    )
    assert page.value(small) == 0, "a finger can press them"


def test_colours_are_those_of_light_and_dark(path):
    if browser.find() is None:
        pytest.skip("no Chromium on this machine")
    with browser.Page(dark=True) as page:
        page.open(path)
        paper = page.value("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(20, 24, 29)"
        ink = page.value("getComputedStyle(document.querySelector('.t.on')).color")
        assert ink == "rgb(0, 0, 0)", "black on the light colours of experts"


def test_on_paper_it_is_light_and_whole(opened, tmp_path):
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.ask("Emulation.setEmulatedMedia", media="print", features=dark)
    opened.resize(720, 900)

    def style(selector, name):
        return opened.value(f"getComputedStyle(document.querySelector('{selector}')).{name}")

    assert style("body", "backgroundColor") == "rgb(255, 255, 255)"
    assert style("body", "printColorAdjust") == "exact"
    assert {style(one, "display") for one in (".bar nav", ".chips", ".detail")} == {"none"}
    assert style("#tokens", "maxHeight") == "none"
    assert opened.value("document.documentElement.scrollWidth") <= 720
    opened.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_long_indents_stay_in_their_card(opened):
    assert opened.value("""(() => {
        const quote = document.querySelector(".quote code");
        quote.textContent = " ".repeat(200);
        const right = (one) => one.getBoundingClientRect().right;
        return right(quote) <= right(quote.closest(".card"));
    })()""")


def test_a_single_update_is_a_point(opened):
    draw = 'lines("a", [{name: "b", points: [[10, 2]], style: 0}], "update")'
    assert opened.value(f'{draw}.querySelectorAll("circle").length') == 1
