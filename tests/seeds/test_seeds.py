"""The facts load, carry their provenance, and a wrong row is refused by name."""

from __future__ import annotations

import importlib.resources

import pytest

import seeds

ARTICLES = {
    "000_384ae6b26fe37618",
    "001_61a6063de61e43c6",
    "002_e9d7bc8aedba0437",
    "003_deb19cc2a0e9dda1",
    "004_2f47327b7740680c",
}


def test_the_articles_price_points() -> None:
    assert {key: price.usd_per_million_tokens for key, price in seeds.load().apis.items()} == {
        "yi-lightning": 0.14,
        "openai-small": 0.26,
        "gpt-4o": 4.40,
    }


def test_every_row_names_articles_that_exist() -> None:
    facts = seeds.load()
    named = {key for row in [*facts.apis.values(), *facts.figures.values()] for key in row.articles}
    assert named == ARTICLES


def test_the_digest_ships_and_introduces_every_article() -> None:
    digest = importlib.resources.files("seeds").joinpath("README.md").read_text(encoding="utf-8")
    assert all(key in digest for key in ARTICLES)


def test_devices_have_a_price_a_date_and_a_source() -> None:
    devices = seeds.load().devices
    assert devices["h100-80gb"].usd_per_hour == 2.29
    assert devices["cpu-4vcpu"].usd_per_hour == 0.0279
    for device in devices.values():
        assert device.date == "2026" and device.source
        assert (device.low or 0) <= device.usd_per_hour <= (device.high or device.usd_per_hour)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[[device]]\nkey = "x"\nlabel = "X"\nusd_per_hour = -1\ndate = "2026"\nsource = "s"', "usd_per_hour"),
        ('[[device]]\nkey = "x"\nlabel = "X"\nusd_per_hour = nan\ndate = "2026"\nsource = "s"', "usd_per_hour"),
        ('[[device]]\nkey = "x"\nlabel = "X"\nusd_per_hour = true\ndate = "2026"\nsource = "s"', "usd_per_hour"),
        ('[[device]]\nkey = "x"\nlabel = "X"\nusd_per_hour = 1\ndate = "2026"', "source"),
        ('[[device]]\nkey = "x"\nlabel = "X"\nusd_per_hour = 1\ndate = "2026"\nsource = ""', "source"),
        ('[[api]]\nkey = "x"\nlabel = "X"\nusd_per_million_tokens = 1\narticles = []', "articles"),
        ('[[api]]\nkey = "x"\nlabel = "X"\nusd_per_million_tokens = 1\narticles = ["a"]\ncolour = "red"', "colour"),
        ('[[figure]]\nkey = "x"\nlabel = "X"\nvalue = "many"\nunit = "u"\narticles = ["a"]', "value"),
        ('[[prices]]\nkey = "x"', "prices"),
    ],
)
def test_a_wrong_row_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        seeds.parse(text)


def test_a_key_stands_for_one_row() -> None:
    row = '[[figure]]\nkey = "x"\nlabel = "X"\nvalue = 1\nunit = "u"\narticles = ["a"]\n'
    with pytest.raises(ValueError, match="twice"):
        seeds.parse(row + row)
