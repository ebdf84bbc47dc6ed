"""The page in a browser: it runs without an error, and search, sorting, keys and links do what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.browser import needs_browser, open_browser
from tests.train.report.made import CORE, made_learner, made_run
from tests.train.report.test_page import EVIL, made_latent, made_latents
from train.report import page
from train.report.page import write_page

pytestmark = needs_browser
N = 1000


def latents_of(n: int) -> dict[str, Any]:
    """Latents with growing densities and falling largest activations; every third in group b."""
    made = [made_latent(i, density=(i + 1) / 2000, max=2000.0 - i, group="b" if i % 3 == 0 else "a") for i in range(n)]
    for latent in made:
        latent["contexts"] = [made_latent(0)["contexts"][0]]
    made[5]["contexts"][0]["tokens"] = [" needle", EVIL, "<b>bold</b>"]
    made[5]["contexts"][0]["values"] = [700.0, 1995.0, 0]
    return made_latents(*made)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    flat = made_latents(made_latent(1, promoted=None, suppressed=None), reasons={"promoted": "no model here"})
    learners = [made_learner("a", evals={"core": CORE, "latents": latents_of(N)})]
    learners += [
        made_learner("b", evals={"core": CORE, "latents": flat}),
        made_learner("<b>c", state="failed", reason=EVIL),
    ]
    learners += [made_learner(f"more{n}", ev=n / 10, evals={"core": CORE}) for n in range(6)]
    run = made_run(folder / "r", *learners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw_pictures", lambda study: [])
        return write_page([run])


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def opened(driver: Any, file: Path) -> Iterator[Any]:
    driver.get("about:blank")
    driver.get(file.as_uri())
    yield driver
    assert driver.get_log("browser") == []  # no error, no refused script, nothing that was not found


def all_of(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements("css selector", selector))


def texts(driver: Any, selector: str) -> list[str]:
    """What all these elements say, read at one moment: rows are made anew as the list is scrolled."""
    read = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)"
    return [" ".join(text.split()) for text in driver.execute_script(read, selector)]


def one(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def shown(driver: Any) -> list[int]:
    """Indices of the latents in the list, from the top."""
    return [int(text.split()[0]) for text in texts(driver, ".row")]


def search(driver: Any, text: str) -> None:
    field = one(driver, "input[type=search]")
    field.clear()
    field.send_keys(text)


def pick(driver: Any, label: str, option: str) -> None:
    choice = driver.find_element("xpath", f"//label[starts-with(normalize-space(.), '{label}')]/select")
    choice.find_element("xpath", f"./option[.='{option}']").click()


def test_rows_are_made_only_where_they_are_seen(opened: Any) -> None:
    assert one(opened, "[role=status]").text == f"{N} of {N} latents"
    assert shown(opened)[:3] == [999, 998, 997]  # the densest first
    assert len(shown(opened)) < 60
    opened.execute_script("document.querySelector('.list').scrollTop = 34 * 500")
    opened.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert 499 in shown(opened)
    assert len(shown(opened)) < 60


def test_latents_are_sorted_by_what_is_chosen(opened: Any) -> None:
    pick(opened, "sort by", "max")
    assert shown(opened)[:2] == [0, 1]
    one(opened, ".controls > button").click()
    assert shown(opened)[:2] == [999, 998]
    pick(opened, "sort by", "index")
    assert shown(opened)[:2] == [0, 1]


def test_search_finds_tokens_indices_and_groups(opened: Any) -> None:
    search(opened, "needle")
    assert shown(opened) == [5]
    search(opened, "</SCRIPT>")  # as text, whatever its case
    assert shown(opened) == [5]
    search(opened, "<b>bold")  # a token that it is silent on
    assert texts(opened, ".list .empty") == ["No latent like this."]
    search(opened, "#77")
    assert shown(opened) == [77]
    search(opened, "")
    pick(opened, "group", "b")
    assert one(opened, "[role=status]").text == "334 of 1000 latents"
    assert shown(opened)[:2] == [999, 996]


def test_details_show_text_as_text_and_shade_it(opened: Any) -> None:
    search(opened, "needle")
    assert "Latent 5" in one(opened, ".detail").text
    spans = all_of(opened, ".contexts .text span")
    assert [span.get_property("textContent") for span in spans] == [" needle", EVIL, "<b>bold</b>"]
    assert [span.get_attribute("class") for span in spans] == ["on", "on peak", ""]
    colours = [span.value_of_css_property("background-color") for span in spans]
    assert len(set(colours)) == 3  # strong, weak, none
    assert len(all_of(opened, ".panels rect")) == 2
    assert texts(opened, ".effects li") == ["␣x 0.5", "y -0.5"]
    assert all_of(opened, ".detail b b, main script") == []


def test_neighbours_and_links_lead_to_latents(opened: Any, file: Path) -> None:
    search(opened, "#5")
    one(opened, ".neighbours button").click()  # index 6, which the search hides
    assert "Latent 6" in one(opened, ".detail").text
    assert one(opened, "input[type=search]").get_property("value") == ""
    opened.get(f"{file.as_uri()}#latent=b/1")
    opened.refresh()
    assert "Latent 1" in one(opened, ".detail").text
    assert "no model here" in one(opened, ".panels").text
    assert not one(opened, ".neighbours button").is_enabled()  # 2 is not in the sample


def test_the_list_is_moved_through_by_keys(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    box = one(opened, ".list")
    box.send_keys(Keys.ARROW_DOWN)
    assert "Latent 998" in one(opened, ".detail").text
    box.send_keys(Keys.END)
    assert "Latent 0" in one(opened, ".detail").text
    assert 0 in shown(opened)
    active = "return document.getElementById(arguments[0].getAttribute('aria-activedescendant')).innerText"
    assert opened.execute_script(active, box).split()[0] == "0"
    assert texts(opened, ".row[aria-selected=true]")[0].split()[0] == "0"


def test_a_row_is_chosen_by_a_click(opened: Any) -> None:
    one(opened, ".row:nth-child(4)").click()
    assert "Latent 996" in one(opened, ".detail").text
    assert texts(opened, ".row[aria-selected=true]")[0].split()[0] == "996"


def test_all_learners_are_one_list(opened: Any) -> None:
    pick(opened, "learner", "all learners")
    assert one(opened, "[role=status]").text == f"{N + 1} of {N + 1} latents"
    search(opened, "#1")
    assert shown(opened) == [1, 1]
    read = "return [...document.querySelectorAll('.row')].map(row => row.title)"
    assert opened.execute_script(read) == ["b", "a"]


def test_an_address_that_is_none_is_passed_over(opened: Any, file: Path) -> None:
    opened.get(f"{file.as_uri()}#latent=%E0%A4%A/5")  # no encoded text
    opened.get(f"{file.as_uri()}#latent=a/7")  # the page that is open follows it
    assert "Latent 7" in one(opened, ".detail").text


def test_tables_are_sorted_by_their_headings(opened: Any) -> None:
    def first(column: int) -> Sequence[str]:
        return texts(opened, f"#learners tbody tr > :nth-child({column})")

    press = all_of(opened, "#learners thead button")
    press[4].click()  # held-out EV
    assert [text for text in first(5) if text != "–"] == ["0.8", "0.8", "0.5", "0.4", "0.3", "0.2", "0.1", "0"]
    assert first(5)[-1] == "–"  # the one that failed
    press[4].click()
    assert first(5)[0] == "0"
    assert first(5)[-1] == "–"
    press[0].click()
    assert first(1)[0] == "<b>c"


def test_curves_are_drawn_and_can_be_switched_off(opened: Any) -> None:
    lines = len(all_of(opened, ".chart:first-child path.series"))
    assert lines == 9
    toggle = opened.find_element("css selector", ".legend [data-label=a]")
    toggle.click()
    assert len(all_of(opened, ".chart:first-child path.series")) == lines - 1
    assert toggle.get_attribute("aria-pressed") == "false"
    pick_figure = one(opened, "select[aria-label='Logged figure']")
    pick_figure.find_element("xpath", "./option[@value='l1']").click()
    assert all_of(opened, ".chart:last-child path.series")


def test_what_is_next_to_nothing_does_not_stretch_a_chart(opened: Any) -> None:
    lines = [{"ended": False, "y": values} for values in ([0.25, 0.5], [0.5, 1.0], [1e-16, 2e-16], [None, 0.0])]
    assert opened.execute_script("return rangeOf(arguments[0], true)", lines) == [0.25, 1.0]
    assert opened.execute_script("return rangeOf(arguments[0], true)", lines[2:]) == [1e-16, 2e-16]
    assert len(opened.execute_script("return ticksOf([1e-9, 1e3], true)")) <= 7


def test_a_narrow_screen_is_not_wider_than_it_is(opened: Any) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 420
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
